"""libqat's decoder beside transformers on the same weights and tokens."""

from __future__ import annotations

import torch

import libqat


def _loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def compare(reference: torch.nn.Module, decoder: libqat.Decoder, tokens: torch.Tensor) -> dict[str, float]:
    """The largest difference of a logit, and of a gradient.

    tokens: int64[B, T]. parity_max_abs: over all logits, float32[B, T, V], of which `logit_spread` is the
    standard deviation. grad_parity: over all parameters, the largest difference of an entry of the gradient
    of the mean cross-entropy, as a share of the largest entry of that parameter's gradient.
    """
    decoder.set_trainable(True)
    expected, found = reference(tokens).logits, decoder(tokens)
    _loss(expected, tokens).backward()
    _loss(found, tokens).backward()
    parameters = decoder.parameters()
    shares = []
    for name, parameter in reference.named_parameters():
        difference = (parameters[name].grad - parameter.grad).abs().max()
        shares.append((difference / parameter.grad.abs().max()).item())
    return {
        "parity_max_abs": (found - expected).abs().max().item(),
        "logit_spread": expected.std().item(),
        "grad_parity": max(shares),
    }
