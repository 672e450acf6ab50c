"""What the weight of a layer of `libqat.nn` carries. Legend as there."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import _core

_ops = torch.ops.libqat

# plain names, so that torch.compile can look them up
_SEQ = frozenset(name for name in _core.grid_names() if _core.grid_holds_seq(name))


@dataclass
class WeightQuantizer:
    """Where one weight ships and how its gradient flows."""

    tensor: str
    """The parameter's name, for messages. Tied layers share the first name."""
    grid: str
    """Name of a grid: "q4_0", "int4_channel", ..."""
    estimator: str = "ste"
    """"ste", "clipped_ste", "trust_mask" or "stable_qat"."""
    scale: str = "reference"
    """"reference", "search", "differentiated"; "learned" or "seq": from the layer's `weight_scales`."""
    dtype: torch.dtype = torch.float32
    """The dtype the weight had before its latents were raised to float32: that of the layer's activations."""
    enabled: bool = True
    """False: forward uses the float latents."""
    scale_gradient: str = "lsq"
    """"lsq", "tensor" or "plain": what the gradient of learned scales is multiplied with."""
    blend: float = 1.0
    """b in [0, 1]: forward computes (1 - b) * (the float layer) + b * (the quantized layer)."""
    training_grid: str = ""
    """The grid that forward uses in place of `grid`, which ships; see PreparedModel.set_training_grid."""
    input: str = ""
    """Format of what goes into the product with the weight, see libqat.activations; "": it is not rounded."""
    output: str = ""
    """The same of what comes out."""

    @property
    def label(self) -> str:
        """The parameter's name as operators get it: none in a compiled graph.

        A name there would be a constant that torch.compile guards on, so that each layer of a stack would
        need a graph of its own.
        """
        return "" if torch.compiler.is_compiling() else self.tensor

    @property
    def learned(self) -> bool:
        """Whether the scales are a parameter of the layer: of the grid that forward uses."""
        has_scales = bool(_core.grid_info(self.training_grid or self.grid)["fields"])
        return self.scale in ("learned", "seq") and has_scales

    @property
    def tied(self) -> bool:
        """Whether they are the free parameters of SEQ: not on a training grid that cannot hold it."""
        return self.scale == "seq" and (self.training_grid or self.grid).partition("@")[0] in _SEQ

    @property
    def rules(self) -> tuple[str, str, str, str]:
        """Grid, estimator, scale rule and label, as operators take them."""
        scale = "learned" if self.scale == "seq" else self.scale
        return self.training_grid or self.grid, self.estimator, scale, self.label

    def start(self, weight: Tensor, scale: str = "search") -> Tensor:
        """Learned scales by the rule "search" or "reference", float32 [R, G, P]; [R, G, F] where tied."""
        choose = _ops.seq_start if self.tied else _ops.choose_scales
        return choose(weight.detach(), self.rules[0], scale, self.tensor)

    def field_scales(self, scales: Tensor | None) -> Tensor | None:
        """The scales that operators take, float32 [R, G, P]; `scales`: the layer's `weight_scales`."""
        if scales is None or not self.tied:
            return scales
        return _ops.seq_tie(scales, self.training_grid or self.grid, self.label)

    def untied(self, scales: Tensor) -> Tensor:
        """The parameters whose `field_scales` these are. ArgumentError for scales that SEQ cannot give."""
        return _core.seq_untie(scales, self.training_grid or self.grid, self.tensor) if self.tied else scales

    def shipped(self, weight: Tensor, scales: Tensor | None) -> tuple[str, Tensor | None]:
        """Scale rule and scales with which a layer's weight is frozen; `scales`: its `weight_scales`."""
        # scales of another grid say nothing about this one's: back on it, they would start as here
        if self.scale in ("learned", "seq") and self.training_grid:
            own = replace(self, training_grid="")
            return own.shipped(weight, own.start(weight) if own.learned else None)
        return self.rules[2], self.field_scales(scales)

    def blended(self, as_float: Callable[[], Tensor], quantized: Callable[[], Tensor]) -> Tensor:
        """What forward computes of the layer's two outputs."""
        if not self.enabled or self.blend == 0:
            return as_float()
        return quantized() if self.blend == 1 else torch.lerp(as_float(), quantized(), self.blend)

    def fake_quantize(self, weight: Tensor, scales: Tensor | None = None) -> Tensor:
        """float32[R, ...] on the grid, or the latents themselves when disabled.

        scales: the layer's `weight_scales` where they are learned.
        """
        return self.blended(
            lambda: weight,
            lambda: _ops.fake_quantize(weight, *self.rules, self.field_scales(scales), self.scale_gradient),
        )
