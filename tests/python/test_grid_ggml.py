"""The ggml grids against ggml's own C code: codes, packed blocks and decoded weights, bit for bit."""

import ctypes
from pathlib import Path

import numpy as np
import pytest

import libqat
from libqat import _core

libggml = pytest.importorskip("libggml", reason="needs libggml-python: pip install libggml-python")

BLOCKS = {"q4_0": (32, 18), "q4_1": (32, 20), "q8_0": (32, 34), "q2_0": (64, 18)}
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


# 9 kinds of 120 000 blocks of 32: more than a million. Of wider blocks, as many weights.
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", GRIDS)
def test_a_million_blocks_equal_ggml(ggml, name, kind):
    width, _ = BLOCKS[name]
    rng = np.random.default_rng(KINDS.index(kind))
    w = blocks_of_kind(kind, rng, 120_000 * 32 // width, width)
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
    check(ggml, name, np.array(rows, np.float32))


@pytest.mark.parametrize(("name", "divisor"), [("q4_0", 8), ("q4_1", 15), ("q8_0", 127), ("q2_0", 1)])
def test_the_error_begins_where_ggml_writes_an_infinite_scale(ggml, name, divisor):
    border = np.float32(65520 * divisor)
    for largest in (np.nextafter(border, np.float32(0)), border, np.nextafter(border, np.float32(np.inf))):
        w = np.zeros((1, BLOCKS[name][0]), np.float32)
        w[0, 7] = largest
        scale = ggml_quantize(ggml, name, w)[0, :2].view(np.float16)[0]
        if np.isinf(scale):
            with pytest.raises(libqat.NumericError):
                _core.grid_fake_quantize(name, w)
        else:
            check(ggml, name, w)


@pytest.mark.parametrize("name", GRIDS)
def test_any_block_of_a_file_decodes_as_in_ggml(ggml, name):
    """Also blocks that no quantizer writes: q8_0's -128, q2_0's 2, subnormal and negative scales."""
    rng = np.random.default_rng(9)
    blocks = rng.integers(0, 256, (100_000, BLOCKS[name][1]), np.uint8)
    for high_byte in (1, 3) if name == "q4_1" else (1,):
        blocks[:, high_byte] = np.where(blocks[:, high_byte] & 0x7C == 0x7C, 0x3C, blocks[:, high_byte])
    codes, stored = _core.ggml_unpack(name, blocks)
    assert np.isfinite(stored).all()
    assert differing(_core.grid_decode(name, codes, stored), ggml_dequantize(ggml, name, blocks)) == 0
    assert np.count_nonzero(_core.ggml_pack(name, codes, stored) != blocks) == 0
