"""What training a model needs in memory, from its configuration alone, and on which devices it fits.

The count is that of libqat's own decoder and trainer: float32 latents, AdamW in float32, weights rounded
inside the operators that use them, the head and the loss in pieces. With several devices it is that of the
same model in a loop of one's own; DDP's gradients are views of its buckets, FSDP gathers layer by layer.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from . import _core, finetune, sizes
from ._core import ArgumentError, Policy
from ._rounded_activations import kept_numbers, rounded_activations, slots_of
from .configurations import model_config
from .devices import Devices, parse_devices
from .teacher import WIDE_TABLE

OPTIMIZERS = {"adamw": 8.0, "adamw-8bit": 2.0 + 8 / 256, "lion": 4.0, "sgd": 0.0}
"""Bytes of state per trained number. libqat's trainer has AdamW; the others come with loops of your own."""
STRATEGIES = ("single", "ddp", "fsdp")
TEACHERS = ("live", "cache", "none")
PHASES = ("loss", "backward", "update")
"""When memory is at its fullest: all activations and the head; the first layer's gradients; the optimizer."""

_USABLE = 0.92
"""Of a device's memory: the rest is for its context, communication, and gaps between blocks."""
_FLOAT32 = 4


@dataclass(frozen=True)
class Settings:
    """How one would train. Names as in `libqat.default_options()` where those have them."""

    batch_size: int = 1
    sequence_length: int = 2048
    accumulate: int = 1
    optimizer: str = "adamw"
    teacher: str = "live"
    ema: bool = False
    compute_dtype: str = "bfloat16"
    frozen: tuple[str, ...] = finetune.FROZEN
    recompute: bool = False
    """Activation checkpointing: each layer keeps its input and computes the rest again."""
    telemetry: bool = True
    """What libqat's own trainer remembers of codes (`telemetry_every`)."""
    loss_chunk: int = 0


