"""The container readers against files of the safetensors and gguf packages, and against ggml's own sizes."""

import ctypes
import json
import pathlib
import struct

import gguf
import libggml
import numpy as np
import pytest
import safetensors.torch
import torch

import libqat
from libqat import _core


def by_name(tensors):
    return {tensor["name"]: tensor for tensor in tensors}


def test_safetensors_of_every_dtype(tmp_path):
    dtypes = {
        torch.bool: "BOOL",
        torch.uint8: "U8",
        torch.int8: "I8",
        torch.int16: "I16",
        torch.uint16: "U16",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.int32: "I32",
        torch.uint32: "U32",
        torch.float32: "F32",
        torch.float64: "F64",
        torch.int64: "I64",
        torch.uint64: "U64",
        torch.float8_e4m3fn: "F8_E4M3",
        torch.float8_e5m2: "F8_E5M2",
        torch.float8_e8m0fnu: "F8_E8M0",
    }
    tensors = {f"t.{name}": torch.zeros(3, 5, dtype=torch.uint8).to(dtype) for dtype, name in dtypes.items()}
    tensors["empty"] = torch.zeros(0, 7)
    tensors["scalar \N{SNOWMAN}"] = torch.tensor(1.5)
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt", "note": "\N{SNOWMAN}"})
    header = _core.read_safetensors_header(path)
    assert header["metadata"] == {"format": "pt", "note": "\N{SNOWMAN}"}
    found = by_name(header["tensors"])
    assert found.keys() == tensors.keys()
    raw = path.read_bytes()
    for name, tensor in tensors.items():
        entry = found[name]
        assert entry["shape"] == list(tensor.shape)
        assert entry["dtype"] == dtypes[tensor.dtype]
        data = raw[entry["offset"] : entry["offset"] + entry["bytes"]]
        assert data == bytes(tensor.flatten().view(torch.uint8).tolist() if tensor.numel() else [])
    starts = [tensor["offset"] for tensor in header["tensors"]]
    assert starts == sorted(starts)


