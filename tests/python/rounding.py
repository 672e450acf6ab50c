"""What the tests of rounding without training share: inputs, a weight, what ships."""

import numpy as np
import torch

import libqat
from libqat import _core

CODED = [grid.name for grid in libqat.grids().values() if grid.codes]
WIDTH = 256
"""Weights a row: what every grid's block divides."""


def inputs(tokens=600, width=WIDTH, spread=1.0, seed=0):
    """Correlated inputs of different sizes, as hidden states are: float64[tokens, width]."""
    random = np.random.default_rng(seed)
    mix = random.normal(size=(width, width)) / width**0.5 + np.eye(width)
    return random.normal(size=(tokens, width)) @ mix * np.exp(spread * random.normal(size=width))


def second_moments(x):
    return x.T @ x / len(x)


def matrix(rows=12, width=WIDTH, seed=1):
    return (np.random.default_rng(seed).normal(size=(rows, width)) * 0.05).astype(np.float32)


def decoded(latent, scales, grid):
    """What ships, by the grid's own functions."""
    stored = _core.grid_store(grid, scales, latent.shape[1])
    return _core.grid_decode(grid, _core.grid_encode(grid, latent, scales), stored)


def reference_scales(w, grid):
    """The consumer's rule; float32[rows, blocks, parameters]."""
    if libqat.grids()[grid].whole_tensor:
        return np.repeat(_core.grid_choose(grid, w.reshape(1, -1)), len(w), axis=0)
    return _core.grid_choose(grid, w)


def search_scales(w, grid):
    return _core.grid_choose(grid, w, "search")


def weighted(w, importance, grid):
    scales = _core.weighted_search_tensor(torch.from_numpy(w), torch.from_numpy(importance), grid)
    return np.ascontiguousarray(scales.expand(len(w), -1, -1).numpy())


def on_lattice(codes, scales, dtype):
    """codes int8 [R, N], scales [R, G] -> the weights as a file of that dtype holds them, float32."""
    scales = scales.repeat_interleave(codes.shape[1] // scales.shape[1], 1)
    return (codes.float() * scales.float()).to(dtype).float()


def drawn(logits, generator):
    """Ids by their probabilities: how many cumulated ones each row's random number has passed."""
    sums = logits.double().softmax(-1).cumsum(-1)
    numbers = torch.rand(len(logits), 1, dtype=torch.float64, generator=generator)
    return (sums <= numbers * sums[:, -1:]).sum(-1)
