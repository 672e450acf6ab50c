"""Layers whose forward sees the numbers that ship. `prepare` turns ordinary layers into these in place.

Each class is its torch.nn parent with another forward: the same parameters (the latents, float32), the same
state_dict keys, the same pickling. What the weight carries is a `WeightQuantizer`, which is not part of the
state_dict. Learned scales are a further parameter, `weight_scales`, None where there are none. Legend: I in
and O out features, R rows (dimension 0 of a weight), G blocks in a row, P scale parameters per block, F free
parameters of SEQ per block.
"""

import copyreg
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (PyTorch's own spelling)

from .activations import activation_state, remove_roundings, rounded
from .experts import ExpertMatrix, QuantizedExperts, is_experts, matrices_of
from .weight_quantizer import WeightQuantizer

_ops = torch.ops.libqat


class _Quantized(nn.Module):
    """What the quantized layers have in common."""

    weight_quantizer: WeightQuantizer
    weight_scales: nn.Parameter | None
    """float32 [R, G, P], the unstored learned scales, or [R, G, F], the free parameters of SEQ; None where a
    rule gives the scales."""

    def fake_quantized(self) -> Tensor:
        """The weight that forward multiplies with, float32 [R, ...], differentiable."""
        return self.weight_quantizer.fake_quantize(self.weight, self.weight_scales)

    def _rounded(self, place: str, x: Tensor) -> Tensor:
        """What goes into the product ("input") or comes out ("output"), as the consumer rounds it."""
        quantizer = self.weight_quantizer
        if not (quantizer.output if place == "output" else quantizer.input):
            return x
        return rounded(self, place, x) if quantizer.enabled and quantizer.blend > 0 else x

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_Quantized":
        """Moves the layer as `model.to(...)` asks, except that latents and learned scales stay float32."""
        latents = [self.weight, self.weight_scales, *activation_state(self)]
        apply_keeping_latents(self, [self.weight_quantizer], latents, super()._apply, fn, recurse)
        return self


def apply_keeping_latents(
    module: nn.Module,
    quantizers: "list[WeightQuantizer]",
    latents: "list[Tensor | None]",
    apply: Callable[..., nn.Module],
    fn: Callable[[Tensor], Tensor],
    recurse: bool,
) -> None:
    """`apply(fn, recurse)`, the module's own `_apply`, that leaves `latents` and their gradients in float32.

    `model.half()` and the like then give what preparing a half-precision model gives: activations, biases and
    norms in that dtype. Latents rounded to it would no longer move at small learning rates.
    """
    kept = [latent for latent in latents if latent is not None]
    kept += [latent.grad for latent in kept if latent.grad is not None]
    former = quantizers[0].dtype
    # whether fn changes dtypes shows on a tensor of the dtype that the weight had before it was raised
    activations = fn(torch.empty(0, dtype=former, device=kept[0].device)).dtype

    def keep_float32(tensor: Tensor) -> Tensor:
        applied = fn(tensor)
        is_latent = any(tensor is latent for latent in kept) and applied.dtype != torch.float32
        return tensor.to(applied.device) if is_latent else applied

    apply(keep_float32, recurse)
    if activations not in (former, torch.float32):
        warnings.warn(
            f"libqat: asked for {activations} parameters; a prepared model keeps its latents in float32",
            stacklevel=3,
        )
    for quantizer in quantizers:
        quantizer.dtype = activations


class QuantizedLinear(_Quantized, nn.Linear):
    """y = x @ w_hat^T + b; x: [..., I], y: [..., O] in x's dtype, latents float32[O, I]."""

    def forward(self, input: Tensor) -> Tensor:
        quantizer = self.weight_quantizer
        return quantizer.blended(
            lambda: F.linear(input, self.weight.to(input.dtype), self.bias),
            lambda: self._rounded("output", self._product(self._rounded("input", input))),
        )

    def _product(self, input: Tensor) -> Tensor:
        quantizer = self.weight_quantizer
        return _ops.quantized_linear(
            input,
            self.weight,
            self.bias,
            *quantizer.rules,
            quantizer.field_scales(self.weight_scales),
            quantizer.scale_gradient,
        )


class QuantizedEmbedding(_Quantized, nn.Embedding):
    """y[t] = w_hat[indices[t]]; only the rows that the batch touches are quantized."""

    @property
    def output_scale(self) -> float:
        """What the looked-up rows are multiplied with."""
        return 1.0

    def forward(self, input: Tensor) -> Tensor:
        quantizer = self.weight_quantizer
        padding = -1 if self.padding_idx is None else self.padding_idx
        rows = quantizer.blended(
            lambda: F.embedding(input, self.weight, self.padding_idx),
            lambda: _ops.quantized_embedding(
                input,
                self.weight,
                padding,
                *quantizer.rules,
                quantizer.field_scales(self.weight_scales),
                quantizer.scale_gradient,
            ),
        )
        return rows.to(quantizer.dtype)


class QuantizedScaledEmbedding(QuantizedEmbedding):
    """An embedding times its buffer `embed_scale`, as the Gemma models have it."""

    @property
    def output_scale(self) -> float:
        """The scale in the dtype that the weight had: a bfloat16 model rounds it."""
        return self.embed_scale.to(self.weight_quantizer.dtype).item()

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale.to(self.weight_quantizer.dtype)


class _QuantizedConv(_Quantized):
    """Convolution with w_hat; a row is everything after dimension 0 of the weight."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.fake_quantized().to(input.dtype)
        return self._rounded("output", self._conv_forward(self._rounded("input", input), weight, self.bias))


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
        convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dimensions - 1]
        product = convolve(
            self._rounded("input", input),
            self.fake_quantized().to(input.dtype),
            self.bias,
            self.stride,
            self.padding,
            output_padding,
            self.groups,
            self.dilation,
        )
        return self._rounded("output", product)


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

_CONVOLUTIONS = tuple(layer for layer in QUANTIZED if layer not in (nn.Linear, nn.Embedding))

FLOAT = {quantized: layer for layer, quantized in QUANTIZED.items()}
"""Quantized class -> the layer class it came from."""

SCALED_EMBEDDINGS = (
    "Gemma3TextScaledWordEmbedding",
    "Gemma3nTextScaledWordEmbedding",
    "Gemma4TextScaledWordEmbedding",
    "Gemma4UnifiedTextScaledWordEmbedding",
)
"""Classes of transformers whose forward is that of nn.Embedding times `embed_scale`."""


class _Derived(type):
    """The class of classes made by `quantized_class`, so that they can be pickled."""


copyreg.pickle(_Derived, lambda derived: (quantized_class, (FLOAT[derived],)))


def quantized_class(layer: type[nn.Module]) -> type[nn.Module]:
    """The class that a layer of class `layer` gets. KeyError for layers that libqat does not know.

    That of a known class of transformers (a scaled embedding, experts) is its subclass, made once.
    """
    if layer not in QUANTIZED:
        behavior = _behavior(layer)
        if behavior is None:
            raise KeyError(layer)
        QUANTIZED[layer] = _Derived(f"Quantized{layer.__name__}", (behavior, layer), {})
        FLOAT[QUANTIZED[layer]] = layer
    return QUANTIZED[layer]


def is_known(layer: type[nn.Module]) -> bool:
    """Whether a layer of this class, or of the class it came from, can be quantized."""
    return layer in QUANTIZED or layer in FLOAT or _behavior(layer) is not None


def _behavior(layer: type[nn.Module]) -> type[nn.Module] | None:
    if not layer.__module__.startswith("transformers."):
        return None
    if layer.__name__ in SCALED_EMBEDDINGS:
        return QuantizedScaledEmbedding
    return QuantizedExperts if hasattr(layer, "_apply_gate") else None


def kind_of(module: nn.Module) -> str | None:
    """What policies call the layer: "linear", "embedding" or "conv"; None for every other module."""
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "conv" if isinstance(module, _CONVOLUTIONS) else None


def weights_of(module: nn.Module) -> "Iterator[tuple[str, str, nn.Module | ExpertMatrix]]":
    """(parameter's name, kind, layer) of each weight of this module that could be quantized."""
    kind = kind_of(module)
    if kind is not None and isinstance(getattr(module, "weight", None), Tensor):
        yield "weight", kind, module
    elif kind is None and is_experts(module):
        for key in matrices_of(module):
            yield key, "linear", ExpertMatrix(module, key)


def owner_of(layer: "nn.Module | ExpertMatrix") -> nn.Module:
    """The module whose parameter the layer's weight is."""
    return layer.module if isinstance(layer, ExpertMatrix) else layer


def is_quantized(layer: "nn.Module | ExpertMatrix") -> bool:
    """Whether forward sees the layer's quantized weight."""
    if isinstance(layer, ExpertMatrix):
        return layer.key in getattr(layer.module, "expert_quantizers", {})
    return type(layer) in FLOAT


def attach(layer: "nn.Module | ExpertMatrix", quantizer: WeightQuantizer) -> None:
    """Makes the layer's forward use its quantized weight."""
    module = owner_of(layer)
    if isinstance(layer, ExpertMatrix):
        module.__dict__.setdefault("expert_quantizers", {})[layer.key] = quantizer
    else:
        module.weight_quantizer = quantizer
    if type(module) not in FLOAT:
        module.__class__ = quantized_class(type(module))


def detach(module: nn.Module) -> None:
    """Makes an ordinary module of one whose class `attach` changed; learned scales are dropped."""
    for key, _, layer in list(weights_of(module)):
        if not is_quantized(layer):
            continue
        layer.weight.data = layer.weight.data.to(layer.weight_quantizer.dtype)
        delattr(module, f"{key}_scales")
    remove_roundings(module)
    del module.__dict__["expert_quantizers" if isinstance(module, QuantizedExperts) else "weight_quantizer"]
    module.__class__ = FLOAT[type(module)]
