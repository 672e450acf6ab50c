"""Pictures as tensors: cut-outs on a ground, random views of them to train on, digits.

Legend: N views, P pictures, S the side of an image in pixels. Images are uint8[N, 3, S, S], pictures
uint8[P, 4, S, S] with opacity as the fourth channel.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (PyTorch's own spelling)

MARGIN = 0.9
"""Share of the image's side that a cut-out takes when the network is scored on it."""


def read(path: Path, side: int) -> Tensor:
    """A cut-out, trimmed and fitted into the square; of a photo without transparency the middle square."""
    with Image.open(path) as file:
        image = file.convert("RGBA")
    opacity = image.getchannel("A")
    if opacity.getextrema()[0] == 255:
        shorter = min(image.size)
        left, top = (image.width - shorter) // 2, (image.height - shorter) // 2
        image = image.crop((left, top, left + shorter, top + shorter))
    elif box := opacity.getbbox():
        image = image.crop(box)
    ratio = side / max(image.size)
    size = [max(round(length * ratio), 1) for length in image.size]
    square = Image.new("RGBA", (side, side))
    square.paste(image.resize(size, Image.Resampling.LANCZOS), [(side - length) // 2 for length in size])
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def read_all(paths: Sequence[Path], side: int) -> Tensor:
    """Pictures uint8[P, 4, S, S]."""
    return torch.stack([read(path, side) for path in paths])


def on_white(pictures: Tensor) -> Tensor:
    """What the network is scored on: each cut-out once, centred on white; photos as they are."""
    count, side = len(pictures), pictures.shape[-1]
    scale = torch.where(_opaque(pictures), 1.0, MARGIN)
    placed = _place(
        pictures.float() / 255, scale, torch.zeros(count, 2), torch.zeros(count, dtype=torch.bool)
    )
    return _to_bytes(_over(placed, torch.ones(count, 3, side, side)))


def random_views(pictures: Tensor, count: int, generator: torch.Generator, batch: int = 256) -> Tensor:
    """`count` views: each picture equally often, at random size, place and colouring, on a random ground."""
    order = [torch.randperm(len(pictures), generator=generator) for _ in range(-(-count // len(pictures)))]
    chosen = torch.cat(order)[:count]
    return torch.cat([_views(pictures, part, generator) for part in chosen.split(batch)])


def _views(pictures: Tensor, chosen: Tensor, g: torch.Generator) -> Tensor:
    subject = pictures[chosen].float() / 255
    others = pictures[torch.randint(len(pictures), (2, len(chosen)), generator=g)].float() / 255
    opaque = _opaque(pictures)[chosen]
    # A cut-out between 0.4 and 1.3 of the side, anywhere; a photo between the whole and a quarter of it.
    scale = torch.where(opaque, _uniform(g, len(chosen), 1.0, 2.0), _uniform(g, len(chosen), 0.4, 1.3))
    room = (1 - scale).abs()[:, None]  # how far the middle may move: inside the image, or still covering it
    shift = _uniform(g, len(chosen) * 2, -1.0, 1.0).view(-1, 2) * room
    view = _over(_place(subject, scale, shift, _chance(g, len(chosen), 0.5)), _grounds(others[0], g))
    second = _place(
        others[1],
        _uniform(g, len(chosen), 0.3, 0.7),
        _uniform(g, len(chosen) * 2, -0.6, 0.6).view(-1, 2),
        _chance(g, len(chosen), 0.5),
    )
    with_second = _chance(g, len(chosen), 0.25) & ~opaque
    view = torch.where(with_second.view(-1, 1, 1, 1), _over(second, view), view)
    return _to_bytes(_recolour(view, g))


def _grounds(pictures: Tensor, g: torch.Generator) -> Tensor:
    """White, one colour, a gradient of four, or a magnified piece of a picture over a colour."""
    count, side = len(pictures), pictures.shape[-1]
    kind = _uniform(g, count, 0.0, 1.0).view(-1, 1, 1, 1)
    colour = _uniform(g, count * 3, 0.0, 1.0).view(-1, 3, 1, 1).expand(-1, -1, side, side)
    corners = _uniform(g, count * 12, 0.0, 1.0).view(-1, 3, 2, 2)
    gradient = F.interpolate(corners, (side, side), mode="bilinear", align_corners=True)
    piece = _place(
        pictures,
        _uniform(g, count, 2.0, 4.0),
        _uniform(g, count * 2, -1.0, 1.0).view(-1, 2),
        _chance(g, count, 0.5),
    )
    ground = torch.where(kind < 0.75, gradient, _over(piece, colour))
    return torch.where(kind < 0.3, 1.0, torch.where(kind < 0.5, colour, ground))


def _place(pictures: Tensor, scale: Tensor, shift: Tensor, flip: Tensor) -> Tensor:
    """float32[N, 4, S, S] magnified by scale[N], moved by shift[N, 2] half sides, mirrored where flip[N]."""
    colour, opacity = pictures[:, :3], pictures[:, 3:]
    premultiplied = torch.cat([colour * opacity, opacity], 1)
    theta = torch.zeros(len(pictures), 2, 3)
    theta[:, 0, 0] = torch.where(flip, -1.0, 1.0) / scale
    theta[:, 1, 1] = 1 / scale
    theta[:, :, 2] = -shift / scale[:, None]
    grid = F.affine_grid(theta, list(pictures.shape), align_corners=False)
    return F.grid_sample(premultiplied, grid, align_corners=False)


def _over(placed: Tensor, ground: Tensor) -> Tensor:
    return placed[:, :3] + ground * (1 - placed[:, 3:])


def _recolour(images: Tensor, g: torch.Generator) -> Tensor:
    """Other saturation, contrast and brightness."""
    saturation, contrast, brightness = (
        _uniform(g, len(images), 1 - spread, 1 + spread).view(-1, 1, 1, 1) for spread in (0.4, 0.25, 0.2)
    )
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * saturation
    mean = images.mean((1, 2, 3), keepdim=True)
    return ((images - mean) * contrast + mean) * brightness


def _to_bytes(images: Tensor) -> Tensor:
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def _opaque(pictures: Tensor) -> Tensor:
    return pictures[:, 3].flatten(1).amin(1) == 255


def _uniform(g: torch.Generator, count: int, low: float, high: float) -> Tensor:
    return torch.rand(count, generator=g) * (high - low) + low


def _chance(g: torch.Generator, count: int, probability: float) -> Tensor:
    return torch.rand(count, generator=g) < probability


def digit_images(digits: Tensor, side: int) -> Tensor:
    """Grey digits uint8[N, 28, 28] as images, dark on white like print."""
    grey = 1 - digits[:, None].float() / 255
    return _to_bytes(F.interpolate(grey, (side, side), mode="bilinear")).expand(-1, 3, -1, -1)
