"""Learned scales in the operators and in files: what ships is what trained."""

import pytest
import torch
from conftest import VOCABULARY, make_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from learned_scales import INTEGER, LSQ, moved, normal, weight_of
from torch import nn

import libqat
from libqat import ops


@pytest.mark.parametrize("grid", INTEGER)
@pytest.mark.parametrize("rule", ["reference", "search"])
def test_learned_scales_from_a_rule_are_the_rules_bits(grid, rule):
    weight = weight_of(3)
    scales = ops.choose_scales(weight, grid, rule)
    info = libqat.grids()[grid]
    groups = 1 if info.whole_tensor or info.block is None else 256 // info.block
    assert scales.shape == (1 if info.whole_tensor else 6, groups, sum(f[1] for f in info.fields))
    assert not scales.requires_grad
    expected = ops.fake_quantize(weight, grid, scale=rule)
    assert torch.equal(ops.fake_quantize(weight, grid, "ste", "learned", "w", scales), expected)
    assert torch.equal(ops.dequantize(*ops.quantize(weight, grid, "learned", "w", scales), grid), expected)
    x = normal(3, 256, seed=4)
    linear = ops.quantized_linear(x, weight, None, grid, "ste", "learned", "w", scales)
    assert torch.equal(linear, nn.functional.linear(x, expected))
    low = ops.quantized_linear(x.bfloat16(), weight, None, grid, "ste", "learned", "w", scales)
    assert torch.equal(low, nn.functional.linear(x.bfloat16(), expected.bfloat16()))
    indices = torch.tensor([[5, 0], [5, 2]])
    rows = ops.quantized_embedding(indices, weight, None, grid, "ste", "learned", "w", scales)
    assert torch.equal(rows, expected[indices])


def test_scales_are_given_exactly_when_they_are_learned():
    weight = weight_of()
    scales = ops.choose_scales(weight, "q4_0")
    with pytest.raises(
        libqat.ArgumentError, match=r"w: expected scales exactly when .*, got none with learned"
    ):
        ops.fake_quantize(weight, "q4_0", "ste", "learned", "w")
    with pytest.raises(libqat.ArgumentError, match="got scales with search on q4_0"):
        ops.quantized_linear(weight, weight, None, "q4_0", "ste", "search", "w", scales)
    with pytest.raises(libqat.ArgumentError, match="got scales with learned on bf16"):
        ops.fake_quantize(weight, "bf16", "ste", "learned", "w", scales)
    for bad in (scales[:5], scales[..., :0], scales.double(), scales.flatten()):
        with pytest.raises(libqat.ArgumentError, match=r"w: expected scales of float32\[6, 8, 1\] on cpu"):
            ops.quantize(weight, "q4_0", "learned", "w", bad)
    with pytest.raises(libqat.ArgumentError, match="a rule that gives scales"):
        ops.choose_scales(weight, "q4_0", "learned")
    with pytest.raises(libqat.ArgumentError, match="a grid with codes"):
        ops.choose_scales(weight, "bf16")
    with pytest.raises(libqat.ArgumentError, match="scale_gradient: expected one of lsq, tensor, plain"):
        ops.fake_quantize(weight, "q4_0", "ste", "learned", "w", scales, "row")
    with pytest.raises(libqat.UnsupportedError, match="w: expected a grid whose scale rule has a gradient"):
        ops.fake_quantize(weight, "q4_k", "ste", "differentiated", "w")
    spoiled = scales.clone()
    spoiled[2, 3] = float("nan")
    with pytest.raises(libqat.NumericError, match="w: row 2 is not finite"):
        ops.fake_quantize(weight, "q4_0", "ste", "learned", "w", spoiled)


