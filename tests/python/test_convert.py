"""Conversion between grids, as Python sees it."""

import pytest
import torch

import libqat
from libqat import _core


def tensor_on(grid: str, weight: torch.Tensor) -> libqat.QuantizedTensor:
    """`weight` on the grid, by the grid's own rule."""
    return _core.freeze_tensors([("w", weight)], {"w": grid}).quantized["w"]


def int4_weight(scale: float) -> torch.Tensor:
    """Two rows whose int4 rule (max|w| / 7.5) finds exactly this scale in every group of 32."""
    codes = torch.arange(-7.0, 9.0).repeat(2, 8)
    codes[codes == 8] = 7.5  # the maximum, which the rule divides by 7.5
    return codes * scale


def test_a_scale_that_fp16_holds_moves_to_q4_0():
    tensor = tensor_on("int4_g32", int4_weight(0.25))
    result, why = libqat.convert_tensor("w", tensor, "q4_0")
    assert why == ""
    assert result.grid == "q4_0"
    assert torch.equal(result.codes, tensor.codes)
    assert torch.equal(result.scales, tensor.scales)


def test_a_scale_that_fp16_does_not_hold_is_a_reason():
    result, why = libqat.convert_tensor("w", tensor_on("int4_g32", int4_weight(0.3)), "q4_0")
    assert result is None
    assert why.startswith("row 0, block 0: scales of q4_0 cannot hold 0.3")


def test_an_unknown_grid_is_an_error():
    with pytest.raises(libqat.ArgumentError, match="grid: expected one of"):
        libqat.convert_tensor("w", tensor_on("q4_0", torch.ones(1, 32)), "q9")
