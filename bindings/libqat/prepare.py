"""`prepare` attaches a policy to a `torch.nn` or Hugging Face model; `freeze` makes what ships."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import overload

import torch
from torch import nn

from . import _core
from ._core import (
    ArgumentError,
    Decoder,
    Estimator,
    Policy,
    PreparedDecoder,
    QuantizedCheckpoint,
    UnsupportedError,
)
from .activations import ActivationRounding, activation_names, add_rounding, roundings_of
from .experts import ExpertMatrix
from .kv_cache import attach_kv_cache, detach_kv_cache, shared_scales
from .nn import FLOAT, attach, detach, is_quantized
from .report import Report, report_of
from .slots import Slot, check_model, check_prepared, check_slots, check_whole, find_slots, scale_names
from .weight_quantizer import WeightQuantizer

_MARK = "_libqat_policy"
"""Attribute of a prepared root module: the policy as canonical JSON."""


def as_policy(policy: "str | os.PathLike | Mapping | Policy") -> Policy:
    """A preset name ("gguf-q4_0"), the path of a JSON file, the same as a dict, or a Policy itself."""
    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, Mapping):
        return Policy.from_json(json.dumps(policy))
    return Policy.load(os.fspath(policy))


class PreparedModel:
    """A view of a prepared model. It holds no state of its own: the layers carry everything.

    Train `model` (or the module that was passed to `prepare`; they are the same object) in any loop.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    @property
    def policy(self) -> Policy:
        """The policy that the model was prepared with."""
        return Policy.from_json(getattr(self.model, _MARK))

    @property
    def slots(self) -> list[Slot]:
        """The quantized weights, in model order."""
        return [slot for slot in find_slots(self.model) if is_quantized(slot.layers[0][1])]

    def quantizers(self) -> dict[str, WeightQuantizer]:
        """state_dict key -> what that weight carries."""
        return {slot.name: slot.layers[0][1].weight_quantizer for slot in self.slots}

    def scale_parameters(self) -> dict[str, nn.Parameter]:
        """state_dict key -> learned scales, in model order; those of tied weights once. Then of activations.

        float32 [R, G, P], or [R, G, F] with the scale rule "seq"; of activations [1].
        """
        layers = ((slot.name, slot.layers[0][1]) for slot in self.slots)
        scales = {
            f"{name}_scales": layer.weight_scales for name, layer in layers if layer.weight_scales is not None
        }
        keys, _ = activation_names(self.model)
        trained = dict(self.model.named_parameters())
        return scales | {key: trained[key] for key in keys if key in trained}

    def activation_scales(self) -> dict[str, float]:
        """Name in checkpoints -> static activation scale; 0: not calibrated yet, nothing is rounded."""
        state = self.model.state_dict(keep_vars=True)
        own = {name: state[key].item() for key, name in activation_names(self.model)[0].items()}
        return own | {name: scale.item() for name, scale in shared_scales(self.model)}

    @contextmanager
    def calibrating(self) -> Iterator[None]:
        """Within it, every forward pass widens the static activation scales to its activations.

        For calibration without training, or with other data. Training calibrates by itself: in the first
        passes in training mode, as many as the policy says.

        >>> with prepared.calibrating(), torch.no_grad():
        ...     for batch in batches:
        ...         prepared.model(batch)
        """
        roundings = _roundings(self.model)
        former = [rounding.calibrating for rounding in roundings]
        for rounding in roundings:
            rounding.calibrating = True
        try:
            yield
        finally:
            for rounding, calibrating in zip(roundings, former, strict=True):
                rounding.calibrating = calibrating

    @torch.no_grad()
    def initialize_scales(self, scale: str = "search") -> None:
        """Sets all learned scales to those that a rule gives to the present latents, as `prepare` did.

        For after other weights were loaded into the model. scale: "search", "reference".
        """
        for slot in self.slots:
            layer = slot.layers[0][1]
            if layer.weight_scales is not None:
                layer.weight_scales.copy_(layer.weight_quantizer.start(layer.weight, scale))

    def set_training_grid(self, grid: str) -> None:
        """Lets forward use another grid than the one that ships, for training at more bits first; "" ends it.

        `freeze` and `report` go on with the policy's grids. Learned scales are made anew, as other
        parameters: they must then be given to the optimizer again. ArgumentError for an unknown grid.
        """
        if grid:
            _core.grid_info(grid)
        for slot in self.slots:
            quantizer = slot.layers[0][1].weight_quantizer
            former, quantizer.training_grid = quantizer.training_grid, "" if grid == quantizer.grid else grid
            if quantizer.training_grid != former:
                _register_scales(slot)

    def enabled(self, enabled: bool = True) -> "Enabled":
        """Turns quantization on or off at once. As a context manager it puts the former state back.

        >>> with prepared.enabled(False):
        ...     teacher_logits = prepared.model(tokens).logits
        """
        quantizers = [module.weight_quantizer for s in self.slots for _, module in s.layers]
        return Enabled([*quantizers, *_roundings(self.model)], enabled)

    def report(self) -> Report:
        """Name, shape, grid, bits, error and bytes of each parameter; printable.

        UnsupportedError for sharded weights.
        """
        check_whole(self.model, "report")
        return report_of(self.model, self.slots)

    def __repr__(self) -> str:
        return f"PreparedModel({type(self.model).__name__}, {len(self.slots)} quantized weights)"


