"""Experts of a mixture as transformers 5 keeps them: one module, and a 3-D parameter per matrix.

Such a module has `num_experts`, the parameters `gate_up_proj` [E, 2F, I] (or `up_proj`) and `down_proj`
[E, I, F], and a forward (hidden_states [T, I], top_k_index [T, K], top_k_weights [T, K]) -> [T, I]. Legend: E
experts, T tokens, K experts per token, I and F features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .weight_quantizer import WeightQuantizer

_ops = torch.ops.libqat

_MATRICES = ("gate_up_proj", "up_proj", "down_proj")
_MARKS = ("num_experts", "has_gate", "has_bias", "is_transposed")
"""What transformers' decorator for experts sets on the module."""


def is_experts(module: nn.Module) -> bool:
    """Whether the module keeps its experts in 3-D parameters, by transformers' convention."""
    return all(hasattr(module, mark) for mark in _MARKS) and bool(matrices_of(module))


def matrices_of(module: nn.Module) -> list[str]:
    """Names of the 3-D parameters."""
    found = ((key, module._parameters.get(key)) for key in _MATRICES)
    return [key for key, weight in found if weight is not None and weight.dim() == 3]


class ExpertMatrix:
    """One 3-D parameter of an experts module, seen as a layer with a `weight`."""

    def __init__(self, module: nn.Module, key: str):
        self.module = module
        self.key = key

    @property
    def weight(self) -> nn.Parameter:
        """The latents, [E, O, I]."""
        return self.module._parameters[self.key]

    @property
    def weight_quantizer(self) -> WeightQuantizer:
        """Where the weight ships and how its gradient flows."""
        return self.module.expert_quantizers[self.key]

    @property
    def weight_scales(self) -> nn.Parameter | None:
        """Learned scales, float32 [E, G, P] ([E, G, F] of SEQ); None where a rule gives them."""
        return self.module._parameters[f"{self.key}_scales"]

    def register_parameter(self, name: str, parameter: nn.Parameter | None) -> None:
        """Registers `weight_scales` under this matrix's name."""
        self.module.register_parameter(name.replace("weight", self.key), parameter)

    def reasons(self) -> list[str]:
        """Why forward could not use quantized weights; empty when it can."""
        module = self.module
        found = []
        if module.is_transposed:
            found.append("its matrices are transposed, so that blocks of a grid would run across outputs")
        if module.has_bias:
            found.append("experts with biases are not known")
        if getattr(module, "_is_expert_parallel", False):
            found.append("its experts are spread over devices")
        return found


class QuantizedExperts(nn.Module):
    """An experts module whose forward sees the numbers that ship, of the experts that a batch reaches."""

    expert_quantizers: dict[str, WeightQuantizer]
    """By the parameter's name; matrices that stay float have none."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The module's own forward, with the quantized weights of the experts in `top_k_index` alone."""
        reached, places = top_k_index.unique(return_inverse=True)
        weights = {key: self._reached(key, reached, hidden_states.dtype) for key in matrices_of(self)}
        with _standing_in(self, {"num_experts": reached.numel(), **weights}):
            return super().forward(hidden_states, places, *args, **kwargs)

    def _reached(self, key: str, reached: Tensor, dtype: torch.dtype) -> Tensor:
        """The matrices of the experts `reached` (int64 [N]) as forward multiplies with them, [N, O, I]."""
        weight = self._parameters[key]
        quantizer = self.expert_quantizers.get(key)
        if quantizer is None:
            return weight.index_select(0, reached).to(dtype)

        def quantized() -> Tensor:
            rows = _ops.quantized_embedding(
                reached,
                weight.flatten(1),
                -1,
                *quantizer.rules,
                quantizer.field_scales(self._parameters[f"{key}_scales"]),
                quantizer.scale_gradient,
            )
            return rows.view(-1, *weight.shape[1:])

        return quantizer.blended(lambda: weight.index_select(0, reached), quantized).to(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedExperts:
        from .nn import apply_keeping_latents

        latents = []
        for key in self.expert_quantizers:
            latents += [self._parameters[key], self._parameters[f"{key}_scales"]]
        apply_keeping_latents(
            self, list(self.expert_quantizers.values()), latents, super()._apply, fn, recurse
        )
        return self


@contextmanager
def _standing_in(module: nn.Module, values: dict[str, Any]) -> Iterator[None]:
    """Lets attributes of the module be these values: an entry of __dict__ comes before a parameter."""
    former = {key: module.__dict__[key] for key in values if key in module.__dict__}
    module.__dict__.update(values)
    try:
        yield
    finally:
        for key in values:
            del module.__dict__[key]
        module.__dict__.update(former)
