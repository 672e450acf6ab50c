"""What rounding of activations adds to the memory of training: see `libqat.memory`."""

import math
from collections.abc import Sequence

from ._core import Policy

Tensors = Sequence[tuple[str, tuple[int, ...], str]]
"""Name, shape and kind."""


def slots_of(tensors: Tensors) -> list[tuple[str, str, tuple[int, int]]]:
    """What a policy's rules are about: weights as matrices."""
    return [
        (name, kind, (math.prod(shape[:-1]), shape[-1])) for name, shape, kind in tensors if kind != "other"
    ]


def rounded_activations(policy: Policy, tensors: Tensors) -> dict[str, tuple[bool, bool]]:
    """Whether the product with each weight rounds what goes in, and what comes out; those that do either."""
    slots = slots_of(tensors)
    formats = policy.activations(slots)
    return {
        name: (bool(into), bool(out))
        for (name, _, _), (into, out) in zip(slots, formats, strict=True)
        if into or out
    }


def kept_numbers(policy: Policy, tensors: Tensors) -> dict[str, int]:
    """Numbers per token, by layer's weight, that stay until backward because they were rounded.

    Before and after rounding, one more is kept than without it: what is rounded says where a gradient passes,
    and what comes of it is multiplied. Tables round as the head that they are, which is not counted here.
    """
    rounded = rounded_activations(policy, tensors)
    kept = {}
    for name, shape, kind in tensors:
        if kind != "linear" or name.endswith("lm_head.weight"):
            continue
        into, out = rounded.get(name, (False, False))
        kept[name] = into * shape[-1] + out * shape[-2]
        if policy.kv_cache and name.endswith("k_proj.weight"):
            kept[name] += 2 * shape[0]  # values have the shape of keys
    return kept
