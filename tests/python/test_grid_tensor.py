"""Grids with one scale for a tensor, against compressed-tensors' strategy "tensor": operators and file."""

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams
from libqat.grids import grids

import libqat
from libqat import _core

NAMES = [name for name, grid in grids().items() if grid.whole_tensor]
OPTIONS = {"": None, "@bf16:bf16": torch.bfloat16}
OPS = torch.ops.libqat


def latent():
    w = torch.randn(37, 50, generator=torch.Generator().manual_seed(1))
    w[5] *= 7
    w[9] = 0
    return w


def theirs(name, w, dtype):
    """(parameters [P], codes, weights in float32) as the package computes them."""
    args = QuantizationArgs(
        num_bits=grids()[name].bits,
        type="int",
        symmetric=not name.endswith("_asym"),
        strategy="tensor",
        scale_dtype=dtype,
    )
    scale, zero = calculate_qparams(w.amin(), w.amax(), args)
    scale = scale.to(dtype or torch.float32)
    codes = quantize(w, scale, zero, args, dtype=torch.int8)
    parameters = [scale.float(), zero.float()] if name.endswith("_asym") else [scale.float()]
    return torch.cat(parameters), codes, dequantize(codes, scale, zero, args).float()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_the_operators_compute_what_the_package_does(name, options):
    w = latent()
    parameters, codes, w_hat = theirs(name, w, OPTIONS[options])
    grid = name + options
    got_codes, got_scales = OPS.quantize(w, grid, "reference", "w")
    assert got_scales.shape == (1, 1, len(parameters))
    assert torch.equal(got_scales.flatten(), parameters)
    assert torch.equal(got_codes, codes)
    assert torch.equal(OPS.dequantize(got_codes, got_scales, grid, "w"), w_hat)
    assert torch.equal(OPS.fake_quantize(w, grid, "ste", "reference", "w"), w_hat)
    x = torch.eye(50)
    assert torch.equal(OPS.quantized_linear(x, w, None, grid, "ste", "reference", "w"), w_hat.t())
    indices = torch.tensor([[5, 0], [5, 36]])
    rows = OPS.quantized_embedding(indices, w, -1, grid, "ste", "reference", "w")
    assert torch.equal(rows, w_hat[indices])


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_keeps_one_scale_and_gives_the_weights_back(name, tmp_path):
    w = latent().reshape(37, 2, 25)
    path = tmp_path / "w.qat.safetensors"
    checkpoint = _core.freeze_tensors([("w", w)], {"w": name})
    libqat.save(checkpoint, path)
    assert libqat.verify(path, checkpoint) == []
    parameters, _, w_hat = theirs(name, latent(), None)
    loaded = libqat.load(path)
    assert torch.equal(loaded.weight("w"), w_hat.reshape(37, 2, 25))
    assert loaded.quantized["w"].scales.shape == (1, 1, len(parameters))


def test_the_clipped_estimator_masks_by_the_tensors_scale():
    w = latent()
    grad = torch.ones_like(w)
    masked = OPS.fake_quantize_backward(grad, w, "int2_tensor", "clipped_ste", "reference", "w")
    position = w / (w.abs().max() / 1.5)
    # The border is widened by 2^-20; no weight of this seed lies that close to it.
    assert torch.equal(masked, ((position >= -2) & (position <= 1)).float())
    indices = torch.tensor([5, 5, 2])
    got = OPS.quantized_embedding_backward(
        torch.ones(3, 50), indices, w, -1, "int2_tensor", "clipped_ste", "reference", "w"
    )
    expected = torch.zeros_like(w)
    expected[5], expected[2] = 2 * masked[5], masked[2]
    assert torch.equal(got, expected)


@pytest.mark.parametrize(("value", "words"), [(np.nan, "not finite"), (3.4e38, "beyond its stored type")])
def test_an_error_names_the_row_of_the_tensor(value, words):
    w = latent()
    w[23, 4] = value
    for call in (
        lambda: OPS.fake_quantize(w, "int8_tensor", "ste", "reference", "layer.w"),
        lambda: OPS.quantize(w, "int8_tensor", "reference", "layer.w"),
        lambda: OPS.quantized_embedding(
            torch.tensor([0]), w, -1, "int8_tensor", "ste", "reference", "layer.w"
        ),
    ):
        with pytest.raises(libqat.NumericError, match=rf"layer\.w: row 23 .*{words}"):
            call()
