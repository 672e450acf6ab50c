"""Rounding without training: the baselines that training has to beat, and the starts that it can begin from.

All of them need a model that was prepared with learned scales, which hold the result:

>>> policy = libqat.Policy.preset("gguf-q4_0").with_scale("learned")
>>> prepared = libqat.prepare(model, policy)
>>> libqat.gptq(prepared, batches)
>>> checkpoint = libqat.freeze(prepared)  # or train on from here

`gptq` and `weighted_search` also take any `torch.nn` model; `awq` knows libqat's own decoder only.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import _core
from ._core import ArgumentError, AwqFold, InputMoments, PreparedDecoder, RoundedTensor
from .data import spread_windows
from .nn import QuantizedLinear
from .prepare import Enabled, PreparedModel

Progress = Callable[[int, int, str], Any]
"""(pieces of work done, in all, the weight at hand)."""

TOKENS = 51_200
"""Calibration tokens of the command line: 100 windows."""
WINDOW = 512
"""Tokens of a calibration window."""

SWEEPS = 4
"""Of coordinate descent, in `guided`: later ones change next to nothing."""
DAMPING = 0.03
"""Of `guided`, whose Hessians rest on fewer tokens than GPTQ's."""

__all__ = ["awq", "calibration_windows", "gptq", "guided", "weighted_search"]


