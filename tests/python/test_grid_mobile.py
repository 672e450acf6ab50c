"""Gemma's mobile grids against ai-edge-quantizer's min-max rule, written again with numpy.

scale = max(max|w|, 1e-9) / (2^(b-1) - 1) in float32, blockwise rounded to bfloat16 and then float16; code =
clip(rint(w / scale)), of 8 bits from -127 on; decoded as code * scale, in the type of the scale that the
consumer casts it to.
"""

import numpy as np
import pytest
import torch

import libqat
from libqat import _core

BITS = [8, 4, 2]
WIDTH = 512


def rule(w, bits, blockwise):
    most = 2 ** (bits - 1) - 1
    scale = np.maximum(np.abs(w).max(axis=1, keepdims=True), np.float32(1e-9)) / np.float32(most)
    if blockwise:
        scale = torch.from_numpy(scale).bfloat16().half().float().numpy()
    codes = np.clip(np.rint(w / scale), -127 if bits == 8 else -most - 1, most)
    return codes, scale


def weights(span):
    rng = np.random.default_rng(span)
    w = rng.standard_normal((200, WIDTH)) * np.exp2(rng.integers(-span, 12, (200, 1)))
    w[0] = rng.integers(-14, 15, WIDTH) / 2  # ties
    w[1, 3] = 1000  # one huge value
    w[2] = np.where(rng.random(WIDTH) < 0.5, 1.0, -1.0)
    return w.astype(np.float32)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("suffix", "block", "blockwise"),
    [("", WIDTH, False), ("_g256", 256, False), ("_g256@bf16_fp16", 256, True)],
)
def test_scales_and_codes_are_the_quantizers_own(bits, suffix, block, blockwise):
    w = weights(6 if blockwise else 60)  # float16's normal scales reach down to 2^-14
    if not blockwise:
        w[3] = 0
        w[4] = 2.0**-149
        w[5] = 1e-10
    codes, scale = rule(w.reshape(-1, block), bits, blockwise)
    name = f"mobile{bits}{suffix}"
    s = _core.grid_choose(name, w)
    stored = _core.grid_store(name, s, WIDTH)
    np.testing.assert_array_equal(stored.reshape(-1, 1), scale)
    np.testing.assert_array_equal(_core.grid_encode(name, w, s), codes.reshape(w.shape))
    w_hat = (codes.astype(np.float32) * scale).reshape(w.shape)
    for reference in (False, True):
        np.testing.assert_array_equal(_core.grid_fake_quantize(name, w, reference=reference), w_hat)


@pytest.mark.parametrize("options", ["", "@fp16", "@bf16", "@bf16_fp16", "@pow2", "@fp16:fp16"])
@pytest.mark.parametrize("name", ["mobile8", "mobile4", "mobile2_g256"])
def test_no_row_gets_a_scale_that_is_not_positive_and_normal(name, options):
    w = np.zeros((4, WIDTH), np.float32)
    w[1] = -0.0
    w[2] = 2.0**-149
    w[3] = 1e-9
    stored = _core.grid_store(name + options, _core.grid_choose(name + options, w), WIDTH)
    least = np.finfo(np.float16 if "fp16" in options else np.float32).tiny
    assert (stored >= least).all()
    np.testing.assert_array_equal(_core.grid_fake_quantize(name + options, w)[:3], 0)


def test_a_learned_scale_of_8_bits_never_picks_the_code_that_kernels_lack():
    w = np.full((1, 32), -9.0, np.float32)
    s = np.full((1, 1, 1), 0.01, np.float32)
    np.testing.assert_array_equal(_core.grid_encode("mobile8", w, s), -127)
    np.testing.assert_array_equal(_core.grid_encode("mobile4", w, s), -8)
    codes = np.full((1, 32), -128, np.int8)  # a file may hold it
    np.testing.assert_array_equal(_core.grid_decode("mobile8", codes, s), np.float32(-1.28))


@pytest.mark.parametrize(("options", "dtype"), [(":bf16", torch.bfloat16), (":fp16", torch.float16)])
def test_the_product_is_that_of_the_consumers_type(options, dtype):
    """transformers casts the float32 scale to the activations' type and multiplies in it."""
    grid = "mobile4@" + options[1:] + options
    w = torch.from_numpy(weights(6))
    codes, scales = libqat.ops.quantize(w, grid)
    theirs = codes.to(dtype) * scales[:, 0].to(dtype)
    assert torch.equal(libqat.ops.dequantize(codes, scales, grid), theirs.float())
