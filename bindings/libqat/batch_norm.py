"""BatchNorm beside quantized weights: freeze its statistics, or fold it into the layer before it.

What ships is a weight on its grid. A BatchNorm behind it either stays a layer of its own, with statistics
that no longer move under the rounding (`freeze_batch_norm`), or disappears into the weight before that is
rounded (`fold_batch_norm`, `fold_batch_norms`). (Jacob et al. 2018, arXiv:1712.05877, section 3.2;
Krishnamoorthi 2018, arXiv:1806.08342, section 3.2.2.)
"""

from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ._core import ArgumentError, NumericError
from .nn import FLOAT, QUANTIZED
from .prepare import PreparedModel

_LAYERS = tuple(layer for layer in QUANTIZED if layer is not nn.Embedding)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class _Frozen:
    """Stays in evaluation mode: running statistics are used and not updated."""

    def train(self, mode: bool = True):
        return super().train(False)


class FrozenBatchNorm1d(_Frozen, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` that `train()` leaves in evaluation mode."""


class FrozenBatchNorm2d(_Frozen, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` that `train()` leaves in evaluation mode."""


class FrozenBatchNorm3d(_Frozen, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` that `train()` leaves in evaluation mode."""


class FrozenSyncBatchNorm(_Frozen, nn.SyncBatchNorm):
    """`torch.nn.SyncBatchNorm` that `train()` leaves in evaluation mode."""


_FROZEN: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: FrozenBatchNorm1d,
    nn.BatchNorm2d: FrozenBatchNorm2d,
    nn.BatchNorm3d: FrozenBatchNorm3d,
    nn.SyncBatchNorm: FrozenSyncBatchNorm,
}
_BATCH_NORMS = (*_FROZEN, *_FROZEN.values())


def freeze_batch_norm(model: "nn.Module | PreparedModel") -> int:
    """Each BatchNorm of `model` uses its running statistics from now on and no longer updates them.

    gamma and beta still train. The layers are re-classed in place, so that `model.train()` does not undo it;
    parameters and state_dict keys stay. Works before and after `prepare`, and at any step of a training loop.
    Returns how many BatchNorms the model has; LayerNorm and the other norms are left alone. ArgumentError for
    a BatchNorm without running statistics, or of a class of its own; nothing is changed then.
    """
    root = model.model if isinstance(model, PreparedModel) else model
    found = [(name, module) for name, module in root.named_modules() if isinstance(module, _BatchNorm)]
    for name, module in found:
        if type(module) not in _BATCH_NORMS or module.running_mean is None:
            lacks = "one without" if type(module) in _BATCH_NORMS else type(module).__name__
            raise ArgumentError(
                f"freeze_batch_norm: {name or 'model'}: expected a BatchNorm with running statistics, "
                f"got {lacks}"
            )
    for _, module in found:
        module.__class__ = _FROZEN.get(type(module), type(module))
        module.eval()
    return len(found)


def fold_batch_norm(layer: nn.Module, batch_norm: nn.Module) -> None:
    """Folds a BatchNorm with running statistics into the layer before it, in float64, channel by channel:

        s = gamma / sqrt(running_var + eps)
        weight' = weight * s
        bias' = (bias - running_mean) * s + beta

    `layer`: nn.Linear, nn.Conv* or nn.ConvTranspose* whose output nothing but `batch_norm` reads (which only
    the caller knows; `fold_batch_norms` proves it). Its parameters stay the same objects; a bias is added
    where there was none. `batch_norm` becomes an nn.Identity in place. The model then computes what it
    computed in evaluation mode, up to the rounding of weight and bias to their dtype.

    Call it before `prepare`, so that the grid rounds the folded weight (one scale per output channel), and
    before the optimizer is made. ArgumentError for a prepared layer: its codes would change behind the
    training's back, because a grid rounds s * weight differently from weight (a negative s swaps the two ends
    of a range like -8..7, a stored scale rounds anew, a row of a transposed convolution holds many s).
    ArgumentError too for other layers, for channels that do not agree, for a BatchNorm without running
    statistics and for hooks that would see other numbers; NumericError for a result that is not finite.
    Nothing is changed then.
    """
    if reason := _refusal(layer, batch_norm):
        raise ArgumentError(f"fold_batch_norm: {reason}")
    weight, bias = _folded(layer, batch_norm)
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise NumericError("fold_batch_norm: expected finite folded weights, got NaN or infinity")
    with torch.no_grad():
        layer.weight.copy_(weight)
        if layer.bias is not None:
            layer.bias.copy_(bias)
        else:
            layer.bias = nn.Parameter(bias, requires_grad=layer.weight.requires_grad)
    _make_identity(batch_norm)


