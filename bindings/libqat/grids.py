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
    """Weights that share their scale; None: a whole row (output channel), or tensor (`whole_tensor`)."""
    codes: tuple[int, int] | None
    """Least and greatest code; None for float grids."""
    fields: tuple[tuple[str, int, str], ...]
    """Stored scale parameters of a block: (name, count, dtype)."""
    whole_tensor: bool = False
    """All weights of the tensor share their scale."""
    scale_grids: tuple[str, ...] = ()
    """What may follow the name behind "@": the numbers to which scales are rounded, the default first."""
    dequant_dtypes: tuple[str, ...] = ()
    """What may follow behind ":": the type in which the consumer multiplies, the default first."""

    def bits_per_weight(self, width: int) -> float:
        """Stored bits of one weight in rows of `width` weights, scales included."""
        return 8 * _core.grid_row_bytes(self.name, width) / width


def grid(name: str) -> Grid:
    """The grid of a name, which may carry options ("int4_g32@bf16:bf16"), or ArgumentError with what may."""
    info = _core.grid_info(name)
    return Grid(
        info["name"],
        info["bits"],
        info["block"],
        None if info["is_float"] else (info["code_min"], info["code_max"]),
        tuple(info["fields"]),
        info["whole_tensor"],
        info["scale_grids"],
        info["dequant_dtypes"],
    )


def grids() -> dict[str, Grid]:
    """Every grid by its name without options, float grids first.

    Options stand behind a name, `NAME[@SCALE_GRID][:DEQUANT_DTYPE]`, and have the values that the grid lists:
    "int4_g32@bf16:bf16" keeps scales in bfloat16, for a consumer that also multiplies in it.
    """
    return {name: grid(name) for name in _core.grid_names()}