class Enabled:
    """Switches quantizers now; leaving the `with` block restores each one's former state."""

    def __init__(self, quantizers: "list[WeightQuantizer | ActivationRounding]", enabled: bool):
        self._former = [(quantizer, quantizer.enabled) for quantizer in quantizers]
        for quantizer in quantizers:
            quantizer.enabled = enabled

    def __enter__(self) -> "Enabled":
        return self

    def __exit__(self, *exception) -> None:
        for quantizer, enabled in self._former:
            quantizer.enabled = enabled


@overload
def prepare(model: nn.Module, policy: "str | os.PathLike | Mapping | Policy") -> "PreparedModel": ...
@overload
def prepare(model: Decoder, policy: "str | os.PathLike | Mapping | Policy") -> PreparedDecoder: ...
def prepare(
    model: "nn.Module | Decoder", policy: "str | os.PathLike | Mapping | Policy"
) -> "PreparedModel | PreparedDecoder":
    """Makes the forward of each layer that `policy` names compute with the weights that ship.

    Layers (nn.Linear, nn.Embedding, nn.Conv*, nn.ConvTranspose*, the scaled embeddings of Gemma, and the
    experts that transformers keeps as 3-D parameters) are re-classed in place: the parameters stay the same
    objects, with the same names. They are the latents. Tied weights stay tied: one latent, one grid,
    several uses, and the first name's rule. Latents in bfloat16 or float16 are raised to float32, because
    small steps vanish in them; such a model's activations keep their dtype.

    model: any torch.nn model, or libqat's own decoder (`libqat.load_model(path).decoder`).
    policy: a preset name, the path of a JSON file, a dict, or a Policy.

    ArgumentError for a bad policy, a rule that matches nothing, a width the grid's block does not divide, or
    a model that was prepared with another policy. UnsupportedError for PEFT models, for sharded models, and
    for subclasses of these layers that the policy does not leave float.
    """
    policy = as_policy(policy)
    if isinstance(model, Decoder):
        return _core.prepare_decoder(model, policy)
    check_model(model)
    if getattr(model, _MARK, None) == policy.to_json():
        return PreparedModel(model)
    _check_unprepared(model)
    slots = find_slots(model)
    targets = [slot.target for slot in slots]
    rules = zip(slots, policy.resolve(targets), policy.estimators(targets), strict=True)
    chosen = [(slot, grid, estimator) for slot, grid, estimator in rules if grid != "f32"]
    check_slots(model, [slot for slot, _, _ in chosen], [grid for _, grid, _ in chosen])
    formats = dict(zip([slot.name for slot in slots], policy.activations(targets), strict=True))
    _check_activations([(slot, formats[slot.name]) for slot, _, _ in chosen])
    if policy.kv_cache:
        attach_kv_cache(model, policy.kv_cache, policy.activation_scales)
    for slot, grid, estimator in chosen:
        _attach(slot, grid, estimator)
        _attach_activations(slot, formats[slot.name], policy.activation_scales)
    setattr(model, _MARK, policy.to_json())
    return PreparedModel(model)