def calibration_windows(tokens: Tensor, count: int = TOKENS, window: int = WINDOW) -> Tensor:
    """At most `count` tokens of a text as windows spread evenly over it, int64 [n, window].

    tokens: int64 [n]. One shorter window when there are fewer tokens than that.
    """
    chosen = spread_windows(tokens, count, window)
    window = min(window, len(chosen))
    return chosen[: len(chosen) // window * window].view(-1, window)


def gptq(
    prepared: "PreparedModel | PreparedDecoder",
    batches: "Tensor | Iterable[Any]",
    *,
    damping: float = 0.01,
    act_order: bool = False,
    static_scales: bool = False,
    block: int = 128,
    scale: str = "weighted",
    blocks: Sequence[nn.Module] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    batch: int = 8,
    compute_dtype: str = "auto",
    progress: Progress | None = None,
) -> list[RoundedTensor]:
    """Rounds each linear layer so that its outputs err least (GPTQ, arXiv:2210.17323).

    Latents become the compensated weights and learned scales the ones found, so that `freeze` writes GPTQ's
    codes, and training starts from them. Weights of other layers keep theirs.

    batches: of a decoder, int64 [n, T] windows of a calibration text; they go through it layer by layer,
    `batch` at a time in `compute_dtype`, and each layer sees those before it rounded. Of a `torch.nn` model,
    an iterable that can be read several times; each item is called as model(item), model(*item) for a
    tuple, model(**item) for a mapping, or as forward(model, item). Without `blocks` it is read once, on the
    float model, and the second moments of every layer's inputs (N^2 float64 each) are in memory together.
    With `blocks`, modules in the order of the forward pass, it is read once for each of them, as far as that
    module, on the model whose earlier blocks are rounded; layers outside them keep their weights.

    damping: share of the mean of the Hessian's diagonal that is added to it. act_order, static_scales:
    columns by falling diagonal, see docs/ptq.md. scale: "reference", "search" or "weighted".

    ArgumentError unless scales are learned; NumericError naming the layer whose inputs are not finite.
    """
    options = {
        "damping": damping,
        "act_order": act_order,
        "static_scales": static_scales,
        "block": block,
        "scale": scale,
    }
    if isinstance(prepared, PreparedDecoder):
        return _core.apply_gptq(
            prepared, batches, **options, batch=batch, compute_dtype=compute_dtype, progress=progress
        )

    def solve(layer: QuantizedLinear, hessian: Tensor) -> tuple[Tensor, Tensor]:
        quantizer = layer.weight_quantizer
        return _core.gptq_tensor(
            layer.weight, hessian, quantizer.grid, tensor=quantizer.tensor, seq=quantizer.tied, **options
        )

    return _round_layers("gptq", prepared, batches, blocks, forward, progress, solve)


def guided(
    prepared: "PreparedModel | PreparedDecoder",
    batches: "Tensor | Iterable[Any]",
    *,
    damping: float = DAMPING,
    sweeps: int = SWEEPS,
    scale: str = "weighted",
    loss: Callable[[Any], Tensor] | None = None,
    seed: int = 0,
    blocks: Sequence[nn.Module] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    batch: int = 8,
    compute_dtype: str = "auto",
    progress: Progress | None = None,
) -> list[RoundedTensor]:
    """GPTQ in which a token counts as much as the model's answer depends on it, then refined.

    First a backward pass of the float model tells, for each layer, how far its output at each token moves the
    loss; the Hessian becomes E[s x x^T]. After GPTQ, `sweeps` of coordinate descent go over codes and scales
    again. Arguments, errors and what becomes of the model as for `gptq`; see docs/ptq.md.

    loss: of a `torch.nn` model, output -> scalar, the sum over all tokens. By default, for an output with
    `logits`, the cross-entropy with labels drawn from them; else the product of the output (or its
    `last_hidden_state`) with noise, whose squared gradients are those of a squared error. seed: of both.
    """
    if isinstance(prepared, PreparedDecoder):
        return _core.apply_guided(
            prepared, batches, damping=damping, sweeps=sweeps, scale=scale, seed=seed, batch=batch,
            compute_dtype=compute_dtype, progress=progress,
        )  # fmt: skip
    layers = _linear_layers("guided", prepared)
    weights = _sensitivity(prepared, batches, layers, forward or _call, loss, seed)

    def solve(layer: QuantizedLinear, hessian: Tensor) -> tuple[Tensor, Tensor]:
        quantizer = layer.weight_quantizer
        return _core.gptq_tensor(
            layer.weight, hessian, quantizer.grid, tensor=quantizer.tensor, seq=quantizer.tied,
            damping=damping, sweeps=sweeps, scale=scale,
        )  # fmt: skip

    return _round_layers("guided", prepared, batches, blocks, forward, progress, solve, weights)


def weighted_search(
    prepared: "PreparedModel | PreparedDecoder",
    batches: "Tensor | Iterable[Any]",
    *,
    blocks: Sequence[nn.Module] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    batch: int = 8,
    compute_dtype: str = "auto",
    progress: Progress | None = None,
) -> list[RoundedTensor]:
    """Sets the learned scales of linear layers to those of least error, counted by how large inputs are.

    The latents stay. Arguments and errors as for `gptq`.
    """
    if isinstance(prepared, PreparedDecoder):
        return _core.apply_weighted_search(
            prepared, batches, batch=batch, compute_dtype=compute_dtype, progress=progress
        )

    def solve(layer: QuantizedLinear, hessian: Tensor) -> tuple[Tensor, Tensor]:
        quantizer = layer.weight_quantizer
        scales = _core.weighted_search_tensor(
            layer.weight, hessian.diagonal(), quantizer.grid, tensor=quantizer.tensor, seq=quantizer.tied
        )
        return layer.weight, scales

    return _round_layers("weighted_search", prepared, batches, blocks, forward, progress, solve)


def awq(
    prepared: PreparedDecoder,
    windows: Tensor,
    *,
    steps: int = 20,
    scale: str = "weighted",
    rows: int = 128,
    batch: int = 8,
    compute_dtype: str = "auto",
    progress: Progress | None = None,
) -> list[AwqFold]:
    """Scales input channels with large activations up before rounding (AWQ, arXiv:2306.00978).

    The scale s = E[|x|]^alpha, alpha one of 0, 1/steps ... 1, is multiplied into the columns of the weights
    and divided out of what makes their inputs: norm gains, up_proj's and v_proj's rows. The float model stays
    the same but for rounding. Then the learned scales are set by `scale` ("reference", "search", "weighted"),
    and `gptq` may follow. Returns what was folded where.

    prepared: a decoder (`libqat.load_model`) prepared with learned scales. windows: int64 [n, T] of a
    calibration text. rows: of each weight, measured in the search for alpha; 0 for all.
    """
    if not isinstance(prepared, PreparedDecoder):
        raise ArgumentError(f"awq: expected a prepared Decoder, got {type(prepared).__name__}")
    return _core.apply_awq(
        prepared,
        windows,
        steps=steps,
        scale=scale,
        rows=rows,
        batch=batch,
        compute_dtype=compute_dtype,
        progress=progress,
    )


# ---- any torch.nn model

_Solve = Callable[[QuantizedLinear, Tensor], tuple[Tensor, Tensor]]
_Weights = dict[QuantizedLinear, list[Tensor]]
"""How much each vector of a layer's input counts, for each batch."""


class _BlockReachedError(Exception):
    """Ends a forward pass behind the block that is being measured."""


def _round_layers(
    function: str,
    prepared: PreparedModel,
    batches: Iterable[Any],
    blocks: Sequence[nn.Module] | None,
    forward: Callable[[nn.Module, Any], Any] | None,
    progress: Progress | None,
    solve: _Solve,
    weights: _Weights | None = None,
) -> list[RoundedTensor]:
    layers = _linear_layers(function, prepared)
    groups = [(None, layers)] if blocks is None else [(block, _layers_in(block, layers)) for block in blocks]
    total = sum(len(group) for _, group in groups)
    done: list[RoundedTensor] = []
    for block, group in groups:
        # without blocks the whole model is measured as it was; with blocks, behind those that are rounded
        with prepared.enabled(block is not None), Enabled([layer.weight_quantizer for layer in group], False):
            moments = _measure(prepared.model, batches, block, group, forward or _call, weights or {})
        for layer in group:
            name = layer.weight_quantizer.tensor
            if layer not in moments:
                raise ArgumentError(f"{function}: {name}: expected a batch that reaches the layer, got none")
            done.append(_round_layer(layer, moments.pop(layer).second(), solve))
            if progress is not None:
                progress(len(done), total, name)
    return done


def _linear_layers(function: str, prepared: PreparedModel) -> list[QuantizedLinear]:
    """Quantized linear layers, one for each weight."""
    found = []
    for slot in prepared.slots:
        layer = slot.layers[0][1]
        if len(slot.layers) > 1 or not isinstance(layer, QuantizedLinear):
            continue
        if layer.weight_scales is None:
            raise ArgumentError(
                f"{function}: {slot.name}: expected a policy with learned scales, which hold the result, got "
                f"scale {layer.weight_quantizer.scale!r}"
            )
        found.append(layer)
    return found


def _layers_in(block: nn.Module, layers: list[QuantizedLinear]) -> list[QuantizedLinear]:
    inside = set(block.modules())
    return [layer for layer in layers if layer in inside]


def _call(model: nn.Module, batch: Any) -> Any:
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
    weights: _Weights,
) -> dict[QuantizedLinear, InputMoments]:
    moments: dict[QuantizedLinear, InputMoments] = {}
    calls: Counter[QuantizedLinear] = Counter()

    def record(layer: QuantizedLinear, inputs: tuple[Tensor, ...]) -> None:
        if layer not in moments:
            moments[layer] = InputMoments(layer.in_features)
        counted = weights[layer][calls[layer]] if layer in weights else None
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


