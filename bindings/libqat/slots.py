"""Which weights of a `torch.nn` model can be quantized, and which of them must not be."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from ._core import ArgumentError, Policy, UnsupportedError
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


def scale_names(model: nn.Module) -> set[str]:
    """state_dict keys of learned scales, under every layer that uses them."""
    return {
        f"{name}.weight_scales" if name else "weight_scales"
        for name, module in model.named_modules()
        if type(module) in FLOAT
    }


_ADAPTERS = (
    "PEFT computes Q(W)x + BAx, which cannot be merged into Q(W), so the file would not hold what was trained"
)


def is_adapter(module: nn.Module) -> bool:
    """True for PEFT's models and layers, their subclasses included."""
    return any(base.__module__.split(".")[0] == "peft" for base in type(module).__mro__)


def _class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _is_a(module: nn.Module, *names: str) -> bool:
    return any(base.__name__ in names for base in type(module).__mro__)


def _refuse_adapter(module: nn.Module, name: str, layer: nn.Module | None) -> None:
    """Stops `get_peft_model` at the first quantized layer it wraps, before anything was replaced."""
    if type(layer) in FLOAT and is_adapter(module):
        raise UnsupportedError(
            f"prepare: {layer.weight_quantizer.tensor}: expected a layer without PEFT adapters, got "
            f"{_class_name(module)}: {_ADAPTERS}; train the prepared model itself"
        )


register_module_module_registration_hook(_refuse_adapter)


def check_model(model: nn.Module) -> None:
    """UnsupportedError for models that cannot be prepared as a whole."""
    for name, module in model.named_modules():
        if is_adapter(module):
            raise UnsupportedError(
                f"prepare: {name or 'model'}: expected a model without PEFT adapters, got "
                f"{_class_name(module)}: {_ADAPTERS}; merge the adapters first"
            )
        if _is_a(module, "FSDPModule", "FullyShardedDataParallel"):
            raise UnsupportedError(
                f"prepare: {name or 'model'}: expected a model before fully_shard, got a sharded one: "
                "call prepare first, then fully_shard (or FSDP)"
            )


def check_whole(model: nn.Module, function: str) -> None:
    """UnsupportedError, in the name of `function`, when FSDP keeps only a part of the weights here."""
    for name, module in model.named_modules():
        # FSDP1 leaves a flat piece in the layer's place, or a view that is no parameter; its wrapper may be
        # outside of this module
        weight = module._parameters.get("weight") if type(module) in FLOAT else None
        flat = type(module) in FLOAT and (weight is None or weight.dim() < 2)
        if flat or _is_a(module, "FSDPModule"):
            raise UnsupportedError(
                f"{function}: {name or 'model'}: expected whole weights, got those that FSDP split: load the "
                "full state_dict into a prepared model that is not sharded, and use that"
            )


def check_prepared(model: nn.Module, policy: Policy) -> None:
    """Refuses to freeze a prepared model whose layers no longer compute what the policy says.

    UnsupportedError for adapters and for sharded weights; ArgumentError for a layer that was replaced.
    """
    for name, module in model.named_modules():
        if is_adapter(module):
            raise UnsupportedError(
                f"freeze: {name or 'model'}: expected a model without PEFT adapters, got "
                f"{_class_name(module)}: {_ADAPTERS}"
            )
    check_whole(model, "freeze")
    slots = find_slots(model)
    grids = policy.resolve([(slot.name, slot.kind, slot.shape) for slot in slots])
    for slot, grid in zip(slots, grids, strict=True):
        for name, module in slot.layers:
            actual = module.weight_quantizer.grid if type(module) in FLOAT else "f32"
            if actual != grid:
                raise ArgumentError(
                    f"freeze: {name}: expected a layer on the grid {grid} as the policy says, got "
                    f"{type(module).__name__} on {actual}: it was replaced after prepare"
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
    if hasattr(module.weight, "full_tensor"):
        return ["its weight is a DTensor (tensor parallelism): a block of the grid may be cut in two"]
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
