"""Rounding the layers of any `torch.nn` model by what their inputs are; see `ptq`."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import _core
from ._core import ArgumentError, InputDrift, InputMoments, RoundedTensor
from .nn import QuantizedEmbedding, QuantizedLinear, WeightQuantizer
from .prepare import Enabled, PreparedModel

Progress = Callable[[int, int, str], Any]
"""(pieces of work done, in all, the weight at hand)."""

Solve = Callable[[Tensor, Tensor, Tensor | None, WeightQuantizer], tuple[Tensor, Tensor]]
"""(float32 [r, ...] of the weight's rows, Hessian, curvature of their outputs, what the weight carries) ->
(latents, scales)."""
_PART = 1 << 25
"""Weights that are solved together: 128 MB of float32, of which a solution takes a few copies."""
_GROUP, _MOST_OUTPUTS = 1024, 32768
"""Outputs of a layer whose errors count together, and in all: as in C++."""
_MOST_WEIGHT = 8.0
"""Of a token, in means."""
_TABLE_LEVELS = 64
"""Of 6 bits: with more, a table's own error is next to nothing."""


class Sensitivity(NamedTuple):
    """What the backward pass says; nothing of layers that count all inputs alike."""

    tokens: Mapping[QuantizedLinear, list[Tensor]] = MappingProxyType({})
    """How much each vector of a layer's input counts, for each batch."""
    lookups: Mapping[QuantizedLinear, Tensor] = MappingProxyType({})
    """Head -> what its tied rows' own place adds to the Hessian, float64 [N, N]."""
    outputs: Mapping[QuantizedLinear, Tensor] = MappingProxyType({})
    """How the errors of a layer's outputs count together, float32 [K, S, S]."""


class Correction(NamedTuple):
    """How much of the drift of their inputs weights make up for, see `libqat.guided`."""

    share: float
    damping: float


class _Moments(NamedTuple):
    """Of a layer's inputs; drift: from the float model's, where it counts."""

    inputs: InputMoments
    drift: InputDrift | None


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
            if layer in sensitivity.lookups:
                hessian += sensitivity.lookups[layer]
            corrected = None
            if correction is not None and measured.drift is not None:
                corrected = _core.input_correction(
                    hessian, measured.drift.mean(), **correction._asdict(), tensor=name
                )
            if correction is not None and blocks is not None:
                originals[layer] = layer.weight.detach().clone()
            done.append(_round_layer(layer, hessian, sensitivity.outputs.get(layer), corrected, solve))
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
        counted = sensitivity.tokens[layer][calls[layer]] if layer in sensitivity.tokens else None
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


class _OutputCurvature:
    """E[g g^T] of the gradients at a layer's outputs, in groups; see `qat::ptq::sensitivity`."""

    def __init__(self, outputs: int):
        self._groups = -(-outputs // _GROUP)
        self._size = -(-outputs // self._groups)
        self._sums = torch.zeros(self._groups, self._size, self._size)
        self._sum, self._tokens = 0.0, 0

    def add(self, gradient: Tensor, squares: Tensor) -> None:
        """gradient: [n, O]; squares: float32 [n], its mean squares."""
        self._sum += float(squares.sum(dtype=torch.float64))
        self._tokens += squares.numel()
        most = _MOST_WEIGHT * self._sum / self._tokens
        if not 0 < most < float("inf"):
            return
        factors = (squares[:, None] / most).clamp_min(1).rsqrt() / most**0.5
        scaled = (gradient.float() * factors).to(gradient.dtype)
        for sums, part in zip(self._sums, scaled.split(self._size, dim=1), strict=True):
            count = part.shape[1]
            sums[:count, :count] += most * (part.T @ part).float().cpu()

    def mean(self) -> Tensor:
        """float32 [K, S, S]."""
        return self._sums / max(1, self._tokens)


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
            squares = gradient.detach().float().square().mean(-1)
            found[layer][place] = squares.cpu()
            if layer in curvatures:
                curvatures[layer].add(gradient.detach().flatten(0, -2), squares.flatten())

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
    tied = {head for _, head in tables}  # where rows are looked up, their errors do not count together
    curvatures = {
        layer: _OutputCurvature(layer.out_features)
        for layer in layers
        if layer not in tied and layer.out_features <= _MOST_OUTPUTS
    }
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
        {layer: curvature.mean() for layer, curvature in curvatures.items() if found[layer]},
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
    clipped = [(part / mean).clamp_max(_MOST_WEIGHT) for part in squares]
    kept = sum(float(part.sum()) for part in clipped) / count
    return [part / kept for part in clipped]


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
    return RoundedTensor(quantizer.tensor, quantizer.grid, (errors / max(outputs, 1e-300)) ** 0.5)


def _energy(rows: Tensor, hessian: Tensor) -> float:
    rows = rows.cpu()
    return max(0.0, float((rows @ hessian.float() * rows).sum(dtype=torch.float64)))
