"""The small task: EfficientNet-Lite0 with a new classifier, fine-tuned in float to read MNIST digits."""

import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (PyTorch's own spelling)

import libqat
from libqat import data

from . import qat
from .images import digit_images

CLASSES = 10
TEST_EVERY = 5
LEARNING_RATE = 5e-4


def read(side: int, cache: str | os.PathLike | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """4,000 training images uint8[N, 3, S, S] and labels int64[N], then 1,000 test images and labels."""
    digits, labels = data.mnist(cache)
    images = digit_images(digits, side)
    test = torch.arange(len(digits)) % TEST_EVERY == TEST_EVERY - 1
    return images[~test].contiguous(), labels[~test], images[test].contiguous(), labels[test]


def with_classifier(network: nn.Module, seed: int) -> nn.Module:
    """A copy of the network with a new classifier, one output per digit; its BatchNorms are frozen."""
    torch.manual_seed(seed)
    model = qat.shell(network, "freeze")
    model.fc = nn.Linear(model.fc.in_features, CLASSES)
    libqat.freeze_batch_norm(model)
    return model


def fine_tune(
    model: nn.Module, images: Tensor, labels: Tensor, options: qat.Training, progress: qat.Progress
) -> None:
    """Adam on the cross-entropy, every parameter."""
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: qat.rate(step, options.steps))
    for step, chosen in enumerate(qat.batches(len(images), options)):
        loss = F.cross_entropy(model(qat.network_input(images[chosen])), labels[chosen])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        progress(step + 1, options.steps, f"loss {loss.item():.3f}")
    model.eval()


def fine_tuned(
    network: nn.Module, images: Tensor, labels: Tensor, options: qat.Training, path: Path, progress
) -> nn.Module:
    """`with_classifier` and `fine_tune`, kept in a file: the same settings find it again."""
    model = with_classifier(network, options.seed)
    settings = {"steps": options.steps, "batch_size": options.batch_size, "seed": options.seed}
    if path.is_file() and (saved := torch.load(path, weights_only=True))["settings"] == settings:
        model.load_state_dict(saved["state"])
        return model.eval()
    fine_tune(model, images, labels, options, progress)
    torch.save({"settings": settings, "state": model.state_dict()}, path)
    return model
