"""Rounding a convolutional network under a policy, training it against the float one, and scoring both.

The objective needs no labels: on the same image, the rounded network's class probabilities shall be those of
the float network (KL divergence), and so shall the outputs of its blocks (squared error, relative to their
size). The second part tells each block what it did wrong, and so needs far fewer images than the first alone.
Legend: N images, C classes. Images are uint8[N, 3, S, S].
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (PyTorch's own spelling)

import libqat

from .efficientnet import normalize

BATCH_NORM = ("fold", "freeze", "late")
"""fold: into the convolutions, before rounding; freeze: from the first step; late: from the middle on."""
RESAMPLES = 2000


@dataclass(frozen=True)
class Training:
    """Settings of one QAT run."""

    steps: int
    batch_size: int
    learning_rate: float
    """Of Adam; warmed up over 5 % of the steps, then a half cosine to zero."""
    block_weight: float
    """Of the blocks' mean relative squared error, beside the KL divergence."""
    batch_norm: str
    seed: int


Progress = Callable[[int, int, str], None]
"""(done, total, note)."""


def attach(model: nn.Module, policy: Mapping | str, batch_norm: str) -> libqat.PreparedModel:
    """A prepared copy of a float network."""
    model = shell(model, batch_norm)
    if batch_norm == "freeze":
        libqat.freeze_batch_norm(model)
    return libqat.prepare(model, policy)


def shell(model: nn.Module, batch_norm: str) -> nn.Module:
    """A copy of a float network with the tensors that ship: BatchNorms folded if `batch_norm` says so."""
    model = copy.deepcopy(model)
    if batch_norm == "fold" and (kept := libqat.fold_batch_norms(model).kept):
        raise libqat.ArgumentError(f"vision: expected BatchNorms that can be folded, got {kept}")
    return model


def train(
    prepared: libqat.PreparedModel,
    teacher: nn.Module,
    images: Tensor,
    options: Training,
    progress: Progress,
) -> None:
    """Makes the rounded network agree with `teacher`, its float self, by Adam on every parameter."""
    model = prepared.model.train()
    optimizer = torch.optim.Adam(model.parameters(), options.learning_rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, options.steps))
    mean = math.nan
    with BlockOutputs(model) as blocks, BlockOutputs(teacher) as wanted:
        for step, chosen in enumerate(batches(len(images), options)):
            if options.batch_norm == "late" and step == options.steps // 2:
                libqat.freeze_batch_norm(model)
            x = network_input(images[chosen])
            with torch.no_grad():
                targets = teacher(x)
            kl = divergence(targets, model(x)).mean()
            (kl + options.block_weight * blocks.distance(wanted)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            mean = kl.item() if step == 0 else 0.9 * mean + 0.1 * kl.item()
            progress(step + 1, options.steps, f"KL {mean:.3f}")
    model.eval()


class BlockOutputs:
    """The outputs of a network's blocks in its latest forward pass, while the `with` block lasts."""

    def __init__(self, network: nn.Module):
        self._network = network
        self._outputs: dict[int, Tensor] = {}

    def __enter__(self) -> "BlockOutputs":
        self._hooks = [
            block.register_forward_hook(lambda _, __, output, index=index: self._keep(index, output))
            for index, block in enumerate(self._network.blocks)
        ]
        return self

    def __exit__(self, *exception) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keep(self, index: int, output: Tensor) -> None:
        self._outputs[index] = output

    def distance(self, wanted: "BlockOutputs") -> Tensor:
        """Mean over the blocks of |y - y_wanted|^2 / |y_wanted|^2."""
        pairs = [(self._outputs[index], wanted._outputs[index]) for index in self._outputs]
        return torch.stack([(y - z).square().sum() / z.square().sum() for y, z in pairs]).mean()


def rate(step: int, steps: int) -> float:
    """Factor of the learning rate: warm-up over 5 % of the steps, then a half cosine to zero."""
    return min((step + 1) / (0.05 * steps), 1.0) * (1 + math.cos(math.pi * step / steps)) / 2


def batches(count: int, options: Training) -> list[Tensor]:
    """Indices of each step's images: all images in a new order, as often as the steps need."""
    generator = torch.Generator().manual_seed(options.seed)
    needed = options.steps * options.batch_size
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(-(-needed // count))])
    return list(order[:needed].split(options.batch_size))


def network_input(images: Tensor) -> Tensor:
    """Normalized. PyTorch's convolutions on a CPU are fastest on images with channels last."""
    return normalize(images).to(memory_format=torch.channels_last)


def divergence(targets: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(targets) || softmax(logits)) of each image, nats: float32[N]."""
    terms = F.kl_div(logits.log_softmax(-1), targets.log_softmax(-1), log_target=True, reduction="none")
    return terms.sum(-1)


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor, progress: Progress | None = None, size: int = 64) -> Tensor:
    """Logits float32[N, C] in evaluation mode."""
    model.eval()
    parts = []
    for start in range(0, len(images), size):
        parts.append(model(network_input(images[start : start + size])))
        if progress:
            progress(min(start + size, len(images)), len(images), "")
    return torch.cat(parts)


def agreement(reference: Tensor, logits: Tensor, seed: int = 0) -> dict:
    """Top-1 agreement and KL from the reference's logits, with 95 % bootstrap intervals over the images."""
    same = (logits.argmax(-1) == reference.argmax(-1)).double()
    kl = F.kl_div(logits.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="none").sum(
        -1
    )
    return {
        "top1": same.mean().item(),
        "top1_interval": interval(same, seed),
        "kl": kl.mean().item(),
        "kl_interval": interval(kl.double(), seed),
    }


def accuracy(labels: Tensor, logits: Tensor, seed: int = 0) -> dict:
    """Share of right answers, with a 95 % bootstrap interval."""
    right = (logits.argmax(-1) == labels).double()
    return {"accuracy": right.mean().item(), "accuracy_interval": interval(right, seed)}


def interval(values: Tensor, seed: int) -> list[float]:
    """95 % bootstrap interval of the mean of float64[N]; every row draws the same images."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    return values[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()


@torch.no_grad()
def layer_errors(
    reference: nn.Module, model: nn.Module, names: list[str], images: Tensor
) -> dict[str, float]:
    """Per layer |y - y_float| / |y_float| (Euclidean, over all images) of its output y in the whole network.

    The layer's input carries the errors of all layers before it.
    """
    outputs = []
    for network in (reference, model):
        seen: dict[str, Tensor] = {}
        hooks = [
            network.get_submodule(name).register_forward_hook(
                lambda _, __, output, name=name, seen=seen: seen.__setitem__(name, output)
            )
            for name in names
        ]
        network.eval()(network_input(images))
        for hook in hooks:
            hook.remove()
        outputs.append(seen)
    exact, rounded = outputs
    return {name: ((rounded[name] - exact[name]).norm() / exact[name].norm()).item() for name in names}


def save(prepared: libqat.PreparedModel, path: Path) -> None:
    """Writes the checkpoint that ships."""
    libqat.save(libqat.freeze(prepared), path)


def load(path: Path, float_shell: nn.Module) -> nn.Module:
    """An ordinary float network with the numbers of a checkpoint; `float_shell` says its shape."""
    model = copy.deepcopy(float_shell)
    model.load_state_dict(dict(libqat.dequantize(libqat.load(path))))
    return model.eval()
