"""What becomes of dequantized weights that a program quantizes again, counted against ggml's own code."""

import ctypes
import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import make_llama
from exporting import DTYPES, checkpoint_of, hf_name, read_folder, rows_as_trained, with_dtypes

import libqat
from libqat import _core


def ggml_quantize(weights, grid):
    """ggml's own blocks of a float32 matrix, [blocks, bytes]."""
    package = pytest.importorskip("libggml", reason="needs libggml-python: pip install libggml-python")
    library = ctypes.CDLL(str(Path(package.__file__).parent / "lib64" / "libggml-base.so"))
    quantize = getattr(library, f"quantize_row_{grid}_ref")
    quantize.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    values = np.ascontiguousarray(weights, np.float32)
    blocks = np.empty((values.size // 32, {"q4_0": 18, "q4_1": 20, "q8_0": 34}[grid]), np.uint8)
    quantize(values.ctypes.data, blocks.ctypes.data, values.size)
    return blocks


def shipped_blocks(checkpoint, folder):
    """What the GGUF of the checkpoint holds, in the row order of training."""
    import gguf

    libqat.export(checkpoint, folder / "a.gguf")
    blocks = {}
    for tensor in gguf.GGUFReader(folder / "a.gguf").tensors:
        rows = np.array(tensor.data)
        heads = {"attn_q": 4, "attn_k": 2}.get(tensor.name.split(".")[-2])
        blocks[hf_name(tensor.name)] = rows_as_trained(rows, heads) if heads else rows
    return blocks


def spoil(checkpoint):
    """Takes the code -8 from some blocks and gives others a scale that is not their rule's."""
    key = "model.layers.0.mlp.up_proj.weight"
    checkpoint.quantized[key].codes[::3].clamp_(min=-7)
    checkpoint.quantized["model.layers.1.mlp.up_proj.weight"].scales[5:9].mul_(2)


@pytest.mark.parametrize("grid", ["q4_0", "q4_1", "q8_0"])
@pytest.mark.parametrize("spoiled", [False, True])
@with_dtypes
def test_the_report_counts_the_blocks_that_ggml_would_change(tmp_path, grid, spoiled, dtype):
    checkpoint = checkpoint_of(make_llama(), grid=grid, embedding=grid)
    if spoiled and grid == "q4_0":
        spoil(checkpoint)
    shipped = shipped_blocks(checkpoint, tmp_path)
    libqat.export(checkpoint, tmp_path / "out", target="hf", dtype=dtype)
    written = read_folder(tmp_path / "out")
    report = libqat.requantization_report(checkpoint, dtype)
    assert [row.tensor for row in report] == sorted(checkpoint.quantized)
    for row in report:
        blocks = ggml_quantize(written[row.tensor].float().numpy(), grid)
        ours = shipped[row.tensor].reshape(blocks.shape)
        assert row.changed_blocks == int((blocks != ours).any(1).sum()), row.tensor
        assert row.blocks == len(blocks)
        exact = _core.dequantize(checkpoint)[row.tensor]
        assert row.rounded_weights == int((exact.to(DTYPES[dtype]).float() != exact).sum())
    if not spoiled and grid == "q4_0" and dtype != "bfloat16":
        assert all(row.exact for row in report)
    if spoiled and grid == "q4_0":
        changed = {row.tensor: row.changed_blocks for row in report if not row.exact}
        assert (
            changed["model.layers.0.mlp.up_proj.weight"] >= 43 * 2 * 0.9
        )  # every third row of 128, 2 blocks
    if grid == "q4_0" and dtype == "bfloat16":
        # A scale of 11 bits is one of 8 bits once in eight times.
        assert 0.8 < sum(r.changed_blocks for r in report) / sum(r.blocks for r in report) < 0.95


@pytest.mark.parametrize(("grid", "bits"), [("int8_channel", 8), ("int4_channel", 4), ("int2_channel", 2)])
def test_channel_grids_against_their_formula(grid, bits):
    checkpoint = checkpoint_of(make_llama(), grid=grid, embedding="f32")
    for row in libqat.requantization_report(checkpoint):
        codes, scales = (getattr(checkpoint.quantized[row.tensor], name) for name in ("codes", "scales"))
        weights = codes.float() * scales[:, :, 0]
        again = weights.abs().amax(1) / ((2**bits - 1) / 2)
        quotient = (weights / again[:, None]).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        changed = (again != scales[:, 0, 0]) | (quotient != codes).any(1)
        assert row.changed_blocks == int(changed.sum())
        assert row.blocks == len(codes)
        # The rule wants the greatest weight at (2^bits - 1) / 2 scales, which is no code.
        assert row.changed_blocks == row.blocks


def test_exactness_can_be_required(tmp_path):
    checkpoint = checkpoint_of(make_llama())
    libqat.export(checkpoint, tmp_path / "good", target="hf", require_exact=True)
    manifest = json.loads((tmp_path / "good" / "libqat.json").read_text())
    assert manifest["requantizes_exactly"] is True
    assert "were trained: exact." in (tmp_path / "good" / "README.md").read_text()
    spoil(checkpoint)
    with pytest.raises(libqat.UnsupportedError) as caught:
        libqat.export(checkpoint, tmp_path / "bad", target="hf", require_exact=True)
    message = str(caught.value)
    assert "model.layers.0.mlp.up_proj.weight (" in message
    assert "model.layers.1.mlp.up_proj.weight" not in message, "a doubled scale is still its block's own"
    assert os.listdir(tmp_path) == ["good"]
    libqat.export(checkpoint, tmp_path / "bad", target="hf")
    manifest = json.loads((tmp_path / "bad" / "libqat.json").read_text())
    assert (manifest["exact"], manifest["requantizes_exactly"]) == (True, False)
    [changed] = [key for key, row in manifest["tensors"].items() if row["changed_blocks"]]
    assert changed == "model.layers.0.mlp.up_proj.weight"
    header = _core.read_safetensors_header(tmp_path / "bad" / "model.safetensors")["metadata"]
    assert header["format"] == "pt"
    assert header["libqat.requantization"].endswith("blocks change, in 1 of 15 tensors")
