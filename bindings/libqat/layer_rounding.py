"""Rounding the layers of any `torch.nn` model by what their inputs are; see `ptq`."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import _core
from ._core import ArgumentError, InputMoments, RoundedTensor
from .nn import QuantizedEmbedding, QuantizedLinear, WeightQuantizer
from .prepare import Enabled, PreparedModel

Progress = Callable[[int, int, str], Any]
"""(pieces of work done, in all, the weight at hand)."""

Solve = Callable[[Tensor, Tensor, WeightQuantizer], tuple[Tensor, Tensor]]
"""(float32 [r, ...] of the weight's rows, Hessian, what the weight carries) -> (latents, scales)."""
_PART = 1 << 25
"""Weights that are solved together: 128 MB of float32, of which a solution takes a few copies."""
_TABLE_LEVELS = 64
"""Of 6 bits: with more, a table's own error is next to nothing."""


class Sensitivity(NamedTuple):
    """What the backward pass says; nothing of layers that count all inputs alike."""

    tokens: Mapping[QuantizedLinear, list[Tensor]] = MappingProxyType({})
    """How much each vector of a layer's input counts, for each batch."""
    lookups: Mapping[QuantizedLinear, Tensor] = MappingProxyType({})
    """Head -> what its tied rows' own place adds to the Hessian, float64 [N, N]."""


ALIKE = Sensitivity()
"""All tokens count alike."""


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
) -> list[RoundedTensor]:
    """Measures and rounds tied heads, then all other linear layers, at once or block by block; see `gptq`."""
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
        with prepared.enabled(block is not None), Enabled([layer.weight_quantizer for layer in group], False):
            moments = _measure(prepared.model, batches, block, group, forward or call, sensitivity)
        for layer in group:
            name = layer.weight_quantizer.tensor
            if layer in heads and layer not in moments:
                continue  # the caller's forward ends in front of the head
            if layer not in moments:
                raise ArgumentError(f"{function}: {name}: expected a batch that reaches the layer, got none")
            hessian = moments.pop(layer).second()
            if layer in sensitivity.lookups:
                hessian += sensitivity.lookups[layer]
            done.append(_round_layer(layer, hessian, solve))
            if progress is not None:
                progress(len(done), total, name)
    return done


def linear_layers(function: str, prepared: PreparedModel) -> list[QuantizedLinear]:
    """Quantized linear layers, one for each weight."""
    found = []
    for slot in prepared.slots:
        layer = slot.layers[0][1]
        if len(slot.layers) > 1 or not isinstance(layer, QuantizedLinear):
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


@torch.no_grad()
def _measure(
    model: nn.Module,
    batches: Iterable[Any],
    block: nn.Module | None,
    layers: list[QuantizedLinear],
    forward: Callable[[nn.Module, Any], Any],
    sensitivity: Sensitivity,
) -> dict[QuantizedLinear, InputMoments]:
    moments: dict[QuantizedLinear, InputMoments] = {}
    calls: Counter[QuantizedLinear] = Counter()

    def record(layer: QuantizedLinear, inputs: tuple[Tensor, ...]) -> None:
        if layer not in moments:
            moments[layer] = InputMoments(layer.in_features)
        counted = sensitivity.tokens[layer][calls[layer]] if layer in sensitivity.tokens else None
        moments[layer].add(inputs[0], counted)
        calls[layer] += 1

    def stop(*_: Any) -> None:
        raise _BlockReachedError

    hooks = [layer.register_forward_pre_hook(record) for layer in layers]
    if block is not None:
        hooks.append(block.register_forward_hook(stop))
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for batch in batches:
            try:
                forward(model, batch)
            except _BlockReachedError:
                continue
    finally:
        for module, training in modes:
            module.training = training
        for hook in hooks:
            hook.remove()
    return moments


