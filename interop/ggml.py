"""ggml's own C code: its GGUF reader, its dequantizers and its reference quantizers."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.metadata import version as installed
from pathlib import Path

import numpy as np

NAME = "llama.cpp (ggml)"
GGUF_NAMES = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
_TYPES = 43
"""GGML_TYPE_COUNT of ggml.h."""


class _Traits(ctypes.Structure):
    """struct ggml_type_traits of ggml.h."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    ]


class _Parameters(ctypes.Structure):
    """struct gguf_init_params of gguf.h."""

    _fields_ = [("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p)]


def version() -> str:
    return f"libggml-python {installed('libggml-python')}"


@cache
def library() -> ctypes.CDLL:
    import libggml

    ggml = ctypes.CDLL(str(Path(libggml.__file__).parent / "lib64" / "libggml-base.so"))
    ggml.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
    ggml.gguf_init_from_file.restype = ctypes.c_void_p
    ggml.gguf_init_from_file.argtypes = [ctypes.c_char_p, _Parameters]
    for function, result in {
        "gguf_find_tensor": ctypes.c_int64,
        "gguf_get_data_offset": ctypes.c_size_t,
        "gguf_get_tensor_offset": ctypes.c_size_t,
        "gguf_get_tensor_size": ctypes.c_size_t,
        "gguf_get_tensor_type": ctypes.c_int,
    }.items():
        ggml[function].restype = result
    return ggml


class File:
    """A GGUF opened by ggml."""

    def __init__(self, path: Path):
        self._path = path
        self._context = ctypes.c_void_p(
            library().gguf_init_from_file(str(path).encode(), _Parameters(True, None))
        )
        if not self._context:
            raise RuntimeError(f"{path}: ggml cannot read it")

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_exception) -> None:
        library().gguf_free(self._context)

    def tensor(self, key: str) -> tuple[int, np.ndarray]:
        """(ggml_type, bytes uint8[n]) of a tensor by its name in the checkpoint."""
        ggml = library()
        layer, _, module = key.removeprefix("model.layers.").partition(".mlp.")
        name = f"blk.{layer}.{GGUF_NAMES[module.removesuffix('.weight')]}.weight"
        index = ctypes.c_int64(ggml.gguf_find_tensor(self._context, name.encode()))
        offset = ggml.gguf_get_data_offset(self._context) + ggml.gguf_get_tensor_offset(self._context, index)
        size = ggml.gguf_get_tensor_size(self._context, index)
        data = np.memmap(self._path, np.uint8, "r", offset, size)
        return ggml.gguf_get_tensor_type(self._context, index), data


def dequantize(kind: int, data: np.ndarray, count: int) -> np.ndarray:
    """float32[count]: what llama.cpp computes from the bytes."""
    values = np.empty(count, np.float32)
    traits = library().ggml_get_type_traits(kind).contents
    traits.to_float(data.ctypes.data, values.ctypes.data, count)
    return values


def quantize(kind: int, values: np.ndarray) -> np.ndarray:
    """uint8[bytes]: ggml's reference quantizer on contiguous float32 rows."""
    traits = library().ggml_get_type_traits(kind).contents
    blocks = np.zeros(values.size // traits.block * traits.type_size, np.uint8)
    traits.from_float(values.ctypes.data, blocks.ctypes.data, values.size)
    return blocks


def kind_of(grid: str) -> int:
    """The ggml_type of a grid, by ggml's own names."""
    names = ((kind, library().ggml_get_type_traits(kind).contents.type_name) for kind in range(_TYPES))
    return next(kind for kind, name in names if name and name.decode().lower() == grid)


def block_bytes(kind: int) -> int:
    return library().ggml_get_type_traits(kind).contents.type_size


SCALE_BYTES = {
    "q4_0": [(0, 2)],
    "q4_1": [(0, 4)],
    "q5_0": [(0, 2)],
    "q5_1": [(0, 4)],
    "q8_0": [(0, 2)],
    "q1_0": [(0, 2)],
    "q2_0": [(0, 2)],
    "tq1_0": [(52, 54)],
    "tq2_0": [(64, 66)],
    "mxfp4": [(0, 1)],
    "nvfp4": [(0, 4)],
    "q2_k": [(0, 16), (80, 84)],
    "q3_k": [(96, 110)],
    "q4_k": [(0, 16)],
    "q5_k": [(0, 16)],
    "q6_k": [(192, 210)],
}
"""Where the scales are in a block; every other byte holds codes. (ggml-common.h)"""


def compare(path: Path, filled, grid: str) -> tuple[int, int, int]:
    """Blocks whose codes and scales ggml's quantizer would choose otherwise, and weights that ggml decodes
    to other numbers than the checkpoint holds.
    """
    codes = scales = values = 0
    with File(path) as file:
        for key, latent in filled.latents.items():
            kind, data = file.tensor(key)
            expected = filled.checkpoint.weight(key).numpy().reshape(-1)
            values += differing(dequantize(kind, data, expected.size), expected)
            theirs = quantize(kind, np.ascontiguousarray(latent.numpy()))
            found = differing_blocks(np.asarray(data), theirs, kind, grid)
            codes, scales = codes + found[0], scales + found[1]
    return codes, scales, values


def differing(one: np.ndarray, other: np.ndarray) -> int:
    """Floats that are not the same bit for bit."""
    return int(np.count_nonzero(one.view(np.uint32) != other.view(np.uint32)))


def differing_blocks(one: np.ndarray, other: np.ndarray, kind: int, grid: str) -> tuple[int, int]:
    """(Blocks with other codes, blocks with other scales) of two runs of blocks."""
    differs = one.reshape(-1, block_bytes(kind)) != other.reshape(-1, block_bytes(kind))
    is_scale = np.zeros(differs.shape[1], bool)
    for begin, end in SCALE_BYTES[grid]:
        is_scale[begin:end] = True
    return tuple(int(np.count_nonzero(differs[:, part].any(axis=1))) for part in (~is_scale, is_scale))
