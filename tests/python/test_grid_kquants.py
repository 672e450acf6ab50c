"""ggml's K-quants against ggml's own C code: packed blocks and decoded weights, bit for bit."""

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch

import libqat
from libqat import _core, ops

libggml = pytest.importorskip("libggml", reason="needs libggml-python: pip install libggml-python")

BYTES = {"q2_k": 84, "q3_k": 110, "q4_k": 144, "q5_k": 176, "q6_k": 210}
NAMES = list(BYTES)
WIDTH = 256
F32 = np.float32


@pytest.fixture(scope="module")
def ggml():
    return ctypes.CDLL(str(next((Path(libggml.__file__).parent / "lib64").glob("libggml-base.so"))))


def pointer(array):
    return array.ctypes.data_as(ctypes.c_void_p)


def spelled(name):
    return name[:-1] + "K"


def ggml_quantize(ggml, name, w):
    blocks = np.zeros((len(w), w.shape[1] // WIDTH * BYTES[name]), np.uint8)
    ggml[f"quantize_row_{spelled(name)}_ref"](pointer(w), pointer(blocks), ctypes.c_int64(w.size))
    return blocks


def ggml_dequantize(ggml, name, blocks):
    w_hat = np.zeros((len(blocks), blocks.shape[1] // BYTES[name] * WIDTH), F32)
    ggml[f"dequantize_row_{spelled(name)}"](pointer(blocks), pointer(w_hat), ctypes.c_int64(w_hat.size))
    return w_hat


def differing(a, b):
    return int(np.count_nonzero(a.view(np.uint32) != b.view(np.uint32)))


def packed(name, w):
    s = _core.grid_choose(name, w)
    codes = _core.grid_encode(name, w, s)
    return _core.ggml_pack(name, codes, _core.grid_store(name, s, w.shape[1]))


def check(ggml, name, w):
    """Zero differences between ours and ggml's for the rows w."""
    w = np.ascontiguousarray(w, F32)
    blocks = ggml_quantize(ggml, name, w)
    assert np.count_nonzero(packed(name, w) != blocks) == 0
    assert differing(_core.grid_fake_quantize(name, w), ggml_dequantize(ggml, name, blocks)) == 0


def blocks_of_kind(kind, rng, n):
    """n blocks whose scales fit fp16 in every K-quant."""
    shape = (n, WIDTH)
    magnitude = np.exp2(rng.uniform(-150, 12, (n, 1))).astype(F32)
    of_sub_block = np.exp2(rng.uniform(-40, 8, (n, 16))).astype(F32).repeat(16, 1)
    normal = rng.standard_normal(shape, F32)
    match kind:
        case "weights":  # the size that real weights have
            return normal * F32(0.05)
        case "magnitudes":
            return normal * magnitude
        case "uneven":  # sub-scales of 0 beside large ones
            return normal * of_sub_block
        case "nearly empty":  # around the 1e-15 below which ggml sees no weight
            return normal * np.exp2(rng.uniform(-54, -46, (n, 1))).astype(F32)
        case "half quiet":
            quiet = (rng.random((n, 16)) < 0.5).repeat(16, 1)
            return np.where(quiet, normal * F32(1e-7), normal * of_sub_block)
        case "sparse":
            return np.where(rng.random(shape) < 0.9, np.copysign(F32(0), normal), normal * magnitude)
        case "ties":  # halves of a step
            step = np.exp2(rng.integers(-149, 10, (n, 1))).astype(F32)
            return rng.integers(-16, 17, shape).astype(F32) * step / 2
        case "few values":
            return rng.integers(-2, 3, shape).astype(F32) * magnitude
        case "near ties":  # one unit in the last place beside a tie
            tied = rng.integers(-16, 17, shape).astype(F32) * magnitude
            return np.nextafter(tied, np.copysign(F32(np.inf), normal))
        case "opposite":  # equal magnitudes of both signs
            return np.where(normal < 0, -magnitude, magnitude)
        case "constant":
            return (
                np.where(rng.random((n, 1)) < 0.5, normal[:, :1], normal[:, ::16].repeat(16, 1)) * magnitude
            )
        case "offset":  # narrow ranges far from zero, on either side
            return np.copysign(np.minimum(of_sub_block * 8, 60000), normal[:, :1]) + normal * F32(1e-3)
        case "bits":  # any bit pattern within fp16's range
            w = rng.integers(0, 2**32, shape, np.uint32).view(F32)
            return np.where(np.abs(w) <= 65504, w, F32(1))
        case "subnormal":
            bits = rng.integers(0, 2 ** rng.integers(1, 25, (n, 1)), shape).astype(np.uint32)
            return (bits | rng.integers(0, 2, shape, np.uint32) << 31).view(F32)


KINDS = [
    "weights",
    "magnitudes",
    "uneven",
    "nearly empty",
    "half quiet",
    "sparse",
    "ties",
    "few values",
    "near ties",
    "opposite",
    "constant",
    "offset",
    "bits",
    "subnormal",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_blocks_equal_ggml(ggml, name, kind):
    w = blocks_of_kind(kind, np.random.default_rng(KINDS.index(kind)), 400)
    check(ggml, name, w.reshape(-1, 2 * WIDTH))


@pytest.mark.parametrize("name", NAMES)
def test_hand_made_blocks_equal_ggml(ggml, name):
    tiny, least = F32(2**-149), F32(2**-126)
    rows = []
    for value in [0.0, -0.0, 1.0, tiny, least, 2.0**-128, 2.0**-125, 2.0**-24, 1e-15, 65504.0, 65519.99]:
        alone = np.eye(1, WIDTH, WIDTH - 1)[0] * value
        for row in (np.full(WIDTH, value), alone, np.resize([value, -value], WIDTH)):
            rows += [row, -row]
    mixed_zeros = np.resize([0.0, -0.0], WIDTH)
    rows += [mixed_zeros, -mixed_zeros, np.linspace(-1, 1, WIDTH), np.arange(WIDTH) / 2 - 64]
    check(ggml, name, np.array(rows, F32))


@pytest.mark.parametrize("name", NAMES)
def test_any_block_of_a_file_decodes_as_in_ggml(ggml, name):
    """Also blocks that no quantizer writes: every code and sub-scale, subnormal and negative scales."""
    rng = np.random.default_rng(9)
    blocks = rng.integers(0, 256, (4000, BYTES[name]), np.uint8)
    last = BYTES[name]
    for high_byte in {"q2_k": (last - 3, last - 1), "q4_k": (1, 3), "q5_k": (1, 3)}.get(name, (last - 1,)):
        blocks[:, high_byte] = np.where(blocks[:, high_byte] & 0x7C == 0x7C, 0x3C, blocks[:, high_byte])
    codes, stored = _core.ggml_unpack(name, blocks)
    assert np.isfinite(stored).all()
    assert differing(_core.grid_decode(name, codes, stored), ggml_dequantize(ggml, name, blocks)) == 0
    assert np.count_nonzero(_core.ggml_pack(name, codes, stored) != blocks) == 0


@pytest.mark.parametrize(
    ("name", "at"),
    [("q2_k", (80, 82)), ("q3_k", (108,)), ("q4_k", (0, 2)), ("q5_k", (0, 2)), ("q6_k", (208,))],
)
def test_the_error_begins_where_ggml_writes_an_infinite_scale(ggml, name, at):
    """Weights of one sub-block grow until d no longer fits fp16: the border is between two of them."""
    outcomes = []
    for exponent in np.linspace(18, 30, 97):
        w = np.linspace(-0.9, 1, WIDTH).astype(F32)[None] * F32(2**exponent)
        block = ggml_quantize(ggml, name, w)[0]
        outcomes.append(any(np.isinf(block[byte : byte + 2].view(np.float16)[0]) for byte in at))
        if outcomes[-1]:
            with pytest.raises(libqat.NumericError, match="beyond its stored type"):
                _core.grid_fake_quantize(name, w)
        else:
            check(ggml, name, w)
    assert outcomes[0] != outcomes[-1]


@pytest.mark.parametrize("name", ["q4_k", "q5_k"])
def test_positions_beyond_2_22_steps_equal_ggml(ggml, name):
    """A sub-block few units in the last place wide, whose minimum is lost beside a much lower one."""
    w = np.zeros((1, WIDTH), F32)
    w[0, :32] = -63 * 2**14
    narrow = np.nextafter(F32(-(2**13)), F32(0))
    w[0, 32:] = np.resize([narrow, np.nextafter(narrow, F32(0)), -(2**13) + 2**-9], 224)
    scale, minimum, *sub = _core.grid_store(name, _core.grid_choose(name, w), WIDTH)[0, 0]
    assert (w[0, 40] + minimum * sub[9]) / (scale * sub[1]) < -(2**22)
    check(ggml, name, w)


@pytest.mark.parametrize("name", NAMES)
def test_the_operators_take_both_levels(name):
    w = torch.randn(3, 2 * WIDTH, generator=torch.Generator().manual_seed(3)).requires_grad_()
    w_hat = ops.fake_quantize(w, name, "clipped_ste")
    w_hat.sum().backward()
    rows = w.detach().numpy()
    s = _core.grid_choose(name, rows)
    mask = _core.grid_in_range(name, rows, s)
    assert 0 < np.count_nonzero(mask == 0) < 0.2 * mask.size  # beyond the outer levels; four levels clip most
    np.testing.assert_array_equal(w.grad.numpy(), mask)
    codes, scales = ops.quantize(w, name)
    assert scales.shape == s.shape
    assert torch.equal(ops.dequantize(codes, scales, name), w_hat)
    x = torch.randn(4, 2 * WIDTH)
    torch.testing.assert_close(ops.quantized_linear(x, w, None, name), x @ w_hat.T)
