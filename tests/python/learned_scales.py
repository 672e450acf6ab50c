"""What the tests of learned scales share: weights, scales away from the rule's, gradients."""

import torch

import libqat
from libqat import ops

LSQ = {"kind": "lsq"}
INTEGER = [name for name, grid in libqat.grids().items() if grid.codes]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight_of(seed=0):
    """Rows of 256 weights of other sizes; all grids divide them."""
    return normal(6, 256, seed=seed) * torch.tensor([0.02, 0.05, 0.1, 0.3, 1.0, 3.0])[:, None]


def moved(scales, seed=1, most=0.3):
    """Scales away from the rule's, so that weights are clipped and no gradient is trivially zero."""
    return scales * (1 - most * torch.rand(scales.shape, generator=torch.Generator().manual_seed(seed)))


def block_of(grid, weight):
    info = libqat.grids()[grid]
    return weight.numel() if info.whole_tensor else info.block or weight.shape[1]


def with_learned(weight, scales, grid, gradient, kind="clipped_ste", scale_gradient="plain"):
    """dL/dw and dL/ds of sum(gradient * w_hat)."""
    weight, scales = weight.clone().requires_grad_(), scales.clone().requires_grad_()
    w_hat = ops.fake_quantize(weight, grid, kind, "learned", "w", scales, scale_gradient)
    w_hat.backward(gradient)
    return weight.grad, scales.grad
