"""Rounding the layers of any `torch.nn` model by what their inputs are; see `ptq`."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import _core
from ._core import ArgumentError, InputDrift, InputMoments, RoundedTensor
from .layer_sensitivity import ALIKE, Sensitivity
from .nn import QuantizedEmbedding, QuantizedLinear
from .prepare import Enabled, PreparedModel
from .weight_quantizer import WeightQuantizer

Progress = Callable[[int, int, str], Any]
"""(pieces of work done, in all, the weight at hand)."""

Solve = Callable[[Tensor, Tensor, Tensor | None, WeightQuantizer], tuple[Tensor, Tensor]]
"""(float32 [r, ...] of the weight's rows, Hessian, curvature of their outputs, what the weight carries) ->
(latents, scales)."""
_PART = 1 << 25
"""Weights that are solved together: 128 MB of float32, of which a solution takes a few copies."""
_TABLE_LEVELS = 64
"""Of 6 bits: with more, a table's own error is next to nothing."""


class Correction(NamedTuple):
    """How much of the drift of their inputs weights make up for, see `libqat.guided`."""

    share: float
    damping: float


class _Moments(NamedTuple):
    """Of a layer's inputs; drift: from the float model's, where it counts."""

    inputs: InputMoments
    drift: InputDrift | None


class _BlockReachedError(Exception):
    """Ends a forward pass behind the block that is being measured."""


def round_layers(
    function: str,
    prepared: PreparedModel,
    batches: Iterable[Any],
    blocks: Sequence[nn.Module] | None,
    forward: Callable[[nn.Module, Any], Any] | None,
    progress: Progress | None,
    solve: Solve,
    sensitivity: Sensitivity = ALIKE,
    correction: Correction | None = None,
) -> list[RoundedTensor]:
    """Measures and rounds tied heads, then all other linear layers, at once or block by block; see `gptq`."""
    if correction is not None and not 0 <= correction.share <= 1:
        raise ArgumentError(f"{function}: input_correction: expected 0 to 1, got {correction.share}")
    originals: dict[QuantizedLinear, Tensor] = {}
    heads, layers = tied_heads(function, prepared), linear_layers(function, prepared)
    groups: list[tuple[nn.Module | None, list[QuantizedLinear]]] = [(None, heads + layers)]
    if blocks is not None:
        groups = [(block, _layers_in(block, layers)) for block in blocks]
        if heads:
            groups.insert(0, (None, heads))
    total = sum(len(group) for _, group in groups)
    done: list[RoundedTensor] = []
    for block, group in groups:
        # without blocks the whole model is measured as it was; with blocks, behind those that are rounded
        drifts = correction is not None and correction.share > 0 and block is not None and originals
        with prepared.enabled(block is not None), Enabled([layer.weight_quantizer for layer in group], False):
            moments = _measure(
                prepared, batches, block, group, forward or call, sensitivity, originals if drifts else None
            )
        for layer in group:
            name = layer.weight_quantizer.tensor
            if layer in heads and layer not in moments:
                continue  # the caller's forward ends in front of the head
            if layer not in moments:
                raise ArgumentError(f"{function}: {name}: expected a batch that reaches the layer, got none")
            measured = moments.pop(layer)
            hessian = measured.inputs.second()
            if name in sensitivity.lookups:
                hessian += sensitivity.lookups[name]
            corrected = None
            if correction is not None and measured.drift is not None:
                corrected = _core.input_correction(
                    hessian, measured.drift.mean(), **correction._asdict(), tensor=name
                )
            if correction is not None and blocks is not None:
                originals[layer] = layer.weight.detach().clone()
            done.append(_round_layer(layer, hessian, sensitivity.outputs.get(name), corrected, solve))
            if progress is not None:
                progress(len(done), total, name)
    return done


def linear_layers(function: str, prepared: PreparedModel) -> list[QuantizedLinear]:
    """Quantized linear layers, one for each weight. Those on a float type have nothing to choose."""
    found = []
    for slot in prepared.slots:
        layer = slot.layers[0][1]
        if len(slot.layers) > 1 or not isinstance(layer, QuantizedLinear):
            continue
        if _core.grid_info(layer.weight_quantizer.grid)["is_float"]:
            continue
        _check_learned(function, layer)
        found.append(layer)
    return found


def _check_learned(function: str, layer: QuantizedLinear) -> None:
    if layer.weight_scales is None:
        raise ArgumentError(
            f"{function}: {layer.weight_quantizer.tensor}: expected a policy with learned scales, which hold "
            f"the result, got scale {layer.weight_quantizer.scale!r}"
        )


def tied_heads(function: str, prepared: PreparedModel) -> list[QuantizedLinear]:
    """Linear layers whose weight is an embedding's, too, where their inputs make a difference."""
    found = []
    for slot in prepared.slots:
        modules = [module for _, module in slot.layers]
        heads = [module for module in modules if isinstance(module, QuantizedLinear)]
        tables = [module for module in modules if isinstance(module, QuantizedEmbedding)]
        if len(heads) != 1 or len(heads) + len(tables) != len(modules) or not tables:
            continue
        info = _core.grid_info(heads[0].weight_quantizer.grid)
        if info["is_float"] or info["code_max"] - info["code_min"] >= _TABLE_LEVELS:
            continue
        _check_learned(function, heads[0])
        found.append(heads[0])
    return found


def _layers_in(block: nn.Module, layers: list[QuantizedLinear]) -> list[QuantizedLinear]:
    inside = set(block.modules())
    return [layer for layer in layers if layer in inside]


def call(model: nn.Module, batch: Any) -> Any:
    """model(batch), model(*batch) or model(**batch)."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


class _Swapped:
    """The weights of layers as they were before they were rounded, for a `with` block."""

    def __init__(self, originals: Mapping[QuantizedLinear, Tensor]):
        self._originals = originals

    def __enter__(self) -> None:
        self._rounded = {layer: layer.weight.data for layer in self._originals}
        for layer, original in self._originals.items():
            layer.weight.data = original

    def __exit__(self, *_: Any) -> None:
        for layer, rounded in self._rounded.items():
            layer.weight.data = rounded


@torch.no_grad()
def _measure(
    prepared: PreparedModel,
    batches: Iterable[Any],
    block: nn.Module | None,
    layers: list[QuantizedLinear],
    forward: Callable[[nn.Module, Any], Any],
    sensitivity: Sensitivity,
    originals: Mapping[QuantizedLinear, Tensor] | None,
) -> dict[QuantizedLinear, _Moments]:
    """originals: weights of rounded layers, where the drift of the inputs behind them counts."""
    moments: dict[QuantizedLinear, _Moments] = {}
    calls: Counter[QuantizedLinear] = Counter()
    references: dict[QuantizedLinear, list[Tensor]] = {layer: [] for layer in layers}
    as_float = False

    def record(layer: QuantizedLinear, inputs: tuple[Tensor, ...]) -> None:
        if as_float:
            references[layer].append(inputs[0])
            return
        if layer not in moments:
            width = layer.in_features
            moments[layer] = _Moments(InputMoments(width), None if originals is None else InputDrift(width))
        counts = sensitivity.tokens.get(layer.weight_quantizer.tensor)
        counted = None if counts is None else counts[calls[layer]]
        measured = moments[layer]
        measured.inputs.add(inputs[0], counted)
        if measured.drift is not None:
            measured.drift.add(references[layer].pop(0), inputs[0], counted)
        calls[layer] += 1

    def stop(*_: Any) -> None:
        raise _BlockReachedError

    def run(batch: Any) -> None:
        with suppress(_BlockReachedError):
            forward(model, batch)

    model = prepared.model
    hooks = [layer.register_forward_pre_hook(record) for layer in layers]
    if block is not None:
        hooks.append(block.register_forward_hook(stop))
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for batch in batches:
            if originals is not None:
                as_float = True
                with prepared.enabled(False), _Swapped(originals):
                    run(batch)
                as_float = False
            run(batch)
    finally:
        for module, training in modes:
            module.training = training
        for hook in hooks:
            hook.remove()
    return moments


@torch.no_grad()
def _round_layer(
    layer: QuantizedLinear, hessian: Tensor, curvature: Tensor | None, correction: Tensor | None, solve: Solve
) -> RoundedTensor:
    """Solves in parts, so that a vocabulary's table needs memory for a part of it only."""
    quantizer = layer.weight_quantizer
    step, group = len(layer.weight), 1 if curvature is None else curvature.shape[1]
    if not _core.grid_info(quantizer.grid)["whole_tensor"]:
        step = min(step, max(group, _PART // layer.weight[0].numel() // group * group))
    outputs = errors = 0.0
    kl = None if curvature is None else 0.0
    for number, (part, held) in enumerate(
        zip(layer.weight.split(step), layer.weight_scales.split(step), strict=True)
    ):
        before = part.clone()
        rows = before if correction is None else before + before @ correction.to(before)
        first = number * step // group
        own = None if curvature is None else curvature[first : first - (-len(part) // group)]
        latent, scales = solve(rows, hessian, own, quantizer)
        part.copy_(latent)
        held.copy_(quantizer.untied(scales))
        shipped = torch.ops.libqat.fake_quantize(
            part, quantizer.grid, "ste", "learned", quantizer.tensor, scales.to(part.device), "lsq"
        )
        outputs += _energy(before, hessian)
        errors += _energy(before - shipped, hessian)
        if own is not None:
            kl += _core.expected_kl((rows - shipped).flatten(1), hessian, own)
    return RoundedTensor(quantizer.tensor, quantizer.grid, (errors / max(outputs, 1e-300)) ** 0.5, kl)


def _energy(rows: Tensor, hessian: Tensor) -> float:
    rows = rows.cpu()
    return max(0.0, float((rows @ hessian.float() * rows).sum(dtype=torch.float64)))
