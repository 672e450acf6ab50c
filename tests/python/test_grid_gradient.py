"""Gradients of the grids against torch's autograd in float64, with fake-quantization as torch operators.

Rounding passes straight through, clamping does not: autograd then derives LSQ, LSQ+ and the chain rule of
two levels by itself, and the differentiated scale from the scale's own formula.
"""

import numpy as np
import pytest
import torch

import libqat
from libqat import _core

ONE_SCALE = {
    "q4_0": (-8, 7),
    "q5_0": (-16, 15),
    "q8_0": (-128, 127),
    "q2_0": (-1, 2),
    "tq2_0": (-1, 2),
    "int4_g32": (-8, 7),
    "int3_g64": (-4, 3),
    "int8_channel": (-128, 127),
    "mobile4_g256": (-8, 7),
}
OFFSET = {"q4_1": 15, "q5_1": 31, "mlx4_g64": 15, "mlx2_g32": 3, "mlx8_g64": 255}
ZERO_POINT = {"int4_g32_asym": (-8, 7), "int2_g64_asym": (-2, 1)}
SUB_MINIMA = {"q2_k": 3, "q4_k": 15, "q5_k": 31}
SUB_SCALES = {"q3_k": (-4, 3), "q6_k": (-32, 31)}
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)


def straight_through(rounded, value):
    return value + (rounded - value).detach()


def rounded(value):
    return straight_through(value.round(), value)


def e2m1(value):
    nearest = (value.abs().unsqueeze(-1) - E2M1).abs().argmin(-1)
    return straight_through(E2M1[nearest] * value.sign(), value)


def one_scale(name, w, s):
    low, high = ONE_SCALE[name]
    return s[..., 0:1] * rounded((w / s[..., 0:1]).clamp(low, high))


def offset(name, w, s):
    scale, bias = s[..., 0:1], s[..., 1:2]
    return scale * rounded(((w - bias) / scale).clamp(0, OFFSET[name])) + bias


def zero_point(name, w, s):
    low, high = ZERO_POINT[name]
    scale, zero = s[..., 0:1], rounded(s[..., 1:2])
    # Half a step beyond the codes counts as inside: the zero point is itself rounded.
    place = (w / scale + zero).clamp(low - 0.5, high + 0.5)
    return scale * (straight_through(place.round().clamp(low, high), place) - zero)


def sub_minima(name, w, s):
    count = (s.shape[-1] - 2) // 2
    sub = w.unflatten(-1, (count, -1))
    scale = (s[..., 0:1] * rounded(s[..., 2 : 2 + count])).unsqueeze(-1)
    minimum = (s[..., 1:2] * rounded(s[..., 2 + count :])).unsqueeze(-1)
    return (scale * rounded(((sub + minimum) / scale).clamp(0, SUB_MINIMA[name])) - minimum).flatten(-2)


def sub_scales(name, w, s):
    low, high = SUB_SCALES[name]
    sub = w.unflatten(-1, (16, -1))
    scale = (s[..., 0:1] * rounded(s[..., 1:])).unsqueeze(-1)
    return (scale * rounded((sub / scale).clamp(low, high))).flatten(-2)


def float_codes(_, w, s):
    return s * e2m1((w / s).clamp(-6, 6))


FORWARD = {
    **dict.fromkeys(ONE_SCALE, one_scale),
    **dict.fromkeys(OFFSET, offset),
    **dict.fromkeys(ZERO_POINT, zero_point),
    **dict.fromkeys(SUB_MINIMA, sub_minima),
    **dict.fromkeys(SUB_SCALES, sub_scales),
    "mxfp4": float_codes,
    "nvfp4": float_codes,
}


def weights(rows=4, n=256, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, n)).astype(np.float32)


def in_blocks(w, s):
    """float32[rows, n] -> float64[rows, n / B, B]."""
    return torch.from_numpy(w).double().unflatten(-1, (s.shape[1], -1))


def held_scales(name, w):
    """The rule's scales, smaller so that weights are clipped, and as the file holds them."""
    s = _core.grid_choose(name, w)
    count = 2 if name in OFFSET or name in SUB_MINIMA else 1
    s[..., :count] *= np.random.default_rng(1).uniform(0.5, 0.9, (*s.shape[:2], count)).astype(np.float32)
    return _core.grid_store(name, s, w.shape[1])


