"""What a model takes on disk under a policy, from its configuration alone: no weights, no download."""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from . import _core
from ._core import ArgumentError, Policy
from .configurations import model_config
from .prepare import as_policy

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}

_GROUPS = (
    ("layer_embedding", r"embed_tokens_per_layer\."),
    ("embedding", r"embed_tokens\."),
    ("head", r"lm_head\."),
    ("layer_model_projection", r"per_layer_model_projection\."),
    ("norms", r"norm(_\d)?\.weight$|layernorm(_\d)?\.|\.layer_scalar$"),
    ("layer_gates", r"\.per_layer_(input_gate|projection)\."),
    ("attention", r"\.self_attn\."),
    ("mlp", r"\.mlp\."),
    ("experts", r"\.experts\."),
    ("router", r"\.router\."),
)
"""The first that is found in a tensor's name decides."""

GROUPS = (
    "embedding",
    "layer_embedding",
    "layer_model_projection",
    "layer_gates",
    "attention",
    "mlp",
    "experts",
    "router",
    "norms",
    "head",
    "other",
)
"""In the order in which they are listed. The `layer_` ones belong to embeddings per layer (Gemma 4)."""


@dataclass(frozen=True)
class TensorSize:
    """One tensor of the file."""

    name: str
    group: str
    """One of `GROUPS`."""
    shape: tuple[int, ...]
    grid: str
    """Its grid, or the file's own name of its type when there is a file."""
    weights: int
    """How many of the model's it holds; 0 of what stands beside them (scales, a second copy)."""
    bytes: int


@dataclass(frozen=True)
class GroupSize:
    """The tensors of one group together."""

    group: str
    grids: tuple[str, ...]
    tensors: int
    weights: int
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Scales included."""
        return 8 * self.bytes / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class Size:
    """A model's tensors and their bytes."""

    tensors: tuple[TensorSize, ...]
    refused: tuple[_core.Obstacle, ...] = ()
    """Why the format would not take tensors; their bytes are counted as if it did."""

    @property
    def weights(self) -> int:
        """Of the model."""
        return sum(tensor.weights for tensor in self.tensors)

    @property
    def bytes(self) -> int:
        """Of all tensors: without the file's header, tokenizer and padding."""
        return sum(tensor.bytes for tensor in self.tensors)

    @property
    def bytes_without_layer_embedding(self) -> int:
        """What a device holds in memory when it reads the rows of the per-layer table from storage."""
        return sum(tensor.bytes for tensor in self.tensors if tensor.group != "layer_embedding")

    @property
    def bits_per_weight(self) -> float:
        """Scales included."""
        return 8 * self.bytes / self.weights

    def groups(self) -> list[GroupSize]:
        """Those that the model has, in the order of `GROUPS`."""
        found = []
        for group in GROUPS:
            of_group = [tensor for tensor in self.tensors if tensor.group == group]
            if of_group:
                grids = tuple(dict.fromkeys(tensor.grid for tensor in of_group))
                weights, size = (sum(getattr(t, key) for t in of_group) for key in ("weights", "bytes"))
                found.append(GroupSize(group, grids, len(of_group), weights, size))
        return found


def group_of(name: str) -> str:
    """The group of a tensor by its name in Hugging Face's spelling."""
    return next((group for group, pattern in _GROUPS if re.search(pattern, name)), "other")


def size(
    config: "str | os.PathLike",
    policy: "str | os.PathLike | Mapping | Policy | None" = None,
    *,
    format: str | None = None,
    dtype: str = "bf16",
) -> Size:
    """The bytes of every tensor of a model's decoder.

    config: as `libqat.configurations.model_config` takes it. policy: as `libqat.prepare` takes it; None
    leaves everything float. format: one of `libqat.export_targets()`: the tensors of that file, as its writer
    plans them; None counts grids as they are, and other tensors in `dtype`. dtype: "bf16", "f16" or "f32".
    """
    if dtype not in DTYPES:
        raise ArgumentError(f'size: dtype: expected one of {", ".join(DTYPES)}, got "{dtype}"')
    outlined = outline(model_config(config), policy, dtype)
    if format is None:
        return Size(tuple(_as_they_are(outlined)))
    names = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
    planned, refused = _core.plan_export(outlined, format, names[dtype])
    return Size(tuple(_in_file(outlined, planned)), tuple(refused))


def outline(
    config: str, policy: "str | os.PathLike | Mapping | Policy | None", dtype: str
) -> _core.QuantizedCheckpoint:
    """A checkpoint of the decoder of `config` (the text of a config.json) without numbers."""
    tensors = [(name, kind, shape) for name, shape, kind, _ in _core.parameter_shapes(config)]
    chosen = Policy.from_json(json.dumps({"rules": []})) if policy is None else as_policy(policy)
    return _core.outline(tensors, chosen, DTYPES[dtype], config)


def _as_they_are(outlined: _core.QuantizedCheckpoint) -> list[TensorSize]:
    rows = [
        TensorSize(
            name, group_of(name), tuple(tensor.shape), tensor.grid, math.prod(tensor.shape), tensor.nbytes
        )
        for name, tensor in outlined.quantized.items()
    ]
    short = {dtype: name for name, dtype in DTYPES.items()}
    for name, value in outlined.floats.items():
        rows.append(
            TensorSize(
                name, group_of(name), tuple(value.shape), short[value.dtype], value.numel(), value.nbytes
            )
        )
    return sorted(rows, key=lambda row: row.name)


def _in_file(outlined: _core.QuantizedCheckpoint, planned: list[_core.FileTensor]) -> list[TensorSize]:
    """A tensor's weights are counted with its first part."""
    weights = {name: math.prod(tensor.shape) for name, tensor in outlined.quantized.items()}
    weights |= {name: value.numel() for name, value in outlined.floats.items()}
    return [
        TensorSize(
            part.name,
            group_of(part.key),
            tuple(part.shape),
            part.type.lower(),
            weights.pop(part.key, 0),
            part.bytes,
        )
        for part in planned
    ]


__all__ = ["DTYPES", "GROUPS", "GroupSize", "Size", "TensorSize", "group_of", "outline", "size"]
