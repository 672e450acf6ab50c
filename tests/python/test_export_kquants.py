"""A GGUF of ggml's K-quants: packed, verified, decoded by gguf and ggml, run by llama.cpp."""

import ctypes
import re
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import make_llama
from exporting import (
    VOCAB_SIZE,
    checkpoint_of,
    hf_name,
    log_probabilities,
    model_of,
    read_by_gguf_py,
    relative_error,
    rows_as_trained,
)

import libqat
from libqat import _core, llama_cpp

GRIDS = ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k"]
FILE_TYPES = {"q2_k": 10, "q3_k": 11, "q4_k": 14, "q5_k": 16, "q6_k": 18}
# Every width is a multiple of 256; the spread lets log-probabilities differ between tokens.
SETTINGS = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 512,
    "initializer_range": 0.05,
}
MIXED = {
    "model.layers.0.self_attn.q_proj.weight": "q2_k",
    "model.layers.0.self_attn.k_proj.weight": "q3_k",
    "model.layers.0.self_attn.v_proj.weight": "q6_k",
    "model.layers.0.mlp.down_proj.weight": "q5_k",
    "model.layers.1.mlp.down_proj.weight": "q4_0",
    "model.layers.1.mlp.up_proj.weight": "f16",
}
# llama.cpp rounds the input of a K-quant's product to 8 bits in blocks of 256, whose greatest of normal
# numbers is about 2.8 times their rms: a relative error of 2.8 / 127 / sqrt(12) = 0.64 % for each of about 15
# products, which add up as sqrt(15) * 0.64 % = 2.5 % of the spread of the log-probabilities. Twice that is
# allowed.
BOUND = 0.05


def bits(values):
    return np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)


def differing(file, checkpoint):
    """Weights of the file that differ from the checkpoint's, over all tensors."""
    weights = _core.dequantize(checkpoint)
    return sum(int((bits(values) != bits(weights[key].numpy())).sum()) for key, values in file.items())


def read_by_ggml(path):
    """state_dict key -> float32 array, of the K-quants in the file, by ggml's own decoder."""
    package = pytest.importorskip("libggml", reason="needs libggml-python: pip install libggml-python")
    library = ctypes.CDLL(str(Path(package.__file__).parent / "lib64" / "libggml-base.so"))
    tensors = {}
    for tensor in gguf.GGUFReader(path).tensors:
        if not tensor.tensor_type.name.endswith("_K"):
            continue
        shape = tensor.shape.tolist()[::-1]
        raw = np.ascontiguousarray(tensor.data)
        values = np.empty(shape, np.float32)
        decode = library[f"dequantize_row_{tensor.tensor_type.name[:-1].lower()}K"]
        decode(*(ctypes.c_void_p(array.ctypes.data) for array in (raw, values)), ctypes.c_int64(values.size))
        heads = {"attn_q": 4, "attn_k": 2}.get(tensor.name.split(".")[-2])
        tensors[hf_name(tensor.name)] = rows_as_trained(values, heads) if heads else values
    return tensors


@pytest.mark.parametrize("grid", [*GRIDS, "mixed"])
def test_the_file_holds_the_trained_weights_and_llama_cpp_runs_them(tmp_path, tokenizer_folder, grid):
    grids = MIXED if grid == "mixed" else {}
    common = "q4_k" if grid == "mixed" else grid
    embedding = "q6_k" if grid == "mixed" else grid
    checkpoint = checkpoint_of(
        make_llama(**SETTINGS), grid=common, embedding=embedding, tokenizer=tokenizer_folder, grids=grids
    )
    path = tmp_path / "a.gguf"
    libqat.export(checkpoint, path)
    assert libqat.verify(path, checkpoint) == []

    file = read_by_gguf_py(path)
    assert differing({key: values for key, (_, values) in file.items()}, checkpoint) == 0
    kinds = {"F32", common.upper(), embedding.upper()} | {name.upper() for name in grids.values()}
    assert {kind for kind, _ in file.values()} == kinds
    by_ggml = read_by_ggml(path)
    assert len(by_ggml) == sum(kind.endswith("_K") for kind, _ in file.values())
    assert differing(by_ggml, checkpoint) == 0
    fields = gguf.GGUFReader(path).fields
    assert fields["general.file_type"].contents() == FILE_TYPES[common]

    if not llama_cpp.available():
        pytest.skip("needs xllamacpp: pip install xllamacpp")
    ids = torch.randint(VOCAB_SIZE, (16,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = log_probabilities(model_of(checkpoint, **SETTINGS), ids)
    assert relative_error(llama_cpp.score(path, ids), expected) < BOUND


def test_a_changed_sub_scale_is_found(tmp_path, tokenizer_folder):
    checkpoint = checkpoint_of(
        make_llama(**SETTINGS), grid="q4_k", embedding="q6_k", tokenizer=tokenizer_folder
    )
    path = tmp_path / "a.gguf"
    libqat.export(checkpoint, path)
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.ffn_up.weight")
    raw = bytearray(path.read_bytes())
    raw[tensor.data_offset + 144 + 4] ^= 1  # a sub-scale of the second block, which is the second row
    path.write_bytes(raw)
    differences = [str(difference) for difference in libqat.verify(path, checkpoint)]
    assert any(
        re.match(r"model\.layers\.1\.mlp\.up_proj\.weight: scales: 1 \(row 1,", d) for d in differences
    )


@pytest.mark.parametrize("grid", GRIDS)
def test_a_checkpoint_keeps_both_levels(tmp_path, grid):
    weight = torch.randn(3, 512, generator=torch.Generator().manual_seed(0))
    checkpoint = _core.freeze_tensors([("w", weight)], {"w": grid})
    libqat.save(checkpoint, tmp_path / "a.qat.safetensors")
    loaded = libqat.load(tmp_path / "a.qat.safetensors")
    weights = _core.dequantize(loaded)["w"]
    assert torch.equal(weights, torch.ops.libqat.fake_quantize(weight, grid))
    assert libqat.verify(tmp_path / "a.qat.safetensors", checkpoint) == []


@pytest.mark.parametrize("grid", GRIDS)
def test_widths_that_are_no_multiple_of_256_are_refused(grid):
    with pytest.raises(libqat.Error, match=r"256"):
        _core.freeze_tensors([("w", torch.zeros(2, 576))], {"w": grid})