def test_operators_inside_pytorch():
    weight, x = weight_of().requires_grad_(), normal(3, 256).requires_grad_()
    scales = moved(ops.choose_scales(weight, "q4_0")).requires_grad_()
    library = torch.ops.libqat
    held = ("q4_0", "clipped_ste", "learned", "w", scales, "lsq")
    torch.library.opcheck(library.fake_quantize.default, (weight, *held))
    torch.library.opcheck(library.quantized_linear.default, (x, weight, None, *held))
    torch.library.opcheck(library.quantized_embedding.default, (torch.tensor([1, 5]), weight, -1, *held))
    torch.library.opcheck(library.choose_scales.default, (weight, "q4_0", "search", "w"))
    torch.library.opcheck(library.quantize.default, (weight, "q4_0", "learned", "w", scales))
    detached = weight.detach(), scales.detach()
    gradient = normal(6, 256)
    torch.library.opcheck(library.fake_quantize_backward_scales.default, (gradient, *detached, "q4_0"))
    y = ops.quantized_linear(x, weight, None, *held).square().sum()
    [by_scales] = torch.autograd.grad(y, scales, create_graph=True)
    with pytest.raises(RuntimeError, match="derivative for libqat::quantized_linear_grad_scales is not impl"):
        by_scales.sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        low = ops.quantized_linear(x, weight, None, *held)
    assert low.dtype == torch.bfloat16
    low.sum().backward()
    assert scales.grad.dtype == torch.float32


def shaken(scales, generator):
    """What a wild optimizer may leave: moved, turned around, 0, tiny, large."""
    pick = torch.rand(scales.shape, generator=generator)
    scales = scales * (1 + 0.3 * torch.randn(scales.shape, generator=generator))
    scales = torch.where(pick < 0.1, -scales, scales)
    scales = torch.where(pick > 0.9, torch.zeros(()), scales)
    scales = torch.where((pick > 0.8) & (pick < 0.85), scales * 1e-9, scales)
    return torch.where((pick > 0.85) & (pick < 0.9), scales * 10, scales)


@pytest.mark.parametrize("grid", INTEGER)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.sampled_from([1e-6, 1e-2, 1.0, 100.0]))
def test_learned_scales_are_legal_whatever_becomes_of_them(grid, seed, size):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(2, 256, generator=generator) * size
    scales = shaken(ops.choose_scales(weight, grid), generator)
    try:
        w_hat = ops.fake_quantize(weight, grid, "ste", "learned", "w", scales)
    except libqat.NumericError:
        with pytest.raises(libqat.NumericError):
            ops.quantize(weight, grid, "learned", "w", scales)
        return
    codes, stored = ops.quantize(weight, grid, "learned", "w", scales)
    assert (ops.dequantize(codes, stored, grid) != w_hat).sum() == 0
    # what was stored is legal: stored again it is itself
    again = ops.fake_quantize(weight, grid, "ste", "learned", "w", stored)
    assert torch.isfinite(again).all()


EXPORTS = {
    "gguf": ["q4_0", "q4_1", "q5_0", "q8_0", "q2_0", "q4_k", "q6_k", "mxfp4"],
    "compressed-tensors": ["int4_g32", "int4_channel", "int8_channel"],
    "mlx": ["mlx4_g64", "mlx3_g64", "mlx2_g64"],
}


@pytest.mark.parametrize(
    ("target", "grid"), [(target, grid) for target, grids in EXPORTS.items() for grid in grids]
)
def test_exported_files_hold_the_learned_scales(target, grid, tmp_path):
    wide = {"hidden_size": 256, "intermediate_size": 256} if grid.endswith("_k") else {}
    model = make_llama(num_hidden_layers=1, **wide).eval()
    prepared = libqat.prepare(
        model, {"rules": [{"match": r".*layers\..*_proj", "weight": grid}], "estimator": LSQ}
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for scales in prepared.scale_parameters().values():
            scales.copy_(shaken(scales, generator))
    ids = torch.randint(VOCABULARY, (2, 8), generator=generator)
    expected = model(ids).logits
    checkpoint = libqat.freeze(prepared, tokenizer="none")
    libqat.save(checkpoint, tmp_path / "m.qat.safetensors")
    loaded = libqat.load(tmp_path / "m.qat.safetensors")
    for name, layer in ((s.name, s.layers[0][1]) for s in prepared.slots):
        assert (loaded.weight(name) != layer.fake_quantized()).sum() == 0
    path = tmp_path / ("m.gguf" if target == "gguf" else "m")
    libqat.export(loaded, path, target=target)
    assert libqat.verify(path, checkpoint) == []
    plain = make_llama(num_hidden_layers=1, **wide).eval()
    # the head is tied by the configuration, which leaves its key out
    plain.load_state_dict(dict(libqat.dequantize(loaded)), strict=False)
    # another kernel multiplies: float32 rounding of logits
    torch.testing.assert_close(plain(ids).logits, expected, rtol=1e-5, atol=1e-5)
