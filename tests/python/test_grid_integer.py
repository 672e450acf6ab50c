"""The integer grids against compressed-tensors' rule, written again with numpy.

Its symmetric min-max observer, for a whole row or for each group of it: scale = max|w| / ((2^b - 1) / 2) in
float32, a zero scale replaced by the epsilon of float32; code = round_half_even(clamp(w / scale, -2^(b-1),
2^(b-1) - 1)); decoded as code * scale.
"""

import numpy as np
import pytest

import libqat
from libqat import _core

BITS = [8, 4, 3, 2]
GROUPS = [32, 64, 128, 256]


def rule(w, bits):
    """Codes and scales [rows, 1] of rows that share one scale each."""
    half_range = np.float32((2**bits - 1) / 2)
    scale = np.abs(w).max(axis=1, keepdims=True) / half_range
    scale = np.where(scale == 0, np.finfo(np.float32).eps, scale)
    codes = np.rint(np.clip(w / scale, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1))
    return codes.astype(np.int8), scale


def check(w, bits, group=None):
    """The grid of that width and group (None: the row) computes the rule on w, bit for bit."""
    name = f"int{bits}_g{group}" if group else f"int{bits}_channel"
    w = np.ascontiguousarray(w, np.float32)
    codes, scale = rule(w.reshape(-1, group or w.shape[1]), bits)
    s = _core.grid_choose(name, w)
    np.testing.assert_array_equal(s.reshape(-1, 1), scale)
    np.testing.assert_array_equal(_core.grid_encode(name, w, s), codes.reshape(w.shape))
    stored = _core.grid_store(name, s, w.shape[1])
    np.testing.assert_array_equal(stored, s)  # float32 holds it as it is
    w_hat = (codes.astype(np.float32) * scale).reshape(w.shape)
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
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("groups", [1, 2, 9])
def test_random_rows_of_groups(bits, group, groups):
    rng = np.random.default_rng(group + groups)
    magnitude = np.exp2(rng.uniform(-150, 120, (200, groups, 1))).astype(np.float32)
    w = rng.standard_normal((200, groups, group), np.float32) * magnitude
    check(w.reshape(200, -1), bits, group)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [None, *GROUPS])
def test_ties_equal_maxima_zeros_and_subnormals(bits, group):
    rng = np.random.default_rng(bits)
    half_range = (2**bits - 1) / 2
    width = group or 40
    ties = rng.integers(-(2**bits), 2**bits, (5000, width)) / 2  # with scale 1, every second one is a tie
    ties[:, 13] = half_range
    ties = np.clip(ties, -half_range, half_range) * np.exp2(rng.integers(-100, 100, (5000, 1)))
    check(ties.reshape(-1, 2 * width if group else width), bits, group)
    check(np.where(rng.random((100, width)) < 0.5, 1.0, -1.0), bits, group)
    for value in (0.0, -0.0, 2.0**-149, 2.0**-126):
        check(np.full((2, width), value), bits, group)
    check(np.array([[2.0**-149] + [0.0] * (width - 1)]), bits, group)
    check(rng.integers(-9, 10, (5000, width)) * 2.0**-149, bits, group)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("suffix", ["channel", "g32"])
def test_the_largest_scale_keeps_levels_within_bfloat16(bits, suffix):
    name = f"int{bits}_{suffix}"
    limit = np.float32(3.3895313892515355e38) / np.float32(2 ** (bits - 1))
    s = np.array([[[limit]]], np.float32)
    np.testing.assert_array_equal(_core.grid_store(name, s, 32), s)
    with pytest.raises(libqat.NumericError, match="beyond its stored type"):
        _core.grid_store(name, np.nextafter(s, np.float32(np.inf)), 32)
    with pytest.raises(libqat.NumericError, match="beyond its stored type"):
        _core.grid_fake_quantize(name, np.full((1, 32), np.finfo(np.float32).max, np.float32))
