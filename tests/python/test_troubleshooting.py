"""The troubleshooting page quotes messages that exist, and knows every place that raises one."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
SOURCES = [
    *(ROOT / "libqat").rglob("*.[ch]pp"),
    *(ROOT / "bindings").rglob("*.cpp"),
    *(ROOT / "bindings").rglob("*.py"),
]


def literals() -> str:
    """The text of all sources with adjoining string literals joined, as a reader of a message sees it."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)
    text = re.sub(r'"\s*\n\s*f?"', "", text)
    return text.replace('\\"', '"')


def quoted() -> list[str]:
    """Messages: the first column of the tables headed `message`."""
    rows, inside = [], False
    for line in PAGE.splitlines():
        if line.startswith("| message |"):
            inside = True
        elif not line.startswith("|"):
            inside = False
        elif inside and not line.startswith("|---"):
            rows += re.findall(r"`([^`]+)`", line.split(" | ")[0])[:1]
    return rows


@pytest.mark.parametrize("message", quoted())
def test_a_quoted_message_exists(message):
    corpus = literals()
    # Names and numbers are put together at run time: what is certain are the words after "expected".
    pieces = [piece.strip(" :(") for piece in re.split(r"…|rules\[0\]|^[\w:]+: ", message)]
    for piece in [piece for piece in pieces if len(piece) > 6]:
        words = piece.removeprefix(".weight: ").removeprefix("expected ").strip()
        assert words in corpus, words


def test_every_function_that_raises_is_on_the_page():
    source = literals()
    raising = set(re.findall(r'Error\(\s*(?:f?)"([A-Za-z_:]+): ', source))
    internal = {"grid", "rope_permutation", "inverse_permutation", "write_json", "read_json"}
    known = {name for name in raising if re.search(rf"\b{re.escape(name)}\b", PAGE)}
    missing = raising - known - internal
    assert not missing, f"not explained in docs/troubleshooting.md: {sorted(missing)}"
