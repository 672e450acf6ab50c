"""The grids as Python sees them: the table, shapes and errors."""

import numpy as np
import pytest
import torch
from libqat.grids import Grid, grid, grids

import libqat
from libqat import _core

FLOAT = ["f32", "f16", "bf16"]
INTEGER = [
    *(
        f"int{bits}_{group}{ending}"
        for ending in ("", "_asym")
        for bits in (8, 4, 3, 2)
        for group in ("tensor", "channel", "g32", "g64", "g128", "g256")
    ),
    *(f"mlx{bits}_g{group}" for bits in (8, 6, 5, 4, 3, 2) for group in (32, 64, 128)),
    *(f"mobile{bits}{group}" for bits in (8, 4, 2) for group in ("", "_g256")),
]
GGML = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_0", "q1_0", "tq1_0", "tq2_0"]
FLOAT_CODES = ["mxfp4", "nvfp4"]
KQUANTS = ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k"]
CODED = [*GGML, *FLOAT_CODES, *KQUANTS, *INTEGER]
NAMES = FLOAT + CODED


def test_the_table_of_grids():
    table = grids()
    assert list(table) == NAMES
    assert table["q4_1"] == Grid("q4_1", 4, 32, (0, 15), (("scales", 1, "float16"), ("mins", 1, "float16")))
    scales = (("scales", 1, "float32"),)
    options = (("fp32", "fp16", "bf16", "bf16_fp16", "pow2"), ("fp32", "fp16", "bf16"))
    assert table["int2_channel"] == Grid("int2_channel", 2, None, (-2, 1), scales, False, *options)
    assert table["int3_g128"] == Grid("int3_g128", 3, 128, (-4, 3), scales, False, *options)
    assert table["int8_tensor"] == Grid("int8_tensor", 8, None, (-128, 127), scales, True, *options)
    assert table["mlx8_g64"].codes == (-128, 127)
    assert table["mlx4_g64"].scale_grids == ("fp32", "fp16", "bf16")
    assert [name for name, _, _ in table["mlx4_g64"].fields] == ["scales", "biases"]
    assert [name for name, _, _ in table["int4_g32_asym"].fields] == ["scales", "zero_points"]
    assert table["bf16"] == Grid("bf16", 16, 1, None, ())
    assert table["q4_0"].bits_per_weight(576) == 4.5
    assert table["q8_0"].bits_per_weight(576) == 8.5
    assert table["q2_0"].bits_per_weight(576) == 2.25
    assert table["int4_channel"].bits_per_weight(64) == 4.5
    assert [table[f"int2_g{g}"].bits_per_weight(512) for g in (32, 64, 128, 256)] == [3, 2.5, 2.25, 2.125]


def test_an_unknown_grid_names_the_legal_ones():
    with pytest.raises(libqat.ArgumentError, match=r'grid: expected one of f32, .*mobile2_g256, got "q4_2"'):
        _core.grid_info("q4_2")


def test_options_stand_behind_the_name():
    assert grid("int4_g32@bf16:fp32").name == "int4_g32@bf16"
    assert grid("int4_g32@bf16:bf16").fields == (("scales", 1, "bfloat16"),)
    assert grid("mlx4_g64@fp16").fields == (("scales", 1, "float16"), ("biases", 1, "float16"))
    with pytest.raises(
        libqat.ArgumentError, match=r"of mlx4_g64 that is one of fp32, fp16, bf16, got \"pow2\""
    ):
        grid("mlx4_g64@pow2")


@pytest.mark.parametrize("name", CODED)
def test_the_functions_fit_together(name):
    w = np.random.default_rng(0).standard_normal((5, 512)).astype(np.float32)
    s = _core.grid_choose(name, w)
    stored = _core.grid_store(name, s, 512)
    codes = _core.grid_encode(name, w, s)
    w_hat = _core.grid_decode(name, codes, stored)
    info = grids()[name]
    params = sum(count for _, count, _ in info.fields)
    assert s.shape == stored.shape == (5, 512 // (info.block or 512), params)
    np.testing.assert_array_equal(w_hat, _core.grid_fake_quantize(name, w))
    np.testing.assert_array_equal(w_hat, _core.grid_fake_quantize(name, w, reference=True))
    bf16 = torch.from_numpy(w_hat).bfloat16().view(torch.uint16).numpy()
    np.testing.assert_array_equal(bf16, _core.grid_fake_quantize_bf16(name, w))
    mask = _core.grid_in_range(name, w, s)
    assert mask.shape == w.shape
    assert set(np.unique(mask)) <= {0, 1}


@pytest.mark.parametrize(("name", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_float_grids_round_as_torch_does(name, dtype):
    bits = np.random.default_rng(1).integers(0, 2**32, (64, 4096), np.uint32)
    w = bits.view(np.float32)
    limit = torch.finfo(dtype).max
    w = np.where(np.isfinite(w) & (np.abs(w) <= limit), w, np.float32(0.1)).astype(np.float32)
    expected = torch.from_numpy(w).to(dtype).float().numpy()
    np.testing.assert_array_equal(_core.grid_fake_quantize(name, w).view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_named_by_its_row(name, bad):
    w = np.ones((4, 256), np.float32)
    w[2, 31] = bad
    for call in (_core.grid_choose, _core.grid_fake_quantize, _core.grid_fake_quantize_bf16):
        with pytest.raises(
            libqat.NumericError, match=rf"row 2: expected values that {name} can hold, got .*finite"
        ):
            call(name, w)


@pytest.mark.parametrize("name", ["f16", *GGML])
def test_a_scale_beyond_fp16_is_named_by_its_row(name):
    w = np.ones((4, 256), np.float32)
    w[3, 0] = 1e9
    with pytest.raises(libqat.NumericError, match=r"row 3: .*beyond its stored type"):
        _core.grid_fake_quantize(name, w)


def test_shapes_are_checked():
    w = np.ones((2, 48), np.float32)
    with pytest.raises(libqat.ArgumentError, match="rows of a multiple of 32 weights for q4_0, got 48"):
        _core.grid_choose("q4_0", w)
    with pytest.raises(libqat.ArgumentError, match="multiple of 32 weights for q8_0, got 48"):
        _core.grid_row_bytes("q8_0", 48)
    with pytest.raises(libqat.ArgumentError, match=r"a matrix \[rows, n\], got shape \[48\]"):
        _core.grid_choose("int4_channel", w[0])
    with pytest.raises(libqat.ArgumentError, match=r"expected scales \[2, 1, 1\], got \[2, 2, 1\]"):
        _core.grid_encode("int4_channel", w, np.ones((2, 2, 1), np.float32))
    with pytest.raises(libqat.ArgumentError, match=r"expected bytes \[rows, multiple of 18\], got \[1, 20\]"):
        _core.ggml_unpack("q4_0", np.zeros((1, 20), np.uint8))
    with pytest.raises(libqat.ArgumentError, match='expected a grid of ggml blocks, got "int4_channel"'):
        _core.ggml_unpack("int4_channel", np.zeros((1, 20), np.uint8))


def test_other_dtypes_and_strides_are_refused_rather_than_converted():
    with pytest.raises(TypeError):
        _core.grid_choose("q8_0", np.ones((1, 32)))
    with pytest.raises(TypeError):
        _core.grid_choose("q8_0", np.ones((32, 2), np.float32).T)
