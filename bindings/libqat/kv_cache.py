"""Keys and values of Hugging Face models, rounded as a quantized cache keeps them.

transformers looks its attention function up by the name in `config._attn_implementation`, at each call, and
gives it the keys and values that its cache holds. An attention module whose policy says so gets a view of its
configuration with another name, under which the function stands that rounds both first. Masks, the cache and
the model's own configuration stay as they are. Rounding all positions at each call gives the same numbers as
rounding each once, because it is elementwise.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ._core import UnsupportedError
from .activations import ActivationRounding, add_rounding, rounded, roundings_of

_PREFIX = "libqat_kv|"


class KvCacheRounding(nn.Module):
    """The scales of one attention layer's keys and values; a child of the layer, named `kv_cache`."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KvCacheRounding:
        """Moves the scales, and keeps them float32."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            return tensor.to(fn(torch.empty(0, device=tensor.device)).device)

        return super()._apply(keep_dtype, recurse)


class _Config:
    """A configuration with another attention function; all else is the model's own."""

    def __init__(self, config: Any):
        self.__dict__["own"] = config

    @property
    def _attn_implementation(self) -> str:
        name = _PREFIX + (self.own._attn_implementation or "eager")
        _register(name)
        return name

    def __getattr__(self, key: str) -> Any:
        if key == "own" or key.startswith("__"):  # while it is copied or unpickled
            raise AttributeError(key)
        return getattr(self.own, key)

    def __setattr__(self, key: str, value: Any) -> None:
        setattr(self.own, key, value)

    def __reduce__(self) -> tuple:
        return _Config, (self.own,)


def _register(name: str) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if name not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(name, _attention)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """The model's own attention function with rounded keys and values."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    [owner] = module.__dict__["kv_cache_owner"]
    key = rounded(owner.kv_cache, "keys", key, observe=owner is module)
    value = rounded(owner.kv_cache, "values", value, observe=owner is module)
    view = module.config
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(view.own._attn_implementation, eager)
    module.config = view.own
    try:
        return attention(module, query, key, value, *args, **kwargs)
    finally:
        module.config = view


def attach_kv_cache(model: nn.Module, format: str, rule: tuple[str, int]) -> None:
    """Lets every attention layer of the model's decoder round its keys and values.

    Layers that share the keys and values of another use its scales. UnsupportedError for a model without such
    layers.
    """
    layers = [(name, module) for name, module in model.named_modules() if _is_attention(module)]
    if not layers:
        raise UnsupportedError(
            f"prepare: kv_cache: expected a Hugging Face model whose attention layers transformers calls "
            f"by name, got {type(model).__name__}"
        )
    owners: dict[str | None, nn.Module] = {}
    for name, module in layers:
        shared = _shares(module)
        owner = owners.get(getattr(module, "layer_type", None)) if shared else module
        if owner is None:
            raise UnsupportedError(
                f"prepare: {name}: expected an earlier layer whose keys it reads, got none"
            )
        module.__dict__["kv_cache_owner"] = (owner,)
        module.config = _Config(module.config)
        if shared:
            continue
        owners[getattr(module, "layer_type", None)] = module
        module.kv_cache = KvCacheRounding()
        module.kv_cache.train(module.training)
        device = next(module.parameters()).device
        for place, key in (("keys", "k_cache_scale"), ("values", "v_cache_scale")):
            add_rounding(module.kv_cache, place, ActivationRounding(f"{name}.{key}", format, *rule), device)


def detach_kv_cache(model: nn.Module) -> None:
    """The reverse of `attach_kv_cache`."""
    for module in model.modules():
        if "kv_cache_owner" in module.__dict__:
            del module.__dict__["kv_cache_owner"]
            module.config = module.config.own
            if "kv_cache" in module._modules:
                del module.kv_cache


def shared_scales(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Names in checkpoints and scales of the layers that read another layer's keys and values."""
    found = []
    for name, module in model.named_modules():
        owner = module.__dict__.get("kv_cache_owner", (module,))[0]
        if owner is module:
            continue
        for rounding in roundings_of(owner.kv_cache).values():
            found.append((f"{name}.{rounding.scale_key}", rounding.scale(owner.kv_cache)))
    return found


def _is_attention(module: nn.Module) -> bool:
    """A causal self-attention of a decoder; towers for images and sound keep no cache."""
    known = type(module).__module__.startswith("transformers.") and hasattr(module, "config")
    projections = hasattr(module, "q_proj") and (hasattr(module, "k_proj") or _shares(module))
    causal = getattr(module, "is_causal", False) and getattr(module, "layer_idx", None) is not None
    return known and projections and causal


def _shares(module: nn.Module) -> bool:
    return bool(getattr(module, "is_kv_shared_layer", False))
