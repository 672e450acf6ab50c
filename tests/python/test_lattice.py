"""Weights that lie on a grid already: their codes and scales are found again."""

import numpy as np
import pytest
import torch
from rounding import on_lattice

import libqat
from libqat import _core, ops

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def found(weight, grid="q4_0"):
    lattice = _core.find_lattice(weight, grid)
    codes, stored = ops.quantize(weight, grid, "learned", "", lattice.scales)
    return lattice, codes, stored[:, :, 0]


def gaussian(rows=64, width=128, seed=0):
    return 0.02 * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ggmls_own_rule_is_recovered(dtype):
    """The extremum / -8, as f16; in a bfloat16 file the products are rounded, so that the rule misses it."""
    codes, scales = ops.quantize(gaussian(), "q4_0")
    weight = on_lattice(codes, scales[:, :, 0], DTYPES[dtype])
    lattice, again, stored = found(weight)
    assert lattice.rule == "consumer"
    assert (lattice.blocks, lattice.exact, lattice.worst) == (256, 256, 0)
    assert torch.equal(again, codes)
    # 8 significant bits of the products do not decide an f16 scale: it is off by some units in the last place
    assert torch.allclose(stored, scales[:, :, 0], rtol=2**-8 if dtype == "bf16" else 0, atol=0)
    assert torch.equal(on_lattice(again, stored, DTYPES[dtype]), weight)


def test_bfloat16_scales_by_the_rule_come_back_exactly():
    """The signed extremum / -8 of numbers in bfloat16 is a bfloat16 number: nothing is undecided."""
    weight = gaussian().bfloat16().float()
    blocks = weight.view(64, -1, 32)
    extremum = blocks.gather(2, blocks.abs().argmax(2, keepdim=True))
    scale = extremum / -8
    codes = (blocks / scale + 8.5).floor().clamp(0, 15) - 8
    stored = (codes * scale).bfloat16().float().view(64, 128)
    lattice, again, scales = found(stored)
    assert (lattice.rule, lattice.exact) == ("consumer", lattice.blocks)
    assert torch.equal(scales, scale[:, :, 0])
    assert torch.equal(again, codes.view(64, 128).to(torch.int8))
    naive_codes, naive = ops.quantize(stored, "q4_0")
    assert torch.equal(naive_codes, again)
    assert torch.equal(naive[:, :, 0], scales)  # here llama-quantize would do as well


@pytest.mark.parametrize("scale_type", ["bf16", "f16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_learned_scales_without_a_code_of_minus_eight(dtype, scale_type):
    """The grid's own rule finds other codes in nearly every block; fitting finds the ones that were there."""
    generator = np.random.default_rng(3)
    codes = torch.from_numpy(generator.integers(-7, 8, (64, 128))).to(torch.int8)
    scales = torch.from_numpy(generator.uniform(0.002, 0.01, (64, 4))).to(DTYPES[scale_type]).float()
    blocks = codes.view(64, 4, 32)
    # the largest weight, the first of equals, has a negative code, as by the rule
    largest = blocks.gather(2, blocks.int().abs().argmax(2, keepdim=True))
    codes = (blocks * -largest.sign()).view(64, 128)
    scales = scales * torch.from_numpy(generator.choice([-1.0, 1.0], (64, 4))).float()
    weight = on_lattice(codes, scales, DTYPES[dtype])
    lattice, again, stored = found(weight)
    assert lattice.rule == "fitted"
    assert lattice.exact == lattice.blocks
    assert torch.equal(again, codes)
    assert torch.equal(on_lattice(again, stored, DTYPES[dtype]), weight)
    if scale_type == "bf16" or dtype != "bf16":
        assert torch.equal(stored, scales)
    naive, _ = ops.quantize(weight, "q4_0")
    assert (naive.view(64, 4, 32) == codes.view(64, 4, 32)).all(2).float().mean() < 0.2


def test_zeros_and_sparse_blocks():
    codes = torch.zeros(1, 6 * 32, dtype=torch.int8)
    codes[0, 32] = -8
    codes[0, 64:66] = torch.tensor([-8, 4])
    codes[0, 96:99] = torch.tensor([-8, 7, 1])
    codes[0, 128:160] = -8
    codes[0, 160:162] = torch.tensor([-8, -8])
    scales = torch.tensor([[0.0, 0.5, 0.25, 0.125, 0.0625, -0.03125]])
    weight = on_lattice(codes, scales, torch.bfloat16)
    lattice, again, stored = found(weight)
    assert (lattice.rule, lattice.exact) == ("consumer", 6)
    assert torch.equal(again[:, 32:], codes[:, 32:])
    assert torch.equal(stored[:, 1:], scales[:, 1:])
    assert torch.equal(ops.dequantize(again, lattice.scales, "q4_0"), weight)


def test_ties_of_the_extremum():
    """-8 and +8 cannot both be codes; the first of two equal magnitudes has the code -8, as ggml has it."""
    weight = torch.zeros(2, 32)
    weight[0, :3] = torch.tensor([-0.5, 0.4375, 0.0625])
    weight[1, :3] = torch.tensor([0.5, -0.4375, 0.0625])
    lattice, codes, stored = found(weight)
    assert lattice.exact == 2
    assert codes[:, :3].tolist() == [[-8, 7, 1], [-8, 7, -1]]
    assert stored.flatten().tolist() == [0.0625, -0.0625]


def test_a_few_blocks_off_the_lattice_are_counted_and_nearest():
    codes, scales = ops.quantize(gaussian(seed=2), "q4_0")
    weight = on_lattice(codes, scales[:, :, 0], torch.float16)
    weight[3, 5] += 0.3 * scales[3, 0, 0].abs().half().float()
    weight = weight.half().float()
    lattice, again, stored = found(weight)
    assert (lattice.rule, lattice.blocks - lattice.exact) == ("consumer", 1)
    assert 0.2 < lattice.worst < 0.5
    assert torch.equal(again, codes)
    assert torch.equal(stored, scales[:, :, 0])


def test_weights_on_no_lattice_are_left_to_the_rule():
    weight = gaussian(seed=4)
    lattice, codes, stored = found(weight)
    assert lattice.rule == "none"
    assert lattice.exact == 0
    expected_codes, expected = ops.quantize(weight, "q4_0")
    assert torch.equal(codes, expected_codes)
    assert torch.equal(stored, expected[:, :, 0])


@pytest.mark.parametrize("grid", ["mobile4", "mobile2", "int4_channel", "int4_g32", "q8_0", "q5_0"])
def test_other_grids(grid):
    codes, scales = ops.quantize(gaussian(seed=5), grid, "search" if grid == "mobile2" else "reference")
    weight = ops.dequantize(codes, scales, grid).reshape(64, 128)
    lattice, again, _ = found(weight, grid)
    assert lattice.exact == lattice.blocks
    assert torch.equal(again, codes)
    assert torch.equal(ops.dequantize(again, lattice.scales, grid), weight)


def test_grids_without_a_lattice_and_broken_weights_are_refused():
    assert not _core.has_lattice("q4_1")
    assert not _core.has_lattice("q6_k")
    assert _core.has_lattice("q4_0")
    with pytest.raises(libqat.ArgumentError, match=r"levels code \* scale"):
        _core.find_lattice(torch.ones(2, 32), "q4_1")
    with pytest.raises(libqat.NumericError, match="up"):
        _core.find_lattice(torch.full((2, 32), float("nan")), "q4_0", "up")
