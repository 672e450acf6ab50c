"""Activations as consumers round them.

These are the inputs and outputs of layers, and the keys and values that attention keeps; `prepare` sets it
up where a policy says so. The scale of "int8_tensor_static" is part of the model's state: a float32 [1]
buffer, or a parameter when it is learned, beside a count of the batches that its calibration has seen.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ._core import NumericError

_ops = torch.ops.libqat

STATIC = "int8_tensor_static"
"""The format with one scale per tensor."""


@dataclass
class ActivationRounding:
    """How one place in a model rounds what passes through it. The scale is a member of the module it is in.

    It grows to max|x| / 127 while it calibrates: in the first `batches` forward passes in training mode, and
    in all that run within `PreparedModel.calibrating`. A pass that activation checkpointing repeats is not
    counted again. Afterwards the scale stays, or trains. Until the first batch it is 0: nothing is rounded.
    """

    name: str
    """Of the scale in checkpoints: "model.layers.0.mlp.up_proj.input_activation_scale"."""
    format: str
    """"int8_tensor_static", "int8_token" or "q8_0", see `libqat.ops.fake_quantize_activation`."""
    rule: str = "observed"
    """"observed": the scale stays what calibration found. "learned": it is a parameter that starts there."""
    batches: int = 16
    """Batches of calibration in training mode."""
    calibrating: bool = False
    """True: every pass calibrates."""
    enabled: bool = True
    """False: activations pass as they are."""
    open: bool = True
    """False once all batches were seen: then forward need not look at the count."""

    @property
    def scale_key(self) -> str:
        """The scale's name in its module."""
        return self.name.rpartition(".")[2]

    @property
    def count_key(self) -> str:
        """The count's name in its module."""
        return f"{self.scale_key}_batches"

    @property
    def static(self) -> bool:
        """Whether there is a scale."""
        return self.format == STATIC

    def register(self, module: nn.Module, device: torch.device) -> None:
        """Gives the module the scale and the count."""
        if not self.static:
            return
        scale = torch.zeros(1, device=device)
        if self.rule == "learned":
            module.register_parameter(self.scale_key, nn.Parameter(scale))
        else:
            module.register_buffer(self.scale_key, scale)
        module.register_buffer(self.count_key, torch.zeros(1, dtype=torch.int64, device=device))

    def unregister(self, module: nn.Module) -> None:
        """The reverse of `register`."""
        if self.static:
            delattr(module, self.scale_key)
            delattr(module, self.count_key)

    def scale(self, module: nn.Module) -> Tensor:
        """float32 [1]."""
        return getattr(module, self.scale_key)

    def __call__(self, module: nn.Module, x: Tensor, observe: bool = True) -> Tensor:
        """x_hat, differentiable; x: [..., I] float32, bfloat16 or float16. `module` holds the scale.

        observe: False for what another call of the same pass has shown already.
        """
        if not self.enabled:
            return x
        label = "" if torch.compiler.is_compiling() else self.name
        if not self.static:
            return _ops.fake_quantize_activation(x, self.format, None, label)
        calibrates = self.calibrating or (self.open and module.training)
        if calibrates and observe:
            calibrates = self._observe(module, x)
        scale = self.scale(module)
        if calibrates:
            scale = scale.detach().clone()  # a later pass widens it, perhaps before this one's backward
        return _ops.fake_quantize_activation(x, self.format, scale.reshape(()), label)

    @torch.compiler.disable
    @torch.no_grad()
    def _observe(self, module: nn.Module, x: Tensor) -> bool:
        """Widens the scale to x, unless calibration is over; whether it is not."""
        count = getattr(module, self.count_key)
        if not self.calibrating and int(count) >= self.batches:
            self.open = False
            return False
        if torch._C._current_graph_task_id() != -1:  # checkpointing repeats a forward pass within backward
            return True
        seen = x.detach().abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(seen, torch.distributed.ReduceOp.MAX)
        if not torch.isfinite(seen):
            raise NumericError(
                f"calibration: {self.name}: expected finite activations, got NaN or an infinity"
            )
        scale = self.scale(module)
        scale.copy_(torch.maximum(scale, (seen.double() / 127).float()))
        count += 1
        return True


def roundings_of(module: nn.Module) -> dict[str, ActivationRounding]:
    """What the module itself rounds: "input", "output", "keys", "values" -> how."""
    return getattr(module, "activation_roundings", {})


def add_rounding(module: nn.Module, place: str, rounding: ActivationRounding, device: torch.device) -> None:
    """Lets the module round there; its forward must call `rounded`."""
    roundings = module.__dict__.setdefault("activation_roundings", {})
    if not roundings:
        # a loaded count decides anew whether calibration is over
        module.register_load_state_dict_post_hook(_reopen)
    roundings[place] = rounding
    rounding.register(module, device)


def remove_roundings(module: nn.Module) -> None:
    """The reverse of `add_rounding`, for all places."""
    for rounding in module.__dict__.pop("activation_roundings", {}).values():
        rounding.unregister(module)


def rounded(module: nn.Module, place: str, x: Tensor, observe: bool = True) -> Tensor:
    """What the module makes of x there, or x itself. observe: see ActivationRounding."""
    rounding = roundings_of(module).get(place)
    return x if rounding is None else rounding(module, x, observe)


def activation_state(module: nn.Module) -> list[Tensor]:
    """The scales that are members of this module."""
    return [rounding.scale(module) for rounding in roundings_of(module).values() if rounding.static]


def _reopen(module: nn.Module, _: Any) -> None:
    for rounding in roundings_of(module).values():
        rounding.open = True


def activation_names(model: nn.Module) -> tuple[dict[str, str], set[str]]:
    """state_dict key of each activation scale -> its name in checkpoints, and the keys of the counts."""
    scales, counts = {}, set()
    for path, module in model.named_modules():
        for rounding in roundings_of(module).values():
            if rounding.static:
                prefix = f"{path}." if path else ""
                scales[prefix + rounding.scale_key] = rounding.name
                counts.add(prefix + rounding.count_key)
    return scales, counts