def _sensitivity(
    prepared: PreparedModel,
    batches: Iterable[Any],
    layers: list[QuantizedLinear],
    forward: Callable[[nn.Module, Any], Any],
    loss: Callable[[Any], Tensor] | None,
    seed: int,
) -> _Weights:
    """As `token_sensitivity` of a decoder: the mean square of each output vector's gradient, clipped."""
    found: _Weights = {layer: [] for layer in layers}
    generator = torch.Generator().manual_seed(seed)

    def record(layer: QuantizedLinear, _: Any, output: Tensor) -> None:
        place = len(found[layer])
        found[layer].append(torch.zeros(output.shape[:-1]))

        def keep(gradient: Tensor) -> None:
            found[layer][place] = gradient.detach().float().square().mean(-1).cpu()

        output.register_hook(keep)

    model = prepared.model
    needed = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    hooks = [layer.register_forward_hook(record) for layer in layers]
    model.eval()
    try:
        latents = {id(layer.weight) for layer in layers}
        for parameter, _ in needed:
            parameter.requires_grad_(parameter.is_floating_point() and id(parameter) not in latents)
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
    return {layer: _clipped(squares) for layer, squares in found.items() if squares}


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
def _round_layer(layer: QuantizedLinear, hessian: Tensor, solve: _Solve) -> RoundedTensor:
    quantizer = layer.weight_quantizer
    before = layer.weight.detach().clone()
    latent, scales = solve(layer, hessian)
    layer.weight.copy_(latent)
    layer.weight_scales.copy_(quantizer.untied(scales))
    shipped = torch.ops.libqat.fake_quantize(
        layer.weight,
        quantizer.grid,
        "ste",
        "learned",
        quantizer.tensor,
        scales.to(layer.weight.device),
        "lsq",
    )
    error = _energy(before - shipped, hessian) / max(_energy(before, hessian), 1e-300)
    return RoundedTensor(quantizer.tensor, quantizer.grid, error**0.5)


def _energy(rows: Tensor, hessian: Tensor) -> float:
    rows = rows.cpu()
    return max(0.0, float((rows @ hessian.float() * rows).sum(dtype=torch.float64)))