@pytest.mark.parametrize("name", FORWARD)
def test_gradients_are_those_of_autograd(name):
    w, g = weights(), weights(seed=2)
    s = held_scales(name, w)
    latent = in_blocks(w, s).requires_grad_()
    scales = torch.from_numpy(s).double().requires_grad_()
    w_hat = FORWARD[name](name, latent, scales)
    # Float32 rounds products and sums of up to 4.
    np.testing.assert_allclose(
        w_hat.detach().flatten(1).numpy(), _core.grid_fake_quantize_with(name, w, s), rtol=1e-6, atol=1e-6
    )
    w_hat.backward(in_blocks(g, s))
    grad_w, grad_s = _core.grid_backward(name, w, s, g, "clipped_ste")
    np.testing.assert_array_equal(grad_w, latent.grad.flatten(1).numpy())
    # Float32 sums of up to 256 terms, of positions up to 256.
    size = np.abs(scales.grad.numpy()).max()
    np.testing.assert_allclose(grad_s, scales.grad.numpy(), rtol=1e-5, atol=2e-5 * size)


def signed_maximum(w):
    return torch.take_along_dim(w, w.abs().argmax(-1, keepdim=True), -1)


RULES = {
    "q4_0": lambda w: signed_maximum(w) / -8,
    "q5_0": lambda w: signed_maximum(w) / -16,
    "q8_0": lambda w: w.abs().amax(-1, keepdim=True) / 127,
    "q2_0": lambda w: w.abs().amax(-1, keepdim=True),
    "int4_g32": lambda w: w.abs().amax(-1, keepdim=True) / 7.5,
    "mobile4_g256": lambda w: w.abs().amax(-1, keepdim=True) / 7,
    "q4_1": lambda w: torch.cat([(w.amax(-1, True) - w.amin(-1, True)) / 15, w.amin(-1, True)], -1),
}


@pytest.mark.parametrize("name", RULES)
def test_a_differentiated_scale_is_that_of_autograd(name):
    w, g = weights(seed=3), weights(seed=4)
    s = _core.grid_choose(name, w)
    latent = in_blocks(w, s).requires_grad_()
    scales = RULES[name](latent)
    np.testing.assert_allclose(scales.detach().numpy(), s, rtol=1e-6)
    # Codes are held: what the end of a range rounds to must not depend on the last bit of its scale.
    codes = in_blocks(_core.grid_encode(name, w, s).astype(np.float32), s)
    inside = in_blocks(_core.grid_in_range(name, w, s).astype(np.float32), s)
    base = scales[..., 1:2] if name in OFFSET else 0.0
    place = (latent - base) / scales[..., 0:1]
    level = torch.where(inside > 0, straight_through(codes, place), codes)
    (scales[..., 0:1] * level + base).backward(in_blocks(g, s))
    grad_w, grad_s = _core.grid_backward(name, w, s, g, "clipped_ste")
    total = grad_w + _core.grid_choose_backward(name, w, grad_s)
    np.testing.assert_allclose(total, latent.grad.flatten(1).numpy(), rtol=1e-5, atol=1e-5)


def test_errors_name_the_row_or_the_rule():
    w = weights()
    s = _core.grid_choose("q4_0", w)
    s[2, 1] = np.nan
    for call in (
        lambda: _core.grid_fake_quantize_with("q4_0", w, s),
        lambda: _core.grid_backward("q4_0", w, s, w, "trust_mask"),
    ):
        with pytest.raises(libqat.NumericError, match=r"row 2: .*not finite"):
            call()
    with pytest.raises(
        libqat.UnsupportedError, match="q4_k: expected a grid whose scale rule has a gradient"
    ):
        _core.grid_choose_backward("q4_k", w, _core.grid_choose("q4_k", w))
    with pytest.raises(libqat.ArgumentError, match=r"gradients like the weights, \[4, 256\], got \[4, 128\]"):
        _core.grid_backward("q4_0", w, s, weights(n=128), "ste")
