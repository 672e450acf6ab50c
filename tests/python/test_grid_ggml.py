"""The ggml grids against ggml's own C code: codes, packed blocks and decoded weights, bit for bit."""

import ctypes
from pathlib import Path

import numpy as np
import pytest

import libqat
from libqat import _core

libggml = pytest.importorskip("libggml", reason="needs libggml-python: pip install libggml-python")

BLOCKS = {
    "q4_0": (32, 18),
    "q4_1": (32, 20),
    "q5_0": (32, 22),
    "q5_1": (32, 24),
    "q8_0": (32, 34),
    "q2_0": (64, 18),
    "q1_0": (128, 18),
    "tq1_0": (256, 54),
    "tq2_0": (256, 66),
    "mxfp4": (32, 17),
    "nvfp4": (64, 36),
}
"""Weights and bytes of a block."""
GRIDS = list(BLOCKS)


@pytest.fixture(scope="module")
def ggml():
    return ctypes.CDLL(str(next((Path(libggml.__file__).parent / "lib64").glob("libggml-base.so"))))


def pointer(array):
    return array.ctypes.data_as(ctypes.c_void_p)


def ggml_quantize(ggml, name, w):
    weights, size = BLOCKS[name]
    blocks = np.zeros((len(w), w.shape[1] // weights * size), np.uint8)
    ggml[f"quantize_row_{name}_ref"](pointer(w), pointer(blocks), ctypes.c_int64(w.size))
    return blocks


def ggml_dequantize(ggml, name, blocks):
    weights, size = BLOCKS[name]
    w_hat = np.zeros((len(blocks), blocks.shape[1] // size * weights), np.float32)
    ggml[f"dequantize_row_{name}"](pointer(blocks), pointer(w_hat), ctypes.c_int64(w_hat.size))
    return w_hat


def differing(a, b):
    return int(np.count_nonzero(a.view(np.uint32) != b.view(np.uint32)))


def check(ggml, name, w):
    """Zero differences between ours and ggml's for the rows w."""
    w = np.ascontiguousarray(w, np.float32)
    blocks = ggml_quantize(ggml, name, w)
    s = _core.grid_choose(name, w)
    codes = _core.grid_encode(name, w, s)
    stored = _core.grid_store(name, s, w.shape[1])
    assert np.count_nonzero(_core.ggml_pack(name, codes, stored) != blocks) == 0
    their_codes, their_stored = _core.ggml_unpack(name, blocks)
    assert np.count_nonzero(their_codes != codes) == 0
    assert differing(their_stored, stored) == 0
    w_hat = ggml_dequantize(ggml, name, blocks)
    assert differing(_core.grid_decode(name, codes, stored), w_hat) == 0
    assert differing(_core.grid_fake_quantize(name, w), w_hat) == 0


def blocks_of_kind(kind, rng, n, width):
    """n blocks of `width` weights whose scales fit fp16 in every grid."""
    # 2^12 * 6 sigma < 65504; 2^-150 is below the least subnormal.
    magnitude = np.exp2(rng.uniform(-150, 12, (n, 1))).astype(np.float32)
    normal = rng.standard_normal((n, width), np.float32)
    if kind == "weights":  # the size that real weights have
        return normal * np.float32(0.05)
    if kind == "magnitudes":
        return normal * magnitude
    if kind == "sparse":
        return np.where(rng.random((n, width)) < 0.9, np.copysign(np.float32(0), normal), normal * magnitude)
    if kind == "ties":  # halves of a step: rounding decides, and the largest magnitude often comes twice
        step = np.exp2(rng.integers(-149, 10, (n, 1))).astype(np.float32)
        return rng.integers(-16, 17, (n, width)).astype(np.float32) * step / 2
    if kind == "near ties":  # one unit in the last place beside a tie
        tied = rng.integers(-16, 17, (n, width)).astype(np.float32) * magnitude
        return np.nextafter(tied, np.copysign(np.float32(np.inf), normal))
    if kind == "opposite":  # equal magnitudes of both signs
        return np.where(normal < 0, -magnitude, magnitude)
    if kind == "offset":  # a narrow range far from zero
        return np.minimum(magnitude * 8, 60000) + normal * np.exp2(rng.uniform(-20, 0, (n, 1))).astype(
            np.float32
        )
    if kind == "bits":  # any bit pattern within fp16's range
        w = rng.integers(0, 2**32, (n, width), np.uint32).view(np.float32)
        return np.where(np.abs(w) <= 65504, w, np.float32(1))
    assert kind == "subnormal"
    bits = rng.integers(0, 2 ** rng.integers(1, 25, (n, 1)), (n, width)).astype(np.uint32)
    return (bits | rng.integers(0, 2, (n, width), np.uint32) << 31).view(np.float32)


KINDS = ["weights", "magnitudes", "sparse", "ties", "near ties", "opposite", "offset", "bits", "subnormal"]


def within_ggml(name, w):
    """w: [blocks, width], changed where ggml's rule is undefined (mxfp4) or saturates (nvfp4)."""
    largest = np.abs(w).max(1, keepdims=True)
    if name == "mxfp4":  # smaller ones give the byte an exponent below 0
        return np.where(largest < 2.0**-125, w * 0, w)
    if name == "nvfp4":  # 448 is the largest scale
        return np.where(largest > 6 * 448, w / 32, w)
    return w


# 9 kinds of 13 000 blocks: more than 10^5 of each grid.
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", GRIDS)
def test_many_blocks_equal_ggml(ggml, name, kind):
    width, _ = BLOCKS[name]
    rng = np.random.default_rng(KINDS.index(kind))
    w = within_ggml(name, blocks_of_kind(kind, rng, 13_000, width).astype(np.float32))
    check(ggml, name, w.reshape(-1, 10 * width))  # rows of ten blocks: the path that training takes


@pytest.mark.parametrize("name", GRIDS)
def test_hand_made_blocks_equal_ggml(ggml, name):
    width, _ = BLOCKS[name]
    tiny, least = np.float32(2**-149), np.float32(2**-126)
    rows = []
    for value in [0.0, -0.0, 1.0, tiny, least, 2.0**-128, 2.0**-125, 2.0**-24, 65504.0, 65519.99]:
        alone = np.eye(1, width, width - 1)[0] * value
        for row in (np.full(width, value), alone, np.resize([value, -value], width)):
            rows += [row, -row]
    mixed_zeros = np.resize([0.0, -0.0], width)
    rows += [mixed_zeros, -mixed_zeros, np.linspace(-1, 1, width), np.arange(width) / 2 - width / 4]
    check(ggml, name, within_ggml(name, np.array(rows, np.float32)))


DIVISORS = {
    "q4_0": 8,
    "q4_1": 15,
    "q5_0": 16,
    "q5_1": 31,
    "q8_0": 127,
    "q2_0": 1,
    "q1_0": 128,
    "tq1_0": 1,
    "tq2_0": 1,
}
"""Of the grids with fp16 scales: what the largest weight, alone in its block, is divided by."""


@pytest.mark.parametrize("name", DIVISORS)
def test_the_error_begins_where_ggml_writes_an_infinite_scale(ggml, name):
    border = np.float32(65520 * DIVISORS[name])
    at = slice(-2, None) if name.startswith("tq") else slice(2)
    for largest in (np.nextafter(border, np.float32(0)), border, np.nextafter(border, np.float32(np.inf))):
        w = np.zeros((1, BLOCKS[name][0]), np.float32)
        w[0, 7] = largest
        scale = ggml_quantize(ggml, name, w)[0, at].view(np.float16)[0]
        if np.isinf(scale):
            with pytest.raises(libqat.NumericError):
                _core.grid_fake_quantize(name, w)
        else:
            check(ggml, name, w)


def test_nvfp4_refuses_what_ggml_saturates(ggml):
    w = np.zeros((3, 64), np.float32)
    w[:, 20] = (6 * 448, 6 * 464, np.nextafter(np.float32(6 * 464), np.float32(np.inf)))
    check(ggml, "nvfp4", w[:2])  # 448 is the nearest scale, and ggml's
    assert ggml_quantize(ggml, "nvfp4", w)[2, 1] == 0x7E
    with pytest.raises(libqat.NumericError, match=r"row 2: .*beyond its stored type"):
        _core.grid_fake_quantize("nvfp4", w)


def test_mxfp4_below_and_above_ggml_s_exponents(ggml):
    """Where ggml's exponent leaves its byte, the nearest legal scale is used; where 6 s is infinite, none."""
    w = np.zeros((4, 32), np.float32)
    w[:, 3] = np.exp2(np.float32([-125, -126, -127, -140]))
    w[:, 4] = -w[:, 3] / 2
    codes = _core.grid_encode("mxfp4", w, _core.grid_choose("mxfp4", w))
    assert codes[:, 3:5].tolist() == [[6, 12], [4, 10], [2, 9], [0, 0]]  # 4, 2, 1, 0 times 2^-127
    stored = _core.grid_store("mxfp4", _core.grid_choose("mxfp4", w), 32)
    assert (stored == np.float32(2.0**-127)).all()
    blocks = _core.ggml_pack("mxfp4", codes, stored)
    assert differing(_core.grid_decode("mxfp4", codes, stored), ggml_dequantize(ggml, "mxfp4", blocks)) == 0
    w[2] = np.nextafter(np.float32(np.inf), np.float32(0))
    with pytest.raises(libqat.NumericError, match=r"row 2: .*beyond its stored type"):
        _core.grid_fake_quantize("mxfp4", w)


def test_the_exponent_of_mxfp4_is_that_of_a_rounded_logarithm(ggml):
    """A float few units below a power of two has that power's logarithm, in float32."""
    powers = np.exp2(np.arange(-124, 128, dtype=np.float32)).view(np.uint32)
    near = (powers[:, None] + np.arange(-60, 10).astype(np.uint32)).view(np.float32).reshape(-1, 1)
    w = np.zeros((len(near), 32), np.float32)
    w[:, 31:] = near
    check(ggml, "mxfp4", w)


HALVES = {"q4_1": (1, 3), "q5_1": (1, 3), "tq1_0": (53,), "tq2_0": (65,)}
"""The upper bytes of the fp16 fields of a block, where it is not byte 1 alone."""


@pytest.mark.parametrize("name", GRIDS)
def test_any_block_of_a_file_decodes_as_in_ggml(ggml, name):
    """Also blocks that no quantizer writes: q8_0's -128, q2_0's 2, subnormal and negative scales."""
    rng = np.random.default_rng(9)
    blocks = rng.integers(0, 256, (100_000, BLOCKS[name][1]), np.uint8)
    if name == "mxfp4":
        blocks[:, 0] = np.minimum(blocks[:, 0], 252)  # 6 s is finite
    elif name == "nvfp4":
        blocks[:, :4] -= blocks[:, :4] & 0x7F == 0x7F  # no NaN
    else:
        for high in HALVES.get(name, (1,)):
            blocks[:, high] = np.where(blocks[:, high] & 0x7C == 0x7C, 0x3C, blocks[:, high])
    codes, stored = _core.ggml_unpack(name, blocks)
    assert np.isfinite(stored).all()
    assert differing(_core.grid_store(name, stored, codes.shape[1]), stored) == 0
    w_hat = ggml_dequantize(ggml, name, blocks)
    assert differing(_core.grid_decode(name, codes, stored), w_hat) == 0
    again = _core.ggml_pack(name, codes, stored)
    if name == "tq1_0":  # 13 bytes are no packing of five digits
        assert differing(ggml_dequantize(ggml, name, again), w_hat) == 0
    else:
        if name == "nvfp4":  # ggml does not look at the sign bits of scales
            blocks[:, :4] &= 0x7F
        assert np.count_nonzero(again != blocks) == 0