def _check_unprepared(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if hasattr(module, _MARK) or type(module) in FLOAT:
            raise ArgumentError(
                f"prepare: {name or 'model'}: expected a model that is not prepared yet, got one that "
                "was prepared with another policy; call libqat.unprepare first"
            )


def _attach(slot: Slot, grid: str, estimator: Estimator) -> None:
    weight = slot.layers[0][1].weight
    quantizer = WeightQuantizer(
        slot.name,
        grid,
        estimator.kind,
        estimator.scale,
        weight.dtype,
        scale_gradient=estimator.scale_gradient,
    )
    weight.data = weight.data.float()
    for _, module in slot.layers:
        attach(module, quantizer)
    _register_scales(slot)


def _check_activations(chosen: list[tuple[Slot, tuple[str, str]]]) -> None:
    for slot, formats in chosen:
        if any(formats) and any(isinstance(layer, ExpertMatrix) for _, layer in slot.layers):
            raise UnsupportedError(
                f"prepare: {slot.name}: expected a linear layer or a convolution for input and output, got "
                "experts"
            )


def _attach_activations(slot: Slot, formats: tuple[str, str], rule: tuple[str, int]) -> None:
    """Lets the slot's layers round what goes into their products and what comes out; lookups have none."""
    quantizer = slot.layers[0][1].weight_quantizer
    quantizer.input, quantizer.output = formats
    for name, layer in slot.layers:
        if isinstance(layer, nn.Embedding):
            continue
        for place, format in zip(("input", "output"), formats, strict=True):
            if format:
                key = f"{name}.{place}_activation_scale" if name else f"{place}_activation_scale"
                add_rounding(layer, place, ActivationRounding(key, format, *rule), layer.weight.device)


def _roundings(model: nn.Module) -> list[ActivationRounding]:
    return [rounding for module in model.modules() for rounding in roundings_of(module).values()]


def _register_scales(slot: Slot) -> None:
    """Gives the slot's layers one parameter of learned scales, or None where a rule gives them."""
    layer = slot.layers[0][1]
    quantizer = layer.weight_quantizer
    scales = nn.Parameter(quantizer.start(layer.weight)) if quantizer.learned else None
    for _, module in slot.layers:
        module.register_parameter("weight_scales", scales)


def unprepare(model: "nn.Module | PreparedModel") -> nn.Module:
    """The reverse of `prepare`: ordinary layers again, with the latents as their weights.

    Learned scales are dropped.
    Latents that `prepare` raised to float32 return to their former dtype, rounded. Returns the model.
    """
    root = prepared_root(model)
    for module in root.modules():
        if type(module) in FLOAT:
            detach(module)
    detach_kv_cache(root)
    delattr(root, _MARK)
    return root


def prepared_root(model: "nn.Module | PreparedModel") -> nn.Module:
    """The module that was passed to `prepare`, also when it was wrapped afterwards (DDP, torch.compile)."""
    module = model.model if isinstance(model, PreparedModel) else model
    for candidate in module.modules():
        if _MARK in vars(candidate):
            return candidate
    raise ArgumentError(
        f"libqat: {type(module).__name__}: expected a prepared model, got one without a policy"
    )


def freeze(
    model: "nn.Module | PreparedModel | PreparedDecoder",
    config: str | None = None,
    tokenizer: str | os.PathLike | None = None,
) -> QuantizedCheckpoint:
    """The numbers that an evaluation forward computes from the present latents.

    config: the model's configuration as JSON; by default a Hugging Face model's own.
    tokenizer: path of a tokenizer.json, a Hugging Face folder or a GGUF; by default the folder that a Hugging
    Face model was loaded from, when it holds a tokenizer. For a decoder pass both from its LoadedModel.
    """
    if isinstance(model, PreparedDecoder):
        return model.freeze(config or "", os.fspath(tokenizer or ""))
    root = prepared_root(model)
    prepared = PreparedModel(root)
    check_prepared(root, prepared.policy)
    layers = {slot.name: slot.layers[0][1] for slot in prepared.slots}
    rules = {name: _shipped_scales(layer) for name, layer in layers.items()}
    return _core.freeze_tensors(
        _shipped(root),
        {name: layer.weight_quantizer.grid for name, layer in layers.items()},
        scale_rules={name: rule for name, (rule, _) in rules.items()},
        scales={name: scales for name, (_, scales) in rules.items() if scales is not None},
        config=_config_of(root) if config is None else config,
        tokenizer=_tokenizer_of(root) if tokenizer is None else os.fspath(tokenizer),
        policy=getattr(root, _MARK),
    )


@torch.no_grad()
def _shipped_scales(layer: nn.Module) -> tuple[str, torch.Tensor | None]:
    return layer.weight_quantizer.shipped(layer.weight, layer.weight_scales)


def _shipped(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The state_dict without learned scales and the keys that a Hugging Face model ties by its configuration.

    `save_pretrained` leaves those out in the same way; other tied keys become aliases of the first.
    Activation scales go by their names in checkpoints.
    """
    implied = getattr(model, "all_tied_weights_keys", {})
    state = model.state_dict(keep_vars=True)
    activations, counts = activation_names(model)
    left_out = scale_names(model) | counts | set(activations)
    shipped = [
        (key, tensor.detach())
        for key, tensor in state.items()
        if key not in left_out and (key not in implied or tensor is not state.get(implied[key]))
    ]
    scales = [(name, state[key]) for key, name in activations.items()] + shared_scales(model)
    # copies: one of a tensor's names would become an alias of the other
    return shipped + [(name, scale.detach().reshape(()).clone()) for name, scale in scales]


def _config_of(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    return config.to_json_string() if hasattr(config, "to_json_string") else ""


def _tokenizer_of(model: nn.Module) -> str:
    source = getattr(getattr(model, "config", None), "_name_or_path", "") or ""
    return source if source and (Path(source) / "tokenizer.json").is_file() else ""


__all__ = ["PreparedModel", "as_policy", "freeze", "prepare", "unprepare"]
