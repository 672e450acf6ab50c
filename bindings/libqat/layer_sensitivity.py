"""How much inputs and outputs of a `torch.nn` model's layers count for its answer; see `libqat.guided`."""

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._core import LayerSensitivity, sample
from .nn import QuantizedEmbedding, QuantizedLinear
from .prepare import PreparedModel


class Sensitivity(NamedTuple):
    """What the backward pass says of weights, by name; those without an entry count all inputs alike."""

    tokens: Mapping[str, Tensor | list[Tensor]] = MappingProxyType({})
    """How much each vector of a layer's input counts: float32 [n, T] of a decoder's windows, a list with one
    tensor for each batch of a `torch.nn` model."""
    lookups: Mapping[str, Tensor] = MappingProxyType({})
    """Head -> what its tied rows' own place adds to the Hessian, float64 [N, N]."""
    outputs: Mapping[str, Tensor] = MappingProxyType({})
    """How the errors of a layer's outputs count together, float32 [K, S, S]."""


ALIKE = Sensitivity()
"""All tokens count alike."""


def sensitivity_of(
    prepared: PreparedModel,
    batches: Iterable[Any],
    layers: list[QuantizedLinear],
    forward: Callable[[nn.Module, Any], Any],
    loss: Callable[[Any], Tensor] | None,
    seed: int,
) -> Sensitivity:
    """As `_core.sensitivity` of a decoder: the mean square of each output vector's gradient, clipped."""
    sums = {layer: LayerSensitivity(layer.weight_quantizer.tensor) for layer in layers}
    shapes: dict[QuantizedLinear, list[torch.Size]] = {layer: [] for layer in layers}
    generator = torch.Generator().manual_seed(seed)

    def record(layer: QuantizedLinear, _: Any, output: Tensor) -> None:
        shapes[layer].append(output.shape[:-1])
        place = sums[layer].expect(output.shape[:-1].numel())
        output.register_hook(lambda gradient: sums[layer].add(place, gradient))

    def record_lookup(table: QuantizedEmbedding, head: QuantizedLinear, rows: Tensor) -> None:
        # the table takes no gradient here, so its rows are leaves
        rows.requires_grad_().register_hook(
            lambda gradient: sums[head].add_lookups(gradient * table.output_scale)
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
    return _found({layer.weight_quantizer.tensor: (sums[layer], shapes[layer]) for layer in layers})


def _found(every: Mapping[str, tuple[LayerSensitivity, list[torch.Size]]]) -> Sensitivity:
    """every: sums, and the shapes of the calls' tokens, by name."""
    counted = {name: one for name, one in every.items() if one[0].counts()}
    outputs = {name: found.outputs() for name, (found, _) in counted.items()}
    lookups = {name: found.lookups() for name, (found, _) in counted.items()}
    return Sensitivity(
        {name: _by_call(found.tokens(), called) for name, (found, called) in counted.items()},
        {name: found for name, found in lookups.items() if found is not None},
        {name: found for name, found in outputs.items() if found is not None},
    )


def _by_call(tokens: Tensor, shapes: list[torch.Size]) -> list[Tensor]:
    parts = tokens.split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _own_loss(output: Any, generator: torch.Generator) -> Tensor:
    logits = getattr(output, "logits", None)
    if logits is not None:
        rows = logits.float().flatten(0, -2)
        labels = sample(rows, torch.rand(len(rows), dtype=torch.float64, generator=generator))
        return -rows.log_softmax(-1).gather(1, labels[:, None]).sum()
    value = getattr(output, "last_hidden_state", output)
    return (value * torch.randn(value.shape, generator=generator).to(value)).sum()
