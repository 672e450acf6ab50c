"""Rounding without training: the baselines that training has to beat, and the starts that it can begin from.

All of them need a model that was prepared with learned scales, which hold the result:

>>> policy = libqat.Policy.preset("gguf-q4_0").with_scale("learned")
>>> prepared = libqat.prepare(model, policy)
>>> libqat.gptq(prepared, batches)
>>> checkpoint = libqat.freeze(prepared)  # or train on from here

`gptq` and `weighted_search` also take any `torch.nn` model; `awq` knows libqat's own decoder only.
"""

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

__all__ = ["awq", "calibration_windows", "gptq", "weighted_search"]


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
        return _core.gptq_tensor(layer.weight, hessian, quantizer.grid, tensor=quantizer.tensor, **options)

    return _round_layers("gptq", prepared, batches, blocks, forward, progress, solve)


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
            layer.weight, hessian.diagonal(), quantizer.grid, tensor=quantizer.tensor
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
) -> list[RoundedTensor]:
    layers = _linear_layers(function, prepared)
    groups = [(None, layers)] if blocks is None else [(block, _layers_in(block, layers)) for block in blocks]
    total = sum(len(group) for _, group in groups)
    done: list[RoundedTensor] = []
    for block, group in groups:
        # without blocks the whole model is measured as it was; with blocks, behind those that are rounded
        with prepared.enabled(block is not None), Enabled([layer.weight_quantizer for layer in group], False):
            moments = _measure(prepared.model, batches, block, group, forward or _call)
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
) -> dict[QuantizedLinear, InputMoments]:
    moments: dict[QuantizedLinear, InputMoments] = {}

    def record(layer: QuantizedLinear, inputs: tuple[Tensor, ...]) -> None:
        if layer not in moments:
            moments[layer] = InputMoments(layer.in_features)
        moments[layer].add(inputs[0])

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


@torch.no_grad()
def _round_layer(layer: QuantizedLinear, hessian: Tensor, solve: _Solve) -> RoundedTensor:
    quantizer = layer.weight_quantizer
    before = layer.weight.detach().clone()
    latent, scales = solve(layer, hessian)
    layer.weight.copy_(latent)
    layer.weight_scales.copy_(scales)
    shipped = torch.ops.libqat.fake_quantize(
        layer.weight, quantizer.grid, "ste", "learned", quantizer.tensor, layer.weight_scales, "lsq"
    )
    error = _energy(before - shipped, hessian) / max(_energy(before, hessian), 1e-300)
    return RoundedTensor(quantizer.tensor, quantizer.grid, error**0.5)


def _energy(rows: Tensor, hessian: Tensor) -> float:
    rows = rows.cpu()
    return max(0.0, float((rows @ hessian.float() * rows).sum(dtype=torch.float64)))
