"""int8/int4/int2_channel against compressed-tensors' rule, written again with numpy.

Its symmetric min-max observer: scale = max|w| / ((2^b - 1) / 2) in float32, a zero scale replaced by the
epsilon of float32; code = round_half_even(clamp(w / scale, -2^(b-1), 2^(b-1) - 1)); decoded as code * scale.
"""

import numpy as np
import pytest

import libqat
from libqat import _core

BITS = [8, 4, 2]


def rule(w, bits):
    half_range = np.float32((2**bits - 1) / 2)
    scale = np.abs(w).max(axis=1, keepdims=True) / half_range
    scale = np.where(scale == 0, np.finfo(np.float32).eps, scale)
    codes = np.rint(np.clip(w / scale, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1))
    return codes.astype(np.int8), scale


def check(w, bits):
    name = f"int{bits}_channel"
    w = np.ascontiguousarray(w, np.float32)
    codes, scale = rule(w, bits)
    s = _core.grid_choose(name, w)
    np.testing.assert_array_equal(s.reshape(-1, 1), scale)
    np.testing.assert_array_equal(_core.grid_encode(name, w, s), codes)
    stored = _core.grid_store(name, s, w.shape[1])
    np.testing.assert_array_equal(stored, s)  # float32 holds it as it is
    w_hat = codes.astype(np.float32) * scale
    for reference in (False, True):
        got = _core.grid_fake_quantize(name, w, reference=reference)
        np.testing.assert_array_equal(got.view(np.uint32), w_hat.view(np.uint32))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n", [1, 3, 7, 8, 9, 31, 64, 100, 577])
def test_random_rows_of_any_length(bits, n):
    rng = np.random.default_rng(n)
    magnitude = np.exp2(rng.uniform(-150, 120, (2000, 1))).astype(np.float32)
    check(rng.standard_normal((2000, n), np.float32) * magnitude, bits)


@pytest.mark.parametrize("bits", BITS)
def test_ties_equal_maxima_zeros_and_subnormals(bits):
    rng = np.random.default_rng(bits)
    half_range = (2**bits - 1) / 2
    ties = rng.integers(-(2**bits), 2**bits, (5000, 40)) / 2  # with scale 1, every second one is a tie
    ties[:, 13] = half_range
    check(np.clip(ties, -half_range, half_range) * np.exp2(rng.integers(-100, 100, (5000, 1))), bits)
    check(np.where(rng.random((100, 40)) < 0.5, 1.0, -1.0), bits)
    check(np.array([[0.0] * 9, [-0.0] * 9, [2.0**-149] * 9, [2.0**-149] + [0.0] * 8, [2.0**-126] * 9]), bits)
    check(rng.integers(-9, 10, (5000, 17)) * 2.0**-149, bits)


@pytest.mark.parametrize("bits", BITS)
def test_the_largest_scale_keeps_levels_within_bfloat16(bits):
    name = f"int{bits}_channel"
    limit = np.float32(3.3895313892515355e38) / np.float32(2 ** (bits - 1))
    s = np.array([[[limit]]], np.float32)
    np.testing.assert_array_equal(_core.grid_store(name, s, 4), s)
    with pytest.raises(libqat.NumericError, match="beyond its stored type"):
        _core.grid_store(name, np.nextafter(s, np.float32(np.inf)), 4)
    with pytest.raises(libqat.NumericError, match="beyond its stored type"):
        _core.grid_fake_quantize(name, np.full((1, 4), np.finfo(np.float32).max, np.float32))
