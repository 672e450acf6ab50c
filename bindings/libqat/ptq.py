"""Rounding without training: the baselines that training has to beat, and the starts that it can begin from.

All of them need a model that was prepared with learned scales, which hold the result:

>>> policy = libqat.Policy.preset("gguf-q4_0").with_scale("learned")
>>> prepared = libqat.prepare(model, policy)
>>> libqat.gptq(prepared, batches)
>>> checkpoint = libqat.freeze(prepared)  # or train on from here

`gptq` and `weighted_search` also take any `torch.nn` model; `awq` knows libqat's own decoder only.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from . import _core
from ._core import ArgumentError, AwqFold, PreparedDecoder, RoundedTensor
from .data import spread_windows
from .layer_rounding import (
    Correction,
    Progress,
    call,
    linear_layers,
    round_layers,
    tied_heads,
)
from .layer_sensitivity import Sensitivity, sensitivity_of
from .prepare import PreparedModel
from .weight_quantizer import WeightQuantizer

TOKENS = 51_200
"""Calibration tokens of the command line: 100 windows."""
WINDOW = 512
"""Tokens of a calibration window."""

SWEEPS = 4
"""Of coordinate descent, in `guided`: later ones change next to nothing."""
DAMPING = 0.1
"""Of `guided`, whose Hessians rest on fewer tokens than GPTQ's."""
INPUT_CORRECTION = 0.5
"""Of guided: more of it fits the calibration text's noise."""

__all__ = ["awq", "calibration_windows", "gptq", "guided", "sensitivity", "weighted_search"]


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
    codes, and training starts from them. Weights of other layers keep theirs, but for a head that is tied to
    the embedding, on a grid of at most 64 levels: it comes first, by the inputs it has in the float model.

    batches: of a decoder, int64 [n, T] windows of a calibration text; they go through it layer by layer,
    `batch` at a time in `compute_dtype`, and each layer sees those before it rounded. Of a `torch.nn` model,
    an iterable that can be read several times; each item is called as model(item), model(*item) for a
    tuple, model(**item) for a mapping, or as forward(model, item). Without `blocks` it is read once, on the
    float model, and the second moments of every layer's inputs (N^2 float64 each) are in memory together.
    With `blocks`, modules in the order of the forward pass, it is read once for each of them, as far as that
    module, on the model whose earlier blocks are rounded; layers outside them, but for a tied head, keep
    their weights.

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

    def solve(
        rows: Tensor, hessian: Tensor, _: Tensor | None, quantizer: WeightQuantizer
    ) -> tuple[Tensor, Tensor]:
        return _core.gptq_tensor(
            rows, hessian, quantizer.grid, tensor=quantizer.tensor, seq=quantizer.tied, **options
        )

    return round_layers("gptq", prepared, batches, blocks, forward, progress, solve)


def guided(
    prepared: "PreparedModel | PreparedDecoder",
    batches: "Tensor | Iterable[Any]",
    *,
    damping: float = DAMPING,
    sweeps: int = SWEEPS,
    scale: str = "weighted",
    input_correction: float = INPUT_CORRECTION,
    loss: Callable[[Any], Tensor] | None = None,
    seed: int = 0,
    sensitivity: Sensitivity | None = None,
    blocks: Sequence[nn.Module] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    batch: int = 8,
    compute_dtype: str = "auto",
    progress: Progress | None = None,
) -> list[RoundedTensor]:
    """GPTQ in which a token counts as much as the model's answer depends on it, then refined.

    First a backward pass of the float model tells, for each layer, how far its output at each token moves the
    loss; the Hessian becomes E[s x x^T]. Then weights make up for a share, `input_correction`, of what the
    rounded layers in front changed in their inputs; of a `torch.nn` model with `blocks` only. After GPTQ,
    `sweeps` of coordinate descent go over codes and scales again, in which errors of different outputs count
    together as they do for the loss. Arguments, errors and what becomes of the model as for `gptq`; see
    docs/ptq.md.

    loss: of a `torch.nn` model, output -> scalar, the sum over all tokens. By default, for an output with
    `logits`, the cross-entropy with labels drawn from them; else the product of the output (or its
    `last_hidden_state`) with noise, whose squared gradients are those of a squared error. seed: of both.
    sensitivity: what `libqat.sensitivity` found on these batches, which then needs no second backward pass;
    `loss` and `seed` do not count then.
    """
    if isinstance(prepared, PreparedDecoder):
        options = {"damping": damping, "sweeps": sweeps, "scale": scale, "input_correction": input_correction,
                   "batch": batch, "compute_dtype": compute_dtype, "progress": progress}  # fmt: skip
        if sensitivity is None:
            return _core.apply_guided(prepared, batches, seed=seed, **options)
        return _core.apply_gptq(prepared, batches, **sensitivity._asdict(), **options)
    layers = tied_heads("guided", prepared) + linear_layers("guided", prepared)
    found = sensitivity or sensitivity_of(prepared, batches, layers, forward or call, loss, seed)

    def solve(
        rows: Tensor, hessian: Tensor, outputs: Tensor | None, quantizer: WeightQuantizer
    ) -> tuple[Tensor, Tensor]:
        return _core.gptq_tensor(
            rows, hessian, quantizer.grid, tensor=quantizer.tensor, seq=quantizer.tied, damping=damping,
            sweeps=sweeps, scale=scale, outputs=outputs,
        )  # fmt: skip

    correction = Correction(input_correction, damping)
    return round_layers("guided", prepared, batches, blocks, forward, progress, solve, found, correction)


def sensitivity(
    prepared: "PreparedModel | PreparedDecoder",
    batches: "Tensor | Iterable[Any]",
    *,
    loss: Callable[[Any], Tensor] | None = None,
    seed: int = 0,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    compute_dtype: str = "auto",
    progress: Progress | None = None,
) -> Sensitivity:
    """The backward pass of `guided` by itself: it says nothing of grids, and serves models on any of them.

    Arguments as for `guided`; `progress` counts windows of a decoder. The prepared model stays as it is.
    """
    if isinstance(prepared, PreparedDecoder):
        return Sensitivity(
            *_core.sensitivity(prepared, batches, seed=seed, compute_dtype=compute_dtype, progress=progress)
        )
    layers = tied_heads("sensitivity", prepared) + linear_layers("sensitivity", prepared)
    return sensitivity_of(prepared, batches, layers, forward or call, loss, seed)


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

    def solve(
        rows: Tensor, hessian: Tensor, _: Tensor | None, quantizer: WeightQuantizer
    ) -> tuple[Tensor, Tensor]:
        return rows, _core.weighted_search_tensor(
            rows, hessian.diagonal(), quantizer.grid, tensor=quantizer.tensor, seq=quantizer.tied
        )

    return round_layers("weighted_search", prepared, batches, blocks, forward, progress, solve)


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
