"""Layers whose forward sees the numbers that ship. `prepare` turns ordinary layers into these in place.

Each class is its torch.nn parent with another forward: the same parameters (the latents, float32), the same
state_dict keys, the same pickling. What the weight carries is a `WeightQuantizer`, which is not part of the
state_dict. Legend: I in and O out features, R rows (dimension 0 of a weight).
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (PyTorch's own spelling)

_ops = torch.ops.libqat


@dataclass
class WeightQuantizer:
    """Where one weight ships and how its gradient flows."""

    tensor: str
    """The parameter's name, for messages. Tied layers share the first name."""
    grid: str
    """Name of a grid: "q4_0", "int4_channel", ..."""
    estimator: str = "ste"
    """"ste" or "clipped_ste"."""
    scale: str = "reference"
    """"reference" or "search"."""
    dtype: torch.dtype = torch.float32
    """The dtype the weight had before its latents were raised to float32: that of the layer's activations."""
    enabled: bool = True
    """False: forward uses the float latents."""

    @property
    def label(self) -> str:
        """The parameter's name as operators get it: none in a compiled graph.

        A name there would be a constant that torch.compile guards on, so that each layer of a stack would
        need a graph of its own.
        """
        return "" if torch.compiler.is_compiling() else self.tensor

    def fake_quantize(self, weight: Tensor) -> Tensor:
        """float32[R, ...] on the grid, or the latents themselves when disabled."""
        if not self.enabled:
            return weight
        return _ops.fake_quantize(weight, self.grid, self.estimator, self.scale, self.label)


class _Quantized(nn.Module):
    """What the quantized layers have in common."""

    weight_quantizer: WeightQuantizer

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_Quantized":
        """Moves the layer as `model.to(...)` asks, except that the latents stay float32.

        `model.half()` and the like then give what preparing a half-precision model gives: activations, biases
        and norms in that dtype. Latents rounded to it would no longer move at small learning rates.
        """
        quantizer, latents = self.weight_quantizer, (self.weight, self.weight.grad)
        # whether fn changes dtypes shows on a tensor of the dtype that the weight had before it was raised
        activations = fn(torch.empty(0, dtype=quantizer.dtype, device=self.weight.device)).dtype

        def keep_float32(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            kept = any(tensor is latent for latent in latents) and applied.dtype != torch.float32
            return tensor.to(applied.device) if kept else applied

        super()._apply(keep_float32, recurse)
        if activations not in (quantizer.dtype, torch.float32):
            warnings.warn(
                f"libqat: asked for {activations} parameters; a prepared model keeps its latents in float32",
                stacklevel=2,
            )
        quantizer.dtype = activations
        return self


class QuantizedLinear(_Quantized, nn.Linear):
    """y = x @ w_hat^T + b; x: [..., I], y: [..., O] in x's dtype, latents float32[O, I]."""

    def forward(self, input: Tensor) -> Tensor:
        quantizer = self.weight_quantizer
        if not quantizer.enabled:
            return F.linear(input, self.weight.to(input.dtype), self.bias)
        return _ops.quantized_linear(
            input,
            self.weight,
            self.bias,
            quantizer.grid,
            quantizer.estimator,
            quantizer.scale,
            quantizer.label,
        )


class QuantizedEmbedding(_Quantized, nn.Embedding):
    """y[t] = w_hat[indices[t]]; only the rows that the batch touches are quantized."""

    def forward(self, input: Tensor) -> Tensor:
        quantizer = self.weight_quantizer
        if not quantizer.enabled:
            return super().forward(input).to(quantizer.dtype)
        padding = -1 if self.padding_idx is None else self.padding_idx
        rows = _ops.quantized_embedding(
            input,
            self.weight,
            padding,
            quantizer.grid,
            quantizer.estimator,
            quantizer.scale,
            quantizer.label,
        )
        return rows.to(quantizer.dtype)


class _QuantizedConv(_Quantized):
    """Convolution with w_hat; a row is everything after dimension 0 of the weight."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight_quantizer.fake_quantize(self.weight)
        return self._conv_forward(input, weight.to(input.dtype), self.bias)


class QuantizedConv1d(_QuantizedConv, nn.Conv1d):
    """`torch.nn.Conv1d` with w_hat."""


class QuantizedConv2d(_QuantizedConv, nn.Conv2d):
    """`torch.nn.Conv2d` with w_hat."""


class QuantizedConv3d(_QuantizedConv, nn.Conv3d):
    """`torch.nn.Conv3d` with w_hat."""


class _QuantizedConvTranspose(_Quantized):
    """Transposed convolution with w_hat; the weight's dimension 0, its rows, are the input channels."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        dimensions = len(self.kernel_size)
        output_padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, dimensions, self.dilation
        )
        weight = self.weight_quantizer.fake_quantize(self.weight)
        convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dimensions - 1]
        return convolve(
            input,
            weight.to(input.dtype),
            self.bias,
            self.stride,
            self.padding,
            output_padding,
            self.groups,
            self.dilation,
        )


class QuantizedConvTranspose1d(_QuantizedConvTranspose, nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` with w_hat."""


class QuantizedConvTranspose2d(_QuantizedConvTranspose, nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` with w_hat."""


class QuantizedConvTranspose3d(_QuantizedConvTranspose, nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` with w_hat."""


QUANTIZED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: QuantizedLinear,
    nn.Embedding: QuantizedEmbedding,
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
    nn.Conv3d: QuantizedConv3d,
    nn.ConvTranspose1d: QuantizedConvTranspose1d,
    nn.ConvTranspose2d: QuantizedConvTranspose2d,
    nn.ConvTranspose3d: QuantizedConvTranspose3d,
}
"""Layer class -> its quantized class."""

FLOAT = {quantized: layer for layer, quantized in QUANTIZED.items()}
"""Quantized class -> the layer class it came from."""


def kind_of(module: nn.Module) -> str | None:
    """What policies call the layer: "linear", "embedding" or "conv"; None for every other module."""
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "conv" if isinstance(module, tuple(QUANTIZED)) else None