def write_gguf(path):
    """A file by gguf-py with a key of every type and tensors of several."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("u8", 255)
    writer.add_int8("i8", -1)
    writer.add_uint16("u16", 65535)
    writer.add_int16("i16", -2)
    writer.add_uint32("u32", 2**32 - 1)
    writer.add_int32("i32", -3)
    writer.add_uint64("u64", 2**64 - 1)
    writer.add_int64("i64", -4)
    writer.add_float32("f32", 0.5)
    writer.add_float64("f64", 0.1)
    writer.add_bool("bool", True)
    writer.add_string("text", "\N{SNOWMAN}")
    writer.add_array("tokens", [f"token {i}" for i in range(100)])
    writer.add_array("types", [1, -2, 3])
    generator = np.random.default_rng(0)
    tensors = {
        "matrix": generator.standard_normal((3, 64)).astype(np.float32),
        "half": generator.standard_normal((2, 2, 5)).astype(np.float16),
        "norm": generator.standard_normal(7).astype(np.float32),
    }
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    blocks = gguf.quants.quantize(tensors["matrix"], gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("quantized", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors | {"quantized": blocks}


def test_gguf_of_the_gguf_package(tmp_path):
    path = tmp_path / "x.gguf"
    tensors = write_gguf(path)
    header = _core.read_gguf_header(path)
    assert (header["version"], header["alignment"]) == (3, 32)
    expected = {
        "general.architecture": "llama",
        "u8": 255,
        "i8": -1,
        "u16": 65535,
        "i16": -2,
        "u32": 2**32 - 1,
        "i32": -3,
        "u64": 2**64 - 1,
        "i64": -4,
        "f32": 0.5,
        "f64": 0.1,
        "bool": True,
        "text": "\N{SNOWMAN}",
        "tokens": {"length": 100, "first": [f"token {i}" for i in range(8)]},
        "types": [1, -2, 3],
    }
    assert header["metadata"] == expected
    assert list(header["metadata"]) == list(expected)
    assert header["metadata"]["bool"] is True
    types = header["types"]
    shown = [types[key] for key in ("tokens", "types", "u64")]
    assert shown == ["array of string", "array of i32", "u64"]
    full = _core.read_gguf_header(path, full=True)["metadata"]["tokens"]
    assert full == [f"token {i}" for i in range(100)]

    raw = path.read_bytes()
    assert [tensor["name"] for tensor in header["tensors"]] == list(tensors)
    for entry in header["tensors"]:
        data = raw[entry["offset"] : entry["offset"] + entry["bytes"]]
        assert data == tensors[entry["name"]].tobytes()
    found = by_name(header["tensors"])
    assert (found["half"]["shape"], found["half"]["type"]) == ([2, 2, 5], "F16")
    assert (found["quantized"]["shape"], found["quantized"]["type"]) == ([3, 64], "Q8_0")


def one_tensor(type_id, dims, data):
    """A GGUF file with a tensor "t" of any type, byte by byte."""
    info = struct.pack("<Q1sI", 1, b"t", len(dims)) + struct.pack(f"<{len(dims)}qIQ", *dims, type_id, 0)
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + info
    return head + bytes(-len(head) % 32) + data


def test_tensor_sizes_are_those_of_ggml(tmp_path):
    """Every type id of ggml's library: its size for two rows of three blocks, or refused as removed."""
    (library, *_) = pathlib.Path(libggml.__file__).parent.rglob("libggml-base.so")
    ggml = ctypes.CDLL(str(library))
    ggml.ggml_type_size.restype = ctypes.c_size_t
    ggml.ggml_blck_size.restype = ctypes.c_int64
    ggml.ggml_type_name.restype = ctypes.c_char_p
    path = tmp_path / "x.gguf"
    count = 43
    removed = []
    for type_id in range(count):
        block, size = ggml.ggml_blck_size(type_id), ggml.ggml_type_size(type_id)
        path.write_bytes(one_tensor(type_id, [3 * max(block, 1), 2], bytes(6 * max(size, 1))))
        if block == 0:
            removed.append(type_id)
            with pytest.raises(libqat.FileError, match="a tensor type of ggml"):
                _core.read_gguf_header(path)
            continue
        (tensor,) = _core.read_gguf_header(path)["tensors"]
        assert tensor["bytes"] == 6 * size
        assert tensor["type"] == ggml.ggml_type_name(type_id).decode().upper()
        path.write_bytes(one_tensor(type_id, [3 * block, 2], bytes(6 * size - 1)))
        with pytest.raises(libqat.FileError, match=f"expected {6 * size} bytes of data"):
            _core.read_gguf_header(path)
    assert removed == [4, 5, 31, 32, 33, 36, 37, 38]


def test_text_that_is_not_utf8_is_still_shown(tmp_path):
    path = tmp_path / "x.gguf"
    value = b"a\xffb"
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sI", 1, b"k", 8)
    path.write_bytes(head + struct.pack("<Q", len(value)) + value)
    assert _core.read_gguf_header(path)["metadata"] == {"k": "a\N{REPLACEMENT CHARACTER}b"}


def test_errors_are_file_errors_that_name_the_file(tmp_path):
    missing = tmp_path / "none.gguf"
    for read in (_core.read_gguf_header, _core.read_safetensors_header):
        with pytest.raises(libqat.FileError, match=r"none\.gguf.*No such file"):
            read(missing)
        with pytest.raises(OSError):
            read(str(missing))
    swapped = tmp_path / "x"
    swapped.write_bytes(one_tensor(0, [1], bytes(4)))
    with pytest.raises(libqat.FileError, match="header length"):
        _core.read_safetensors_header(swapped)
    header = json.dumps({"\udc80": 1}).encode()
    swapped.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(libqat.FileError, match="syntax error"):
        _core.read_safetensors_header(swapped)


def test_smollm2_reads_as_the_gguf_package_reads_it(smollm2):
    header = _core.read_gguf_header(smollm2)
    reference = gguf.GGUFReader(smollm2)
    assert len(header["tensors"]) == len(reference.tensors) == 272
    for ours, theirs in zip(header["tensors"], reference.tensors, strict=True):
        assert ours["name"] == theirs.name
        assert ours["type"] == theirs.tensor_type.name
        assert ours["shape"] == list(reversed(theirs.shape.tolist()))
        assert (ours["offset"], ours["bytes"]) == (theirs.data_offset, theirs.n_bytes)
    assert header["metadata"]["llama.block_count"] == 30
    assert header["metadata"]["tokenizer.ggml.tokens"]["length"] == 49152
