"""Models whose weights lie on a grid already, taken up so that they stay on it.

`lattice` is for checkpoints that hold floats (such as those named "-qat-q4_0-unquantized"): it finds each
block's own scale. `take_up` is for those that hold codes and scales (Gemma's mobile folders,
compressed-tensors, GGUF):

>>> checkpoint = libqat.import_checkpoint("gemma-mobile-folder")
>>> prepared = libqat.prepare(model, policy)  # with learned scales, on the checkpoint's grids
>>> libqat.take_up(prepared, checkpoint)

Either way `freeze`, without a step of training in between, gives the codes and scales that were there.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import _core
from ._core import ArgumentError, Lattice, PreparedDecoder, QuantizedCheckpoint
from .activations import activation_names, roundings_of
from .experts import ExpertMatrix
from .layer_rounding import Progress
from .prepare import PreparedModel
from .slots import Slot, scale_names

__all__ = ["LatticeTensor", "lattice", "take_up"]


class LatticeTensor(NamedTuple):
    """What `lattice` found of one tensor."""

    name: str
    """state_dict key."""
    grid: str
    lattice: Lattice


def lattice(
    prepared: "PreparedModel | PreparedDecoder", *, progress: Progress | None = None
) -> list[LatticeTensor]:
    """Sets the learned scales to those of the lattice that the weights lie on; the latents stay.

    For float checkpoints that were trained on a grid. The scale of a block is a number for which all its
    products code * scale round to the weights, in the type that the file had. Where they leave a choice, a
    tensor's blocks are read alike: by the grid's own rule if that explains them, else by the largest step.
    Tensors on grids of other kinds (with offsets, K-quants), and those that lie on no lattice, get the scales
    of the grid's rule, as its quantizer would set them. Training moves the scales unless they are held
    (`scale_learning_rate` 0).

    prepared: with learned scales. Returns what was found; `exact` of `blocks` says how much of a tensor is on
    its lattice. ArgumentError unless scales are learned.
    """
    if isinstance(prepared, PreparedDecoder):
        return [LatticeTensor(*one) for one in _core.apply_lattice(prepared, progress)]
    found = []
    slots = prepared.slots
    for done, slot in enumerate(slots):
        if progress is not None:
            progress(done, len(slots), slot.name)
        layer = slot.layers[0][1]
        quantizer = layer.weight_quantizer
        if _core.grid_info(quantizer.grid)["is_float"]:
            continue
        _check_learned("lattice", slot)
        if quantizer.tied or not _core.has_lattice(quantizer.grid):
            _set_scales(slot, quantizer.start(layer.weight, "reference"))
            continue
        one = _core.find_lattice(_matrix(layer), quantizer.grid, slot.name)
        _set_scales(slot, one.scales)
        found.append(LatticeTensor(slot.name, quantizer.grid, one))
    return found


def take_up(prepared: "PreparedModel | PreparedDecoder", checkpoint: QuantizedCheckpoint) -> None:
    """Makes a checkpoint's numbers those of a prepared model.

    Its dequantized weights become the latents, its scales the learned scales, and its static activation
    scales those of the activations, which then count as calibrated. Those that it lacks stay as they are.

    prepared: with learned scales on the checkpoint's grids (`convert_tensors` moves a checkpoint to others).
    ArgumentError for another grid, for scales that are not learned, and for tensors that do not fit; nothing
    is changed then.
    """
    if isinstance(prepared, PreparedDecoder):
        _core.take_up(prepared, checkpoint)
        return
    tensors = {slot.name: _checked(slot, checkpoint) for slot in prepared.slots}
    scales, counts = activation_names(prepared.model)
    own = scale_names(prepared.model) | set(scales) | counts
    weights = {
        key: value
        for key, value in _core.dequantize(checkpoint).items()
        if not key.endswith(("_activation_scale", "_cache_scale"))
    }
    state = prepared.model.state_dict()
    missing = [
        key for key in state if key not in own and key not in weights and not _tied(state, key, weights)
    ]
    extra = [key for key in weights if key not in state]
    if missing or extra:
        raise ArgumentError(
            f"take_up: expected the model's tensors, got none for {missing[:4]} and others as {extra[:4]}"
        )
    prepared.model.load_state_dict(weights, strict=False)
    for slot in prepared.slots:
        if (tensor := tensors[slot.name]) is not None:
            _set_scales(slot, tensor.scales)
    _set_activation_scales(prepared, checkpoint)


def _check_learned(function: str, slot: Slot) -> None:
    quantizer = slot.layers[0][1].weight_quantizer
    if not quantizer.learned or quantizer.training_grid:
        raise ArgumentError(
            f"{function}: {slot.name}: expected a policy with learned scales, which hold the result, "
            f"got scale {quantizer.scale!r}"
        )


def _checked(slot: Slot, checkpoint: QuantizedCheckpoint) -> "_core.QuantizedTensor | None":
    quantizer = slot.layers[0][1].weight_quantizer
    if _core.grid_info(quantizer.grid)["is_float"]:
        return None
    tensor = checkpoint.quantized.get(checkpoint.aliases.get(slot.name, slot.name))
    found = "none" if tensor is None else tensor.grid
    if tensor is None or found != quantizer.grid:
        raise ArgumentError(
            f"take_up: {slot.name}: expected a tensor on {quantizer.grid}, got {found} in the checkpoint"
        )
    _check_learned("take_up", slot)
    return tensor


def _matrix(layer: "nn.Module | ExpertMatrix") -> Tensor:
    weight = layer.weight.detach()
    return weight.flatten(0, 1) if isinstance(layer, ExpertMatrix) else weight


@torch.no_grad()
def _set_scales(slot: Slot, scales: Tensor) -> None:
    layer = slot.layers[0][1]
    own = layer.weight_scales
    own.copy_(layer.weight_quantizer.untied(scales).reshape(own.shape))


def _tied(state: dict[str, Tensor], key: str, weights: dict[str, Tensor]) -> bool:
    """Whether another name of the same tensor is among the weights."""
    return any(other in weights and state[other] is state[key] for other in state)


@torch.no_grad()
def _set_activation_scales(prepared: PreparedModel, checkpoint: QuantizedCheckpoint) -> None:
    # libqat's own decoder names the scales of a tied head by its table
    tables = {name: slot.name.removesuffix(".weight") for slot in prepared.slots for name, _ in slot.layers}
    for path, module in prepared.model.named_modules():
        for rounding in roundings_of(module).values():
            names = (rounding.name, f"{tables.get(path, path)}.{rounding.scale_key}")
            scale = next((checkpoint.floats[name] for name in names if name in checkpoint.floats), None)
            if rounding.static and scale is not None:
                rounding.scale(module).fill_(scale.float().item())
                getattr(module, rounding.count_key).fill_(rounding.batches)
