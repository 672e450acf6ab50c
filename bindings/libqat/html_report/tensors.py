"""What rounding and training did to each tensor, in numbers: streamed in row chunks, one tensor at a time."""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _core, ops
from .._core import ArgumentError

KINDS = ("embedding", "attention", "mlp", "conv", "norm", "head", "other")
_CHUNK = 1 << 22
"""Weights that are looked at together: bounds the memory of huge embeddings, fixes the order of the sums."""
_NAMED = {
    "norm": r"norm|(^|[._])ln(_\w+|\d*)?[._]|(^|[._])bn\d*[._]",
    "embedding": r"embed|(^|[._])wte[._]|(^|[._])wpe[._]",
    "head": r"(^|[._])(lm_head|head|classifier|score|fc_out)[._]",
    "attention": r"attn|attention",
    "mlp": r"mlp|feed_forward|ffn|experts|intermediate|(^|[._])output[._]",
}
_LAYER = re.compile(r"\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Weight:
    """One parameter: what it was, what was trained, what ships."""

    name: str
    shape: tuple[int, ...]
    grid: str
    """Name of a grid with codes, or the float type that it is stored in ("f32")."""
    bytes: int
    """As it ships: codes and scales, without the container's padding."""
    trained: bool
    original: Callable[[], Tensor]
    """The float weight before training."""
    latent: Callable[[], Tensor]
    """The float weight that training moved; the original where it is frozen."""
    shipped: Callable[[], tuple[Tensor, Tensor] | Tensor]
    """(codes int8[R, N], scales float32[R, G, P]) on a grid with codes, else the tensor as stored."""


@dataclass(frozen=True)
class TensorRow:
    """One line of the report's table. Errors are RMS(a - b) / RMS(b); shares are of the tensor's weights."""

    name: str
    kind: str
    layer: int | None
    role: str
    """The name within its layer, without further numbers: "self_attn.q_proj", "mlp.experts.*.up_proj"."""
    shape: tuple[int, ...]
    grid: str
    bits_per_weight: float
    bytes: int
    trained: bool
    moved: float | None
    """Latent against original; None when the original is all zeros and the latent is not."""
    ptq_error: float | None = None
    """Original, rounded to nearest, against original. None where nothing is rounded, as all that follow."""
    qat_error: float | None = None
    """What ships against the original."""
    distance: float | None = None
    """What ships against the latent."""
    flip_rate: float | None = None
    """Codes that differ from those of the rounded original."""
    edge_share: float | None = None
    """Codes that are the least or the greatest."""
    dead_codes: int | None = None
    """Legal codes that no weight has."""
    ptq_counts: tuple[int, ...] = ()
    """How often the rounded original has each code, from the least to the greatest."""
    qat_counts: tuple[int, ...] = ()

    @property
    def weights(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


def kind_of(name: str, shape: tuple[int, ...]) -> str:
    """One of KINDS, by the words that model families use in names, and by the number of dimensions."""
    for kind, pattern in _NAMED.items():
        if re.search(pattern, name, re.IGNORECASE):
            return kind
    return "conv" if len(shape) > 2 else "other"


def place_of(name: str) -> tuple[int | None, str]:
    """(layer, role) of a parameter; no layer when its name has no number."""
    match = _LAYER.search(name)
    layer, role = (int(match[1]), match[2]) if match else (None, name)
    return layer, re.sub(r"(?<=\.)\d+(?=\.)", "*", role.removesuffix(".weight"))


def measure(weight: Weight) -> TensorRow:
    """The table's line of one parameter. ArgumentError when what ships has another shape."""
    layer, role = place_of(weight.name)
    row = {
        "name": weight.name,
        "kind": kind_of(weight.name, weight.shape),
        "layer": layer,
        "role": role,
        "shape": weight.shape,
        "grid": weight.grid,
        "bits_per_weight": 8 * weight.bytes / max(math.prod(weight.shape), 1),
        "bytes": weight.bytes,
        "trained": weight.trained,
    }
    if has_codes(weight.grid):
        return TensorRow(**row, **_measure_codes(weight))
    return TensorRow(**row, **_measure_float(weight))


def has_codes(grid: str) -> bool:
    """Whether a tensor of this type is stored as codes: false for "f32" and other float types."""
    return grid in _core.grid_names() and not _core.grid_info(grid)["is_float"]


@dataclass
class _Sums:
    """Sums of squares over the chunks of a tensor."""

    original: float = 0.0
    latent: float = 0.0
    moved: float = 0.0
    ptq: float = 0.0
    qat: float = 0.0
    distance: float = 0.0

    def add(self, **tensors: Tensor) -> None:
        """tensors: float32[r, N]. Rows in float32, their sum in float64: fast, and good to six digits."""
        for name, tensor in tensors.items():
            rows = torch.linalg.vector_norm(tensor, dim=1).double()
            setattr(self, name, getattr(self, name) + float(rows @ rows))

    def moved_by(self) -> float | None:
        """How far training moved the latent, where that can be told."""
        return None if self.moved > 0 == self.original else self.relative("moved", "original")

    def relative(self, name: str, base: str) -> float:
        size = getattr(self, base)
        return math.sqrt(getattr(self, name) / size) if size > 0 else 0.0


@torch.no_grad()
def _measure_codes(weight: Weight) -> dict:
    info = _core.grid_info(weight.grid)
    legal = torch.arange(info["code_min"], info["code_max"] + 1) % 256
    sums, flips = _Sums(), 0
    counts = torch.zeros(2, len(legal), dtype=torch.int64)
    for original, latent, codes, scales in chunks(weight):
        ptq_codes, ptq_scales = ops.quantize(original, weight.grid, tensor=weight.name)
        ptq = ops.dequantize(ptq_codes, ptq_scales, weight.grid, weight.name)
        qat = ops.dequantize(codes, scales, weight.grid, weight.name)
        sums.add(original=original, latent=latent, moved=latent - original)
        sums.add(ptq=ptq - original, qat=qat - original, distance=qat - latent)
        flips += int(torch.count_nonzero(codes != ptq_codes))
        for line, some in zip(counts, (ptq_codes, codes), strict=True):
            line += torch.bincount(some.flatten().view(torch.uint8), minlength=256)[legal]
    total = max(math.prod(weight.shape), 1)
    ptq_counts, qat_counts = counts.tolist()
    return {
        "moved": sums.moved_by(),
        "ptq_error": sums.relative("ptq", "original"),
        "qat_error": sums.relative("qat", "original"),
        "distance": sums.relative("distance", "latent"),
        "flip_rate": flips / total,
        "edge_share": (qat_counts[0] + qat_counts[-1]) / total,
        "dead_codes": qat_counts.count(0),
        "ptq_counts": tuple(ptq_counts),
        "qat_counts": tuple(qat_counts),
    }


@torch.no_grad()
def _measure_float(weight: Weight) -> dict:
    """A tensor that ships in a float type. A narrow one (f16, bf16) rounds too, though it has no codes."""
    shipped = weight.shipped()
    _check_shape(weight, tuple(shipped.shape), "checkpoint")
    _check_shape(weight, tuple(weight.latent().shape), "state of the run")
    original, latent = (tensor.float().reshape(1, -1) for tensor in (weight.original(), weight.latent()))
    sums = _Sums()
    sums.add(original=original, latent=latent, moved=latent - original)
    result = {"moved": sums.moved_by()}
    if shipped.dtype not in (torch.float16, torch.bfloat16):
        return result
    rounded, stored = original.to(shipped.dtype).float(), shipped.float().reshape(1, -1)
    sums.add(ptq=rounded - original, qat=stored - original, distance=stored - latent)
    errors = {"ptq_error": ("ptq", "original"), "qat_error": ("qat", "original")}
    errors["distance"] = ("distance", "latent")
    return result | {name: sums.relative(*of) for name, of in errors.items()}


def chunks(weight: Weight) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(original, latent float32[r, N], codes int8[r, N], scales float32[r, G, P]) of some rows at a time.

    All rows at once where they share a scale, float32[1, 1, P]: it follows from all of them.
    """
    codes, scales = weight.shipped()
    rows, width = codes.shape
    original, latent = weight.original(), weight.latent()
    _check_shape(weight, (rows, width), "checkpoint", flat=True)
    _check_shape(weight, tuple(latent.shape), "state of the run")
    step = rows if len(scales) < rows else max(_CHUNK // max(width, 1), 1)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        floats = [tensor.reshape(rows, width)[part].float() for tensor in (original, latent)]
        yield floats[0], floats[1], codes[part], scales[part]


def _check_shape(weight: Weight, shape: tuple[int, ...], where: str, flat: bool = False) -> None:
    expected = (weight.shape[0], math.prod(weight.shape[1:])) if flat else weight.shape
    if shape != expected:
        raise ArgumentError(
            f"report: {weight.name}: expected {list(expected)} as in the float model, got {list(shape)} in "
            f"the {where}"
        )
