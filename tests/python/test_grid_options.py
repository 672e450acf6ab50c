"""What stands behind a grid's name: the numbers that scales are rounded to, and the type of the products."""

import numpy as np
import pytest
import torch
from libqat.grids import grids

import libqat
from libqat import _core

TORCH = {"fp16": torch.float16, "bf16": torch.bfloat16}
LIMIT = {"fp32": 3.3895313892515355e38, "bf16": 3.3895313892515355e38, "fp16": 65504.0}


def power_of_two(s):
    """The nearest one, halves upwards; nothing below 2^-126 but 0."""
    mantissa, exponent = np.frexp(np.abs(s).astype(np.float64))
    near = np.ldexp(np.where(mantissa >= 0.75, 1.0, 0.5), exponent)
    near = np.where(np.abs(s) < 2.0**-126, np.where(np.abs(s) < 2.0**-127, 0, 2.0**-126), near)
    return np.copysign(near, s).astype(np.float32)


def rounded(s, scale_grid):
    tensor = torch.from_numpy(s)
    if scale_grid == "pow2":
        return power_of_two(s)
    if scale_grid == "bf16_fp16":
        return tensor.bfloat16().half().float().numpy()
    return tensor.to(TORCH.get(scale_grid, torch.float32)).float().numpy()


def scales(count, low, high):
    """Scales of both signs between 2^low and 2^high, ties of every type among them, and zeros."""
    rng = np.random.default_rng(2)
    s = np.exp2(rng.uniform(low, high, count)) * rng.choice([-1, 1], count)
    s[: count // 4] = rng.choice([1, 1.25, 1.5, 1.75], count // 4) * np.exp2(
        rng.integers(low, high, count // 4)
    )
    bits = s[count // 4 : count // 2].astype(np.float32).view(np.uint32)
    s[count // 4 : count // 2] = ((bits & 0xFFFF0000) | 0x8000).view(np.float32)  # bfloat16's ties
    bits = s[count // 2 : 3 * count // 4].astype(np.float32).view(np.uint32)
    s[count // 2 : 3 * count // 4] = ((bits & 0xFFFFE000) | 0x1000).view(np.float32)  # float16's ties
    s[:2] = 0.0, -0.0
    return s.astype(np.float32)


@pytest.mark.parametrize("scale_grid", ["fp32", "fp16", "bf16", "bf16_fp16", "pow2"])
@pytest.mark.parametrize("name", ["int4_g32", "int3_g64_asym", "mobile8_g256"])
def test_a_scale_is_stored_as_its_grid_rounds_it(name, scale_grid):
    half = "fp16" in scale_grid
    s = scales(20000, -30 if half else -148, 15 if half else 118).reshape(100, -1, 1)
    grid = f"{name}@{scale_grid}"
    width = s.shape[1] * grids()[name].block
    asymmetric = name.endswith("_asym")
    parameters = np.concatenate([s, np.ones_like(s)], 2) if asymmetric else s
    stored = _core.grid_store(grid, parameters, width)
    expected = rounded(s, scale_grid)
    np.testing.assert_array_equal(stored[..., :1].view(np.uint32), expected.view(np.uint32))
    np.testing.assert_array_equal(_core.grid_store(grid, stored, width), stored)


@pytest.mark.parametrize("dequant", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("scale_grid", ["fp32", "fp16", "bf16", "bf16_fp16", "pow2"])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_the_largest_scale_keeps_every_level_finite(bits, scale_grid, dequant):
    grid = f"int{bits}_channel@{scale_grid}:{dequant}"
    limit = np.float32(LIMIT[dequant] / 2 ** (bits - 1))
    top = {"fp16": 65504.0, "bf16_fp16": 65280.0}.get(scale_grid, np.inf)
    s = np.float32(min(limit, top))
    s = s if rounded(np.array([s]), scale_grid)[0] <= limit else s / np.float32(2)  # pow2 rounds up
    stored = _core.grid_store(grid, np.full((1, 1, 1), s, np.float32), 8)
    lowest = np.full((1, 8), -(2 ** (bits - 1)), np.int8)
    assert np.isfinite(_core.grid_decode(grid, lowest, stored)).all()
    with pytest.raises(libqat.NumericError, match="beyond its stored type"):
        _core.grid_store(grid, np.full((1, 1, 1), s * np.float32(2.001), np.float32), 8)
    with pytest.raises(libqat.NumericError, match="not finite"):
        _core.grid_store(grid, np.full((1, 1, 1), np.nan, np.float32), 8)


@pytest.mark.parametrize(("dequant", "dtype"), TORCH.items())
@pytest.mark.parametrize("name", ["int8_channel", "int4_g32", "int8_g64_asym", "mobile4"])
def test_the_product_is_rounded_once(name, dequant, dtype):
    w = torch.randn(64, 512, generator=torch.Generator().manual_seed(4))
    plain = libqat.ops.fake_quantize(w, name)
    assert torch.equal(libqat.ops.fake_quantize(w, f"{name}:{dequant}"), plain.to(dtype).float())


def test_codes_are_picked_with_the_scale_that_ships():
    w = np.zeros((1, 32), np.float32)
    w[0, :2] = 7.5 * 1.00390625, 4.51  # the scale 1 + 2^-8 becomes 1 in bfloat16 (a tie, to even)
    assert _core.grid_encode("int4_channel", w, _core.grid_choose("int4_channel", w))[0, 1] == 4
    grid = "int4_channel@bf16"
    s = _core.grid_choose(grid, w)
    assert s[0, 0, 0] == np.float32(1.00390625)
    assert _core.grid_store(grid, s, 32)[0, 0, 0] == 1
    assert _core.grid_encode(grid, w, s)[0, 1] == 5


@pytest.mark.parametrize(
    ("grid", "scale"),
    [
        ("int4_channel", 2.0**-23),
        ("int4_channel@pow2", 2.0**-23),
        ("int4_channel@fp16", 2.0**-10),
        ("int4_channel@bf16", 2.0**-7),
        ("int4_channel@bf16_fp16", 2.0**-7),
        ("int8_g32_asym@fp16", 2.0**-10),
    ],
)
def test_a_zero_block_gets_the_epsilon_of_its_scales_type(grid, scale):
    w = np.zeros((1, 32), np.float32)
    s = _core.grid_choose(grid, w)
    assert s[0, 0, 0] == scale
    np.testing.assert_array_equal(_core.grid_fake_quantize(grid, w), 0)


@pytest.mark.parametrize("grid", ["mlx4_g64@fp16", "mlx8_g32@bf16", "mlx2_g128"])
def test_an_mlx_group_whose_levels_overflow_is_an_error_naming_the_row(grid):
    w = np.ones((3, 128), np.float32)
    w[1, 0], w[1, 1] = 3.4e38, -3.4e38
    with pytest.raises(libqat.NumericError, match=r"row 1: .*beyond its stored type"):
        _core.grid_fake_quantize(grid, w)


def test_a_policy_names_the_options_and_the_checkpoint_keeps_them(tmp_path):
    policy = libqat.Policy.from_json(
        '{"rules": [{"match": "w", "weight": "int4_g32", "scale_grid": "bf16", "dequant_dtype": "bf16"}]}'
    )
    assert '"weight":"int4_g32@bf16:bf16"' in policy.to_json()
    w = torch.randn(4, 64)
    checkpoint = _core.freeze_tensors([("w", w)], {"w": "int4_g32@bf16:bf16"})
    libqat.save(checkpoint, tmp_path / "w.qat.safetensors")
    loaded = libqat.load(tmp_path / "w.qat.safetensors")
    assert loaded.grids == {"w": "int4_g32@bf16:bf16"}
    assert torch.equal(loaded.weight("w"), libqat.ops.fake_quantize(w, "int4_g32@bf16:bf16"))