@dataclass(frozen=True)
class Item:
    """One use of memory on one device."""

    name: str
    bytes: int
    phases: tuple[str, ...] = PHASES


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of one device, and whether it is enough."""

    items: tuple[Item, ...]
    weights: int
    trained: int
    devices: Devices
    strategy: str

    def bytes_in(self, phase: str) -> int:
        """Bytes held at that time."""
        return sum(item.bytes for item in self.items if phase in item.phases)

    @property
    def peak(self) -> int:
        """The most bytes held at any time."""
        return max(map(self.bytes_in, PHASES))

    @property
    def usable(self) -> int:
        """Bytes of a device that training can have."""
        return int(self.devices.bytes * _USABLE)

    @property
    def fits(self) -> bool:
        """Whether the peak leaves room."""
        return self.peak <= self.usable


def plan(
    config: "str | os.PathLike",
    policy: "str | os.PathLike | Mapping | Policy | None" = None,
    *,
    devices: "str | Devices" = "cpu",
    strategy: str | None = None,
    settings: Settings | None = None,
) -> MemoryPlan:
    """The memory map of training a model.

    config: as `libqat.configurations.model_config` takes it. policy: as `libqat.prepare` takes it, with
    the estimator it names (`libqat.recommended(policy).policy` is what `finetune` trains); None trains the
    float model. strategy: "single" (one device), "ddp" (a copy each) or "fsdp" (sharded); by default "single"
    for one device, else "fsdp".
    """
    devices = parse_devices(devices) if isinstance(devices, str) else devices
    strategy = strategy or ("single" if devices.count == 1 else "fsdp")
    settings = settings or Settings()
    _check(strategy, devices, settings)
    return _Planner(model_config(config), policy, devices, strategy, settings).plan()


def _check(strategy: str, devices: Devices, settings: Settings) -> None:
    for name, value, legal in (
        ("strategy", strategy, STRATEGIES),
        ("optimizer", settings.optimizer, tuple(OPTIMIZERS)),
        ("teacher", settings.teacher, TEACHERS),
        ("compute_dtype", settings.compute_dtype, ("float32", "bfloat16")),
    ):
        if value not in legal:
            raise ArgumentError(f'plan_memory: {name}: expected one of {", ".join(legal)}, got "{value}"')
    for name in ("batch_size", "sequence_length", "accumulate"):
        if getattr(settings, name) < 1:
            raise ArgumentError(f"plan_memory: {name}: expected at least 1, got {getattr(settings, name)}")
    if strategy == "single" and devices.count > 1:
        raise ArgumentError(
            f"plan_memory: strategy: expected ddp or fsdp for {devices.count} devices, got single"
        )


class _Planner:
    """Sums shapes. All sizes are in bytes per device."""

    def __init__(self, config: str, policy, devices: Devices, strategy: str, settings: Settings):
        self.config = config
        self.devices = devices
        self.strategy = strategy
        self.settings = settings
        self.tensors = [
            (name, tuple(shape), kind)
            for name, shape, kind, buffer in _core.parameter_shapes(config)
            if not buffer
        ]
        self.compute = _FLOAT32 if settings.compute_dtype == "float32" else 2
        self.tokens = settings.batch_size * settings.sequence_length
        self.outline = sizes.outline(config, policy, "f32")
        self.learned = _learned_scales(policy, self.tensors, self.outline)
        self.rounding = sizes.as_policy(policy) if policy is not None else None
        frozen = [re.compile(pattern) for pattern in settings.frozen]
        self.frozen = {
            name
            for name, _, _ in self.tensors
            if any(each.fullmatch(name) or each.fullmatch(name.removesuffix(".weight")) for each in frozen)
        }

    def plan(self) -> MemoryPlan:
        items = [*self._state(), *self._activations(), *self._head(), *self._temporaries()]
        return MemoryPlan(
            tuple(item for item in items if item.bytes > 0),
            sum(math.prod(shape) for _, shape, _ in self.tensors),
            self._trained(),
            self.devices,
            self.strategy,
        )

    def _share(self, count: float) -> int:
        """Of what FSDP spreads over all devices."""
        return math.ceil(count / self.devices.count) if self.strategy == "fsdp" else math.ceil(count)

    def _trained(self) -> int:
        return sum(math.prod(shape) for name, shape, _ in self.tensors if name not in self.frozen)

    def _scales(self) -> int:
        return sum(count for name, count in self.learned.items() if name not in self.frozen)

    def _state(self) -> Iterable[Item]:
        weights = sum(math.prod(shape) for _, shape, _ in self.tensors)
        trained, scales = self._trained(), self._scales()
        yield Item("latents", self._share(_FLOAT32 * weights))
        yield Item("learned scales", self._share(_FLOAT32 * sum(self.learned.values())))
        # Adam's step on a scale is computed in a tensor of its own, in units of the scale's mean.
        per_scale = OPTIMIZERS[self.settings.optimizer] + (_FLOAT32 if self._own_trainer() else 0)
        yield Item(
            "optimizer state", self._share(OPTIMIZERS[self.settings.optimizer] * trained + per_scale * scales)
        )
        if self.settings.ema:
            yield Item("average of the weights", self._share(_FLOAT32 * (trained + scales)))
        if self.settings.telemetry and self._own_trainer():
            yield Item("telemetry", self._telemetry())
        if self.settings.teacher == "live":
            yield Item("teacher", self._share(self._teacher()))
        phases = PHASES if self.settings.accumulate > 1 else ("backward", "update")
        yield Item("gradients", self._share(_FLOAT32 * (trained + scales)), phases)

    def _own_trainer(self) -> bool:
        return self.strategy == "single"

    def _telemetry(self) -> int:
        """Of each trained weight on a grid its code and last change, and the scales at the start."""
        quantized = [(n, t) for n, t in self.outline.quantized.items() if n not in self.frozen]
        return sum(2 * tensor.codes.numel() + _FLOAT32 * tensor.scales.numel() for _, tensor in quantized)

    def _teacher(self) -> int:
        """Matrices in the compute dtype, vectors and routers in float32.

        Without the table that libqat's own runs share, whatever they start from; what else they may share is
        left in.
        """
        shared = self._own_trainer() and WIDE_TABLE in self.frozen
        rounded = {name for name, shape, _ in self.tensors if len(shape) > 1 and ".router." not in name}
        return sum(
            math.prod(shape) * (self.compute if name in rounded else _FLOAT32)
            for name, shape, _ in self.tensors
            if not (shared and name == WIDE_TABLE)
        )

    def _activations(self) -> Iterable[Item]:
        outer, layers = _core.activation_bytes(
            self.config,
            self.settings.batch_size,
            self.settings.sequence_length,
            self.compute,
            self.devices.fused,
        )
        for layer, numbers in self._rounded_numbers().items():
            if layer is None:
                outer += self.tokens * self.compute * numbers
            else:
                layers[layer] += self.tokens * self.compute * numbers
        kept = sum(layers)
        if self.settings.recompute:
            kept = len(layers) * _FLOAT32 * self._head_weight()[1][1] * self.tokens
        yield Item("activations", math.ceil(outer + kept), ("loss",))
        yield Item("activations of a layer", math.ceil(layers[0]), ("backward",))

    def _rounded_numbers(self) -> dict[int | None, int]:
        """By layer (None: outside), per token, what rounding of activations keeps."""
        if self.rounding is None:
            return {}
        sums: dict[int | None, int] = {}
        for name, numbers in kept_numbers(self.rounding, self.tensors).items():
            layer = re.search(r"\.layers\.(\d+)\.", name)
            place = int(layer[1]) if layer else None
            sums[place] = sums.get(place, 0) + numbers
        return sums

    def _head_weight(self) -> tuple[str, tuple[int, ...]]:
        shapes = {name: shape for name, shape, _ in self.tensors}
        name = next((n for n in shapes if n.endswith("lm_head.weight")), "model.embed_tokens.weight")
        return name, shapes[name]

    def _head(self) -> Iterable[Item]:
        name, (vocabulary, hidden) = self._head_weight()
        softcap = json.loads(self.config).get("final_logit_softcapping")
        rows = self.settings.batch_size * (self.settings.sequence_length - 1)
        height = _core.loss_rows(self.settings.loss_chunk, rows, vocabulary)
        pieces = 1 + (self.settings.teacher == "live") + bool(softcap)
        piece = height * vocabulary * self.compute
        yield Item("logits, a piece at a time", pieces * piece, ("loss",))
        rounds_input, rounds_output = self._rounds(name)
        if rounds_output:
            yield Item("rounding of logits", math.ceil(self._rounding_pieces() * piece), ("loss",))
        rounded = name in self.outline.quantized
        if rounded or self.compute != _FLOAT32:
            each = self._rounded() if rounded else self.compute
            yield Item("head as it ships", each * vocabulary * hidden, ("loss",))
        states = 2 + (self.settings.teacher == "live") + rounds_input
        yield Item("hidden states of the head", states * self.tokens * hidden * self.compute, ("loss",))
        if name not in self.frozen:
            tied = name.endswith("embed_tokens.weight")
            yield Item(
                "gradient of the head",
                _FLOAT32 * vocabulary * hidden,
                ("loss", "backward") if tied else ("loss",),
            )

    def _rounding_pieces(self) -> float:
        """What came before rounding, codes on the way, and the gradient behind it.

        The gradient of a learned scale is a sum of float32 terms, measured in pieces of the compute dtype.
        """
        if self.rounding.activation_scales[0] != "learned":
            return 3
        return 6.5 if self.compute == _FLOAT32 else 10.5

    def _rounds(self, name: str) -> tuple[bool, bool]:
        """Whether what goes into the product with a weight is rounded, and what comes out."""
        if self.rounding is None:
            return False, False
        return rounded_activations(self.rounding, self.tensors).get(name, (False, False))

    def _rounded(self) -> int:
        """Bytes per weight that is rounded: in one pass by libqat's kernels, else by way of float32."""
        return self.compute if self.devices.fused else self.compute + _FLOAT32

    def _temporaries(self) -> Iterable[Item]:
        quantized = self.outline.quantized
        matrices = [
            math.prod(s[-2:]) for name, s, kind in self.tensors if kind == "linear" and name in quantized
        ]
        yield Item("rounded weight of one layer", self._rounded() * max(matrices, default=0))
        if self.compute != _FLOAT32:
            yield Item(
                "unquantized weights in the compute dtype", self.compute * self._casts(), ("loss", "backward")
            )
        if self.strategy == "fsdp" and self.devices.count > 1:
            units = [sum(weights.values()) for weights in self._units()]
            pairs = [one + other for one, other in zip(units, [*units[1:], 0], strict=True)]
            yield Item("gathered layers", _FLOAT32 * max(pairs), ("loss", "backward"))
            trained = [
                sum(count for name, count in unit.items() if name not in self.frozen)
                for unit in self._units()
            ]
            yield Item("gradients before they are sharded", 2 * _FLOAT32 * max(trained), ("backward",))

    def _casts(self) -> int:
        """Unquantized weights that autocast keeps until backward: of all layers, or of one at a time."""
        other = {*self.outline.quantized, self._head_weight()[0]}
        linear = {name for name, _, kind in self.tensors if kind == "linear" and name not in other}
        by_unit = [sum(count for name, count in unit.items() if name in linear) for unit in self._units()]
        return max(by_unit) if self.settings.recompute else sum(by_unit)

    def _units(self) -> list[dict[str, int]]:
        """Weights by name of what FSDP gathers at once: each layer, and each tensor outside the layers."""
        units: dict[str, dict[str, int]] = {}
        for name, shape, _ in self.tensors:
            layer = re.search(r"\.layers\.(\d+)\.", name)
            units.setdefault(layer[1] if layer else name, {})[name] = math.prod(shape)
        return list(units.values())


def _learned_scales(policy, tensors, outline: _core.QuantizedCheckpoint) -> dict[str, int]:
    """Numbers of learned scales by weight."""
    if policy is None:
        return {}
    chosen = sizes.as_policy(policy)
    slots = slots_of(tensors)
    learned = {}
    for (name, _, _), estimator in zip(slots, chosen.estimators(slots), strict=True):
        if name in outline.quantized and estimator.scale in ("learned", "seq"):
            learned[name] = outline.quantized[name].scales.numel()
    return learned


__all__ = ["OPTIMIZERS", "PHASES", "STRATEGIES", "TEACHERS", "Item", "MemoryPlan", "Settings", "plan"]
