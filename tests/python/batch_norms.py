"""Networks with BatchNorm as training leaves them."""

import torch
from torch import nn
from torch.nn import functional as F


def settle(norm, seed=0):
    """Statistics and parameters as training leaves them: no channel like another, some gains negative."""
    generator = torch.Generator().manual_seed(seed)
    channels = norm.num_features
    with torch.no_grad():
        norm.running_mean.copy_(torch.randn(channels, generator=generator))
        norm.running_var.copy_(torch.rand(channels, generator=generator) * 3 + 0.01)
        if norm.affine:
            norm.weight.copy_(torch.randn(channels, generator=generator))
            norm.bias.copy_(torch.randn(channels, generator=generator))
    return norm


class Block(nn.Module):
    """Expand, depthwise, project with a skip, then a classifier: the shape of a mobile network."""

    def __init__(self):
        super().__init__()
        self.expand, self.norm0 = nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.norm1 = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.project, self.norm2 = nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)
        self.layer_norm = nn.LayerNorm(4)
        self.head, self.norm3 = nn.Linear(4, 6), nn.BatchNorm1d(6)

    def forward(self, x):
        y = F.relu6(self.norm0(self.expand(x)))
        y = F.relu6(self.norm1(self.depthwise(y)))
        x = x + self.norm2(self.project(y))
        return self.norm3(self.head(self.layer_norm(x.mean((2, 3)))))


def block():
    torch.manual_seed(4)
    model = Block().double()
    for seed, norm in enumerate((model.norm0, model.norm1, model.norm2, model.norm3)):
        settle(norm, seed)
    return model
