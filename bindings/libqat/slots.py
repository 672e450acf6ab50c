"""Which weights of a `torch.nn` model can be quantized, and which of them must not be."""

from dataclasses import dataclass

import torch
from torch import nn

from ._core import ArgumentError, UnsupportedError
from .nn import FLOAT, QUANTIZED, kind_of


@dataclass(frozen=True)
class Slot:
    """One quantizable weight and every layer that uses it (several when it is tied)."""

    name: str
    """state_dict key under the first layer that uses it: "model.embed_tokens.weight"."""
    kind: str
    """The first layer's kind: "linear", "embedding" or "conv"."""
    shape: tuple[int, ...]
    layers: tuple[tuple[str, nn.Module], ...]
    """(name, module) of each layer whose weight this is."""


def find_slots(model: nn.Module) -> list[Slot]:
    """Slots of Linear, Embedding, Conv* and ConvTranspose* layers and of their subclasses, in model order."""
    groups: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None) if kind_of(module) else None
        if isinstance(weight, torch.Tensor):
            groups.setdefault(id(weight), []).append((name, module))
    slots = []
    for layers in groups.values():
        name, module = layers[0]
        key = f"{name}.weight" if name else "weight"
        slots.append(Slot(key, kind_of(module), tuple(module.weight.shape), tuple(layers)))
    return slots


def check_model(model: nn.Module) -> None:
    """UnsupportedError for models that cannot be prepared as a whole."""
    for name, module in model.named_modules():
        bases = type(module).__mro__
        if any(base.__module__.split(".")[0] == "peft" for base in bases):
            raise UnsupportedError(
                f"prepare: {name or 'model'}: expected a model without PEFT adapters, got "
                f"{type(module).__name__}: PEFT computes Q(W)x + BAx, which cannot be merged into Q(W); "
                "merge the adapters first"
            )
        if any(base.__name__ == "FSDPModule" for base in bases):
            raise UnsupportedError(
                f"prepare: {name or 'model'}: expected a model before fully_shard, got a sharded one: "
                "call prepare first, then fully_shard"
            )


def check_slots(model: nn.Module, slots: list[Slot]) -> None:
    """Refuses the slots (those that a policy puts on a grid) whose layers would not use the quantized weight.

    UnsupportedError lists all of them with the reasons; ArgumentError names a latent of a wrong dtype.
    """
    uses = _parameter_uses(model)
    reasons = []
    for slot in slots:
        layers = {id(module) for _, module in slot.layers}
        for name, module in slot.layers:
            reasons += [f"{name or 'model'}: {reason}" for reason in _reasons(module)]
        weight = slot.layers[0][1].weight
        for key, owner in uses.get(id(weight), []):
            if id(owner) not in layers:
                reasons.append(f"{slot.name}: is also the parameter {key}, which would stay unquantized")
    reasons += _fast_path(model, slots)
    if reasons:
        raise UnsupportedError(
            "prepare: expected layers that libqat knows, got\n  "
            + "\n  ".join(reasons)
            + '\nLeave such layers float with a rule {"match": ..., "weight": "f32"} before the others.'
        )
    for slot in slots:
        dtype = slot.layers[0][1].weight.dtype
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ArgumentError(f"prepare: {slot.name}: expected float32, bfloat16 or float16, got {dtype}")


def _parameter_uses(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    uses: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            uses.setdefault(id(parameter), []).append((f"{name}.{key}" if name else key, module))
    return uses


def _reasons(module: nn.Module) -> list[str]:
    """Why this layer cannot be re-classed; empty when it can."""
    layer = type(module)
    if layer not in QUANTIZED and layer not in FLOAT:
        return [f"{layer.__module__}.{layer.__qualname__} is a subclass with a forward of its own"]
    if "weight" not in module._parameters:
        return ["its weight is computed (weight_norm or the like), so it is no latent"]
    if isinstance(module, nn.Embedding):
        options = ("max_norm", "scale_grad_by_freq", "sparse")
        return [f"nn.Embedding with {option}" for option in options if getattr(module, option)]
    return []


def _fast_path(model: nn.Module, slots: list[Slot]) -> list[str]:
    """In eval mode nn.TransformerEncoderLayer reads its layers' weights itself, past their forward."""
    if not torch.backends.mha.get_fastpath_enabled():
        return []
    layers = {id(module) for slot in slots for _, module in slot.layers}
    return [
        f"{name or 'model'}: nn.TransformerEncoderLayer bypasses its layers' forward in eval mode; call "
        "torch.backends.mha.set_fastpath_enabled(False) first"
        for name, module in model.named_modules()
        if isinstance(module, nn.TransformerEncoderLayer) and any(id(m) in layers for m in module.modules())
    ]