def sensitivity_of(
    prepared: PreparedModel,
    batches: Iterable[Any],
    layers: list[QuantizedLinear],
    forward: Callable[[nn.Module, Any], Any],
    loss: Callable[[Any], Tensor] | None,
    seed: int,
) -> Sensitivity:
    """As `_core.sensitivity` of a decoder: the mean square of each output vector's gradient, clipped."""
    found: dict[QuantizedLinear, list[Tensor]] = {layer: [] for layer in layers}
    lookups: dict[QuantizedLinear, list[Tensor]] = {layer: [] for layer in layers}
    generator = torch.Generator().manual_seed(seed)

    def record(layer: QuantizedLinear, _: Any, output: Tensor) -> None:
        place = len(found[layer])
        found[layer].append(torch.zeros(output.shape[:-1]))

        def keep(gradient: Tensor) -> None:
            found[layer][place] = gradient.detach().float().square().mean(-1).cpu()

        output.register_hook(keep)

    def record_lookup(table: QuantizedEmbedding, head: QuantizedLinear, rows: Tensor) -> None:
        # the table takes no gradient here, so its rows are leaves
        rows.requires_grad_().register_hook(
            lambda gradient: lookups[head].append(
                gradient.detach().float().flatten(0, -2).cpu() * table.output_scale
            )
        )

    model = prepared.model
    heads = {id(layer.weight): layer for layer in layers}
    tables = [
        (module, heads[id(module.weight)])
        for module in model.modules()
        if isinstance(module, QuantizedEmbedding) and id(module.weight) in heads
    ]
    needed = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    hooks = [layer.register_forward_hook(record) for layer in layers]
    for table, head in tables:
        hooks.append(
            table.register_forward_hook(lambda table, _, rows, head=head: record_lookup(table, head, rows))
        )
    model.eval()
    try:
        for parameter, _ in needed:
            parameter.requires_grad_(parameter.is_floating_point() and id(parameter) not in heads)
        with prepared.enabled(False), torch.enable_grad():
            for batch in batches:
                output = forward(model, batch)
                (_own_loss(output, generator) if loss is None else loss(output)).backward()
                model.zero_grad(set_to_none=True)
    finally:
        for parameter, required in needed:
            parameter.requires_grad_(required)
        for module, training in modes:
            module.training = training
        for hook in hooks:
            hook.remove()
    return Sensitivity(
        {layer: _clipped(squares) for layer, squares in found.items() if squares},
        {
            head: _lookup_curvature(lookups[head], [part * head.out_features for part in found[head]])
            for _, head in tables
            if lookups[head]
        },
    )


def _lookup_curvature(gradients: list[Tensor], squares: list[Tensor]) -> Tensor:
    """What the looked-up rows' place adds to E[s x x^T] of a head; squares: of its gradients, summed."""
    g = torch.cat(gradients)
    sizes = g.square().sum(-1)
    mean, total = float(sizes.mean()), sum(float(part.sum()) for part in squares)
    if not (mean > 0 and total > 0):
        return torch.zeros(g.shape[-1], g.shape[-1], dtype=torch.float64)
    # so that the square of each gradient becomes its clipped share of their sum
    (share,) = _clipped([sizes])
    moments = InputMoments(g.shape[-1])
    moments.add(g, share / (sizes / mean).clamp_min(1e-20))
    return moments.second() * (len(g) / total)


def _own_loss(output: Any, generator: torch.Generator) -> Tensor:
    logits = getattr(output, "logits", None)
    if logits is not None:
        rows = logits.float().flatten(0, -2)
        labels = torch.multinomial(rows.detach().softmax(-1).cpu(), 1, generator=generator)
        return -rows.log_softmax(-1).gather(1, labels.to(rows.device)).sum()
    value = getattr(output, "last_hidden_state", output)
    return (value * torch.randn(value.shape, generator=generator).to(value)).sum()


def _clipped(squares: list[Tensor]) -> list[Tensor]:
    """Of mean 1, none above 8; all 1 where the loss does not depend on the layer."""
    count = sum(part.numel() for part in squares)
    mean = sum(float(part.sum()) for part in squares) / count
    if not mean > 0:
        return [torch.ones_like(part) for part in squares]
    clipped = [(part / mean).clamp_max(8.0) for part in squares]
    kept = sum(float(part.sum()) for part in clipped) / count
    return [part / kept for part in clipped]


@torch.no_grad()
def _round_layer(layer: QuantizedLinear, hessian: Tensor, solve: Solve) -> RoundedTensor:
    """Solves in parts, so that a vocabulary's table needs memory for a part of it only."""
    quantizer = layer.weight_quantizer
    step = len(layer.weight)
    if not _core.grid_info(quantizer.grid)["whole_tensor"]:
        step = min(step, max(1, _PART // layer.weight[0].numel()))
    outputs = errors = 0.0
    for part, held in zip(layer.weight.split(step), layer.weight_scales.split(step), strict=True):
        before = part.clone()
        latent, scales = solve(part, hessian, quantizer)
        part.copy_(latent)
        held.copy_(quantizer.untied(scales))
        shipped = torch.ops.libqat.fake_quantize(
            part, quantizer.grid, "ste", "learned", quantizer.tensor, scales.to(part.device), "lsq"
        )
        outputs += _energy(before, hessian)
        errors += _energy(before - shipped, hessian)
    return RoundedTensor(quantizer.tensor, quantizer.grid, (errors / max(outputs, 1e-300)) ** 0.5)


def _energy(rows: Tensor, hessian: Tensor) -> float:
    rows = rows.cpu()
    return max(0.0, float((rows @ hessian.float() * rows).sum(dtype=torch.float64)))
