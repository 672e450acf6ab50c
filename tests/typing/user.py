"""A user's program as a type checker sees it: `make lint` runs mypy over it; nothing executes it."""

import os

import torch
from typing_extensions import assert_type

import libqat


def train_own_module(net: torch.nn.Module, path: str | os.PathLike[str]) -> None:
    prepared = libqat.prepare(net, "int4-channel")
    assert_type(prepared, libqat.PreparedModel)
    assert_type(prepared.report(), libqat.Report)
    checkpoint = libqat.freeze(prepared)
    assert_type(checkpoint, libqat.QuantizedCheckpoint)
    libqat.save(checkpoint, path)
    assert_type(libqat.load(path).weight("in.weight"), torch.Tensor)
    assert_type(libqat.dequantize(checkpoint), dict[str, torch.Tensor])


def run_language_model(folder: str, tokens: torch.Tensor) -> float:
    model = libqat.load_model(folder)
    assert_type(model.decoder, libqat.Decoder)
    assert_type(model.decoder(tokens), torch.Tensor)
    scores = libqat.compare(model.decoder, [model.decoder], tokens, window=32)
    assert_type(scores, list[libqat.Score])
    return scores[0].perplexity


def ask(policy: libqat.Policy) -> dict[str, str]:
    assert_type(libqat.Policy.presets(), list[str])
    try:
        grids = policy.resolve([("lm_head", "linear", (64, 32))])
    except libqat.ArgumentError as error:
        assert_type(error, libqat.ArgumentError)
        failure: ValueError = error  # what a user without libqat's types catches
        return {"error": str(failure)}
    assert_type(libqat.__version__, str)
    assert_type(libqat.include_paths(), list[str])
    return {"grid": grids[0], "cmake": libqat.cmake_prefix_path}
