"""The number formats that libqat trains on and exports, as a table."""

from typing import NamedTuple

from . import _core


class Grid(NamedTuple):
    """One number format; see docs/numerics.md for its arithmetic."""

    name: str
    """The consumer's own spelling, as policies use it: "q4_0", "int4_channel", ..."""
    bits: int
    """Width of one stored code, or of one value of a float grid."""
    block: int | None
    """Weights that share their scale; None: a whole row (output channel)."""
    codes: tuple[int, int] | None
    """Least and greatest code; None for float grids."""
    fields: tuple[tuple[str, int, str], ...]
    """Stored scale parameters of a block: (name, count, dtype)."""

    def bits_per_weight(self, width: int) -> float:
        """Stored bits of one weight in rows of `width` weights, scales included."""
        return 8 * _core.grid_row_bytes(self.name, width) / width


def grids() -> dict[str, Grid]:
    """Every grid by name, float grids first."""
    table = {}
    for name in _core.grid_names():
        info = _core.grid_info(name)
        codes = None if info["is_float"] else (info["code_min"], info["code_max"])
        table[name] = Grid(name, info["bits"], info["block"], codes, tuple(info["fields"]))
    return table
