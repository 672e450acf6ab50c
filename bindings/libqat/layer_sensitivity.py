"""How much inputs and outputs of a `torch.nn` model's layers count for its answer; see `libqat.guided`."""

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._core import InputMoments, sample
from .nn import QuantizedEmbedding, QuantizedLinear
from .prepare import PreparedModel

_GROUP, _MOST_OUTPUTS = 1024, 32768
"""Outputs of a layer whose errors count together, and in all: as in C++."""
_MOST_WEIGHT = 8.0
"""Of a token, in means."""


class Sensitivity(NamedTuple):
    """What the backward pass says of weights, by name; those without an entry count all inputs alike."""

    tokens: Mapping[str, "Tensor | list[Tensor]"] = MappingProxyType({})
    """How much each vector of a layer's input counts: float32 [n, T] of a decoder's windows, a list with one
    tensor for each batch of a `torch.nn` model."""
    lookups: Mapping[str, Tensor] = MappingProxyType({})
    """Head -> what its tied rows' own place adds to the Hessian, float64 [N, N]."""
    outputs: Mapping[str, Tensor] = MappingProxyType({})
    """How the errors of a layer's outputs count together, float32 [K, S, S]."""


ALIKE = Sensitivity()
"""All tokens count alike."""


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
        {_name(layer): _clipped(squares) for layer, squares in found.items() if squares},
        {
            _name(head): _lookup_curvature(lookups[head], [part * head.out_features for part in found[head]])
            for _, head in tables
            if lookups[head]
        },
        {_name(layer): curvature.mean() for layer, curvature in curvatures.items() if found[layer]},
    )


def _name(layer: QuantizedLinear) -> str:
    return layer.weight_quantizer.tensor


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
        labels = sample(rows, torch.rand(len(rows), dtype=torch.float64, generator=generator))
        return -rows.log_softmax(-1).gather(1, labels[:, None]).sum()
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
