"""Which weights of a `torch.nn` model can be quantized, and which of them must not be."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from ._core import ArgumentError, Policy, UnsupportedError, grid_info
from .experts import ExpertMatrix
from .nn import FLOAT, is_known, is_quantized, owner_of, weights_of


@dataclass(frozen=True)
class Slot:
    """One quantizable weight and every layer that uses it (several when it is tied)."""

    name: str
    """state_dict key under the first layer that uses it: "model.embed_tokens.weight"."""
    kind: str
    """The first layer's kind: "linear", "embedding" or "conv"."""
    shape: tuple[int, ...]
    layers: tuple[tuple[str, nn.Module | ExpertMatrix], ...]
    """(name, layer) of each layer whose weight this is; a 3-D parameter of experts is a layer of its own."""

    @property
    def target(self) -> tuple[str, str, tuple[int, ...]]:
        """Name, kind and shape as a policy sees them: experts as the rows of one matrix."""
        *rows, width = self.shape
        experts = isinstance(self.layers[0][1], ExpertMatrix)
        return self.name, self.kind, (math.prod(rows), width) if experts else self.shape


def find_slots(model: nn.Module) -> list[Slot]:
    """Slots of Linear, Embedding, Conv* and ConvTranspose* layers and of their subclasses, in model order.

    And of modules with experts in 3-D parameters.
    """
    groups: dict[int, list[tuple[str, str, str, nn.Module | ExpertMatrix]]] = {}
    for name, module in model.named_modules():
        for key, kind, layer in weights_of(module):
            path = f"{name}.{key}" if name else key
            layer_name = path if isinstance(layer, ExpertMatrix) else name
            groups.setdefault(id(layer.weight), []).append((path, kind, layer_name, layer))
    slots = []
    for uses in groups.values():
        path, kind, _, layer = uses[0]
        slots.append(Slot(path, kind, tuple(layer.weight.shape), tuple(use[2:] for use in uses)))
    return slots


def scale_names(model: nn.Module) -> set[str]:
    """state_dict keys of learned scales, under every layer that uses them."""
    return {
        f"{name}.{key}_scales" if name else f"{key}_scales"
        for name, module in model.named_modules()
        for key, _, layer in weights_of(module)
        if is_quantized(layer)
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
        tensor = next(
            weight.weight_quantizer.tensor for _, _, weight in weights_of(layer) if is_quantized(weight)
        )
        raise UnsupportedError(
            f"prepare: {tensor}: expected a layer without PEFT adapters, got "
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
        whole = any(
            layer.weight.dim() > 1 for key, _, layer in weights_of(module) if key in module._parameters
        )
        flat = type(module) in FLOAT and not whole
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
    grids = policy.resolve([slot.target for slot in slots])
    for slot, grid in zip(slots, grids, strict=True):
        for name, module in slot.layers:
            actual = module.weight_quantizer.grid if is_quantized(module) else "f32"
            if actual != grid:
                raise ArgumentError(
                    f"freeze: {name}: expected a layer on the grid {grid} as the policy says, got "
                    f"{type(owner_of(module)).__name__} on {actual}: it was replaced after prepare"
                )


def check_slots(model: nn.Module, slots: list[Slot], grids: list[str]) -> None:
    """Refuses the slots that a policy puts on `grids` if their layers would not use the quantized weight.

    UnsupportedError lists all of them with the reasons; ArgumentError names a latent of a wrong dtype.
    """
    uses = _parameter_uses(model)
    reasons = []
    for slot, grid in zip(slots, grids, strict=True):
        layers = {id(owner_of(layer)) for _, layer in slot.layers}
        for name, layer in slot.layers:
            reasons += [f"{name or 'model'}: {reason}" for reason in _reasons(layer, grid)]
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


def _reasons(module: nn.Module | ExpertMatrix, grid: str) -> list[str]:
    """Why this layer cannot be re-classed; empty when it can."""
    layer = type(owner_of(module))
    if not is_known(layer):
        return [f"{layer.__module__}.{layer.__qualname__} is a subclass with a forward of its own"]
    if isinstance(module, ExpertMatrix):
        info = grid_info(grid)
        wide = not info["is_float"] and (info["block"] is None or info["whole_tensor"])
        reason = f"experts need a grid with blocks inside a row, and {grid} has none"
        return module.reasons() + ([reason] if wide else [])
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
    layers = {id(owner_of(layer)) for slot in slots for _, layer in slot.layers}
    return [
        f"{name or 'model'}: nn.TransformerEncoderLayer bypasses its layers' forward in eval mode; call "
        "torch.backends.mha.set_fastpath_enabled(False) first"
        for name, module in model.named_modules()
        if isinstance(module, nn.TransformerEncoderLayer) and any(id(m) in layers for m in module.modules())
    ]