def _refusal(layer: nn.Module, norm: nn.Module) -> str:
    """Why the pair cannot be folded; empty when it can."""
    if type(layer) in FLOAT:
        return (
            "expected a layer that is not prepared, got a prepared one, whose codes folding would change; "
            "fold first and prepare then (libqat.unprepare goes back)"
        )
    if type(layer) not in _LAYERS or "weight" not in layer._parameters:
        return f"expected an nn.Linear, nn.Conv* or nn.ConvTranspose*, got {type(layer).__name__}"
    if type(norm) not in _BATCH_NORMS or norm.running_mean is None:
        return f"expected a BatchNorm with running statistics, got {type(norm).__name__}"
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    if channels != norm.num_features:
        return f"expected a BatchNorm of {channels} channels, got one of {norm.num_features}"
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(module, name) for name in hooks for module in (layer, norm)):
        return "expected layers without hooks, which would see other numbers after folding"
    return ""


@torch.no_grad()
def _folded(layer: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """The folded weight and bias, computed in float64 and rounded once to the weight's dtype."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double()
    if layer.bias is not None:
        shift = shift + layer.bias.double()
    bias = shift * scale
    if norm.bias is not None:
        bias = bias + norm.bias.double()
    weight = layer.weight.double()
    if isinstance(layer, _TRANSPOSED):  # [I, O / groups, ...]: the rows of group g meet its own channels
        grouped = weight.unflatten(0, (layer.groups, -1)).flatten(3)
        folded = (grouped * scale.view(layer.groups, 1, -1, 1)).view_as(weight)
    else:
        folded = weight * scale.view(-1, *[1] * (weight.dim() - 1))
    return folded.to(layer.weight.dtype), bias.to(layer.weight.dtype)


def _make_identity(norm: nn.Module) -> None:
    training = norm.training
    norm.__class__ = nn.Identity
    norm.__dict__.clear()
    norm.__dict__.update(nn.Identity().train(training).__dict__)


class FoldedBatchNorms(NamedTuple):
    """What `fold_batch_norms` did."""

    folded: list[tuple[str, str]]
    """(layer, BatchNorm) names of the pairs, in model order; these BatchNorms are nn.Identity now."""
    kept: dict[str, str]
    """Name of each BatchNorm that stayed as it was -> the reason."""


def fold_batch_norms(model: nn.Module, *inputs: Tensor) -> FoldedBatchNorms:
    """Finds the pairs layer -> BatchNorm of a model and folds each by `fold_batch_norm`.

    A pair is folded when a torch.fx trace of `model`, in training and in evaluation mode, proves that the
    layer and the BatchNorm are called once, that nothing else reads the layer's output, and that no other
    module shares their parameters. BatchNorm1d takes inputs of two ranks and only a run tells which: pass
    example `inputs` (the arguments of one `model(...)` call) to fold the layers before it. Call it before
    `prepare`. ArgumentError for a model that is prepared already.
    """
    if any(type(module) in FLOAT for module in model.modules()):
        raise ArgumentError(
            "fold_batch_norms: expected a model that is not prepared, got a prepared one, whose codes "
            "folding would change; fold first and prepare then (libqat.unprepare goes back)"
        )
    names = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    kept: dict[str, str] = {}
    try:
        layers, kept = _pairs(model, names)
    except Exception as error:  # tracing runs the user's forward on symbols: any error may come out of it
        return FoldedBatchNorms([], {name: f"torch.fx cannot trace the model: {error}" for name in names})
    ranks = _ranks(model, inputs, layers.values()) if inputs else {}
    folded = []
    for name, layer_name in layers.items():
        layer, norm = model.get_submodule(layer_name), model.get_submodule(name)
        reason = _refusal(layer, norm) or _shared(model, layer, norm) or _rank(layer, norm, ranks)
        if reason:
            kept[name] = reason
        else:
            fold_batch_norm(layer, norm)
            folded.append((layer_name, name))
    return FoldedBatchNorms(folded, {name: kept[name] for name in names if name in kept})


class _Tracer(fx.Tracer):
    """Steps over the layers and norms, also those of libqat, as fx does over torch.nn's own."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return isinstance(module, (*_LAYERS, _BatchNorm)) or super().is_leaf_module(module, qualified_name)


def _pairs(model: nn.Module, names: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """(BatchNorm -> layer for the proven pairs, BatchNorm -> reason for the others)."""
    modes = {module: module.training for module in model.modules()}
    found = []
    try:
        for training in (True, False):
            graph = _Tracer().trace(model.train(training))
            found.append({name: _layer_before(graph, name) for name in names})
    finally:
        for module, training in modes.items():
            module.training = training
    layers, kept = {}, {}
    for name in names:
        (layer, reason), (other, other_reason) = found[0][name], found[1][name]
        if layer is not None and layer == other:
            layers[name] = layer
        else:
            kept[name] = reason or other_reason or "training and evaluation call it after different layers"
    return layers, kept


def _layer_before(graph: fx.Graph, name: str) -> tuple[str | None, str]:
    """(the layer whose output only this BatchNorm reads, "") or (None, the reason why there is none)."""
    calls = [node for node in graph.nodes if node.op == "call_module" and node.target == name]
    if len(calls) != 1:
        return None, f"forward calls it {len(calls)} times"
    inputs = calls[0].all_input_nodes
    before = inputs[0] if len(inputs) == 1 else None
    if before is None or before.op != "call_module":
        return None, "what comes before it is not a layer"
    if len(before.users) != 1:
        return None, f"{before.target}: its output is read by {len(before.users)} others"
    if sum(node.op == "call_module" and node.target == before.target for node in graph.nodes) != 1:
        return None, f"{before.target}: forward calls it more than once"
    for node in graph.nodes:
        if node.op == "get_attr" and node.target.rpartition(".")[0] in (name, before.target):
            return None, f"{node.target}: forward reads it"
    return before.target, ""


def _shared(model: nn.Module, layer: nn.Module, norm: nn.Module) -> str:
    """Names a parameter or buffer of the pair that another module holds too."""
    own = {id(tensor) for module in (layer, norm) for tensor in _tensors(module)}
    for name, module in model.named_modules():
        if module is not layer and module is not norm and any(id(t) in own for t in _tensors(module)):
            return f"{name or 'model'}: shares a parameter with it"
    return ""


def _tensors(module: nn.Module) -> list[Tensor]:
    tensors = (*module._parameters.values(), *module._buffers.values())
    return [tensor for tensor in tensors if tensor is not None]


def _rank(layer: nn.Module, norm: nn.Module, ranks: dict[nn.Module, int]) -> str:
    """Whether the layer's channels are the dimension that a BatchNorm normalizes, the second."""
    if not isinstance(layer, (nn.Linear, nn.Conv1d, nn.ConvTranspose1d)):
        return ""
    wanted = 2 if isinstance(layer, nn.Linear) else 3
    if layer not in ranks:
        return f"it also takes inputs of {5 - wanted} dimensions, where folding is wrong: pass example inputs"
    if ranks[layer] != wanted:
        return f"an input of {ranks[layer]} dimensions has its channels where BatchNorm1d has none"
    return ""


@torch.no_grad()
def _ranks(model: nn.Module, inputs: tuple, names) -> dict[nn.Module, int]:
    """Layer -> dimensions of its output in a run on example inputs."""
    ranks: dict[nn.Module, int] = {}

    def record(module: nn.Module, _, output: Tensor) -> None:
        ranks[module] = output.dim()

    modes = {module: module.training for module in model.modules()}
    hooks = [model.get_submodule(name).register_forward_hook(record) for name in names]
    try:
        model.eval()(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    return ranks


__all__ = ["FoldedBatchNorms", "fold_batch_norm", "fold_batch_norms", "freeze_batch_norm"]
