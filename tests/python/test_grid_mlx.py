"""The MLX grids against mx.quantize and mx.dequantize: scales, biases, packed codes and weights."""

import mlx.core as mx
import numpy as np
import pytest
from libqat.grids import grids

from libqat import _core

NAMES = [name for name in grids() if name.startswith("mlx")]
DTYPES = {"": mx.float32, "@fp16": mx.float16, "@bf16": mx.bfloat16}
WIDTH = 768


def to_dtype(w, suffix):
    """w, rounded to the dtype of a grid's suffix, as an MLX array and as float32."""
    array = mx.array(w).astype(DTYPES[suffix])
    return array, np.array(array.astype(mx.float32))


def weights():
    """Rows of many magnitudes and of what no random draw finds, within float16."""
    rng = np.random.default_rng(5)
    w = rng.standard_normal((64, WIDTH)) * np.exp2(rng.integers(-24, 6, (64, 1)))
    w[0] = 0
    w[1] = -0.0
    w[2] = 5.0  # one value: the step is the floor of 1e-7
    w[3] = np.abs(w[3]) + 300
    w[4] = -np.abs(w[4]) - 3
    w[5] = rng.integers(-16, 17, WIDTH) / 2  # ties
    w[6] = rng.integers(-1, 2, WIDTH)  # equal ends
    w[7, 100] = 4000  # one huge value
    w[8] = rng.integers(-9, 10, WIDTH) * 2.0**-24  # float16's subnormals
    w[9] = rng.integers(-9, 10, WIDTH) * 1e-8  # steps near the floor
    w[10] = 1 + rng.integers(0, 3, WIDTH) * 2.0**-10
    return w.astype(np.float32)


def levels(packed, bits):
    """Codes uint8[rows, n] of MLX's dense words, low bits first."""
    stream = np.unpackbits(np.array(packed).view(np.uint8), axis=1, bitorder="little")
    return (stream.reshape(len(stream), -1, bits) << np.arange(bits, dtype=np.uint8)).sum(2)


@pytest.mark.parametrize("suffix", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_scales_biases_codes_and_weights_are_mlxs_own(name, suffix):
    grid = grids()[name]
    array, w = to_dtype(weights(), suffix)
    packed, scales, biases = mx.quantize(array, group_size=grid.block, bits=grid.bits)
    s = _core.grid_choose(name + suffix, w)
    stored = _core.grid_store(name + suffix, s, WIDTH)
    np.testing.assert_array_equal(stored[..., 0], np.array(scales.astype(mx.float32)))
    np.testing.assert_array_equal(stored[..., 1], np.array(biases.astype(mx.float32)))
    codes = _core.grid_encode(name + suffix, w, s)
    np.testing.assert_array_equal(codes.astype(int) - grid.codes[0], levels(packed, grid.bits))
    theirs = mx.dequantize(packed, scales, biases, group_size=grid.block, bits=grid.bits)
    w_hat = np.array(theirs.astype(mx.float32))
    np.testing.assert_array_equal(_core.grid_decode(name + suffix, codes, stored), w_hat)
    for reference in (False, True):
        ours = _core.grid_fake_quantize(name + suffix, w, reference=reference)
        np.testing.assert_array_equal(ours, w_hat)


@pytest.mark.parametrize("suffix", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_any_codes_and_parameters_decode_as_mlx_does(name, suffix):
    grid = grids()[name]
    rng = np.random.default_rng(6)
    shape = (64, WIDTH // grid.block)
    scales, s = to_dtype(rng.standard_normal(shape).astype(np.float32), suffix)
    biases, b = to_dtype((rng.standard_normal(shape) * 9).astype(np.float32), suffix)
    packed = rng.integers(0, 2**32, (64, WIDTH * grid.bits // 32), np.uint32)
    theirs = mx.dequantize(mx.array(packed), scales, biases, group_size=grid.block, bits=grid.bits)
    codes = (levels(packed, grid.bits).astype(int) + grid.codes[0]).astype(np.int8)
    stored = np.stack([s, b], axis=2)
    np.testing.assert_array_equal(stored, _core.grid_store(name + suffix, stored, WIDTH))
    ours = _core.grid_decode(name + suffix, codes, stored)
    np.testing.assert_array_equal(ours, np.array(theirs.astype(mx.float32)))
