"""Reading JSON that somebody may have edited: values are checked, errors name file and JSON path."""

import json
import math
from typing import Any, NoReturn

from .._core import FileError


class Reader:
    """A JSON object of a file."""

    def __init__(self, content: Any, source: str, path: str = ""):
        self._source, self._path = source, path
        if not isinstance(content, dict):
            raise FileError(
                f"report: {source}: {path or 'content'}: expected an object, got {_short(content)}"
            )
        self.content = content

    def fail(self, key: str, expected: str, got: Any) -> NoReturn:
        """FileError for one key."""
        where = f"{self._path}.{key}" if self._path else key
        raise FileError(f"report: {self._source}: {where}: expected {expected}, got {_short(got)}")

    def _get(self, key: str, expected: str) -> Any:
        if key not in self.content:
            self.fail(key, expected, None)
        return self.content[key]

    def text(self, key: str) -> str:
        """A string."""
        value = self._get(key, "text")
        return value if isinstance(value, str) else self.fail(key, "text", value)

    def whole(self, key: str) -> int:
        """A whole number from 0 on."""
        value = self._get(key, "a whole number")
        good = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        return value if good else self.fail(key, "a whole number", value)

    def number(self, key: str) -> float:
        """A finite number."""
        value = self.number_or_none(key)
        return self.fail(key, "a number", self.content.get(key)) if value is None else value

    def number_or_none(self, key: str) -> float | None:
        """A finite number, or None where there is none: absent, null, NaN or infinite."""
        value = self.content.get(key)
        if value is None:
            return None
        if not _is_number(value):
            self.fail(key, "a number", value)
        return float(value) if math.isfinite(value) else None

    def pair_or_none(self, key: str) -> tuple[float, float] | None:
        """[low, high], or None where there is none."""
        value = self.content.get(key)
        if value is None:
            return None
        ends = value if isinstance(value, list) else []
        if len(ends) != 2 or not all(end is None or _is_number(end) for end in ends):
            self.fail(key, "[low, high]", value)
        known = all(end is not None and math.isfinite(end) for end in ends)
        return (float(ends[0]), float(ends[1])) if known else None

    def entries(self, key: str) -> list["Reader"]:
        """A list of objects; [] when absent."""
        value = self.content.get(key, [])
        if not isinstance(value, list):
            self.fail(key, "a list", value)
        prefix = f"{self._path}.{key}" if self._path else key
        return [Reader(entry, self._source, f"{prefix}[{index}]") for index, entry in enumerate(value)]

    def object(self, key: str) -> "Reader":
        """An object."""
        value = self._get(key, "an object")
        return Reader(value, self._source, f"{self._path}.{key}" if self._path else key)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
