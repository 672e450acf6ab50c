"""What an optimizer needs to know of a prepared model: learned scales step in other units than weights."""

from typing import Any

from torch import nn

from ._core import ArgumentError
from .activations import activation_names
from .prepare import PreparedModel, prepared_root


def parameter_groups(
    prepared: "nn.Module | PreparedModel", learning_rate: float, scale_learning_rate: float
) -> list[dict[str, Any]]:
    """Groups for a `torch.optim` optimizer: all weights in one, each tensor of learned scales in its own.

    The steps of Adam and its kin do not depend on a parameter's size, but scales differ by orders of
    magnitude from tensor to tensor and from latents. So the learning rate of scales is `scale_learning_rate`
    times their tensor's present mean |scale|, and nothing decays them towards 0.

    >>> groups = libqat.parameter_groups(prepared, learning_rate=1e-4, scale_learning_rate=1e-3)
    >>> optimizer = torch.optim.AdamW(groups)

    Parameters that require no gradient are left out; scales also when `scale_learning_rate` is 0.
    ArgumentError for a negative rate, and for a learned activation scale that no batch has calibrated: it has
    no size yet, see PreparedModel.calibrating.
    """
    for name, rate in (("learning_rate", learning_rate), ("scale_learning_rate", scale_learning_rate)):
        if not rate >= 0:
            raise ArgumentError(f"parameter_groups: {name}: expected at least 0, got {rate}")
    model = prepared_root(prepared)
    scales = PreparedModel(model).scale_parameters()
    of_scales = {id(parameter) for parameter in scales.values()}
    weights = [p for p in model.parameters() if p.requires_grad and id(p) not in of_scales]
    groups: list[dict[str, Any]] = [{"params": weights, "lr": learning_rate}] if weights else []
    activations, _ = activation_names(model)
    for name, parameter in scales.items():
        if parameter.requires_grad and scale_learning_rate > 0:
            if name in activations and not parameter.any():
                raise ArgumentError(
                    f"parameter_groups: {name}: expected a calibrated scale, got 0: run some batches within "
                    "`with prepared.calibrating()` first"
                )
            rate = scale_learning_rate * parameter.detach().abs().mean().item()
            groups.append({"params": [parameter], "lr": rate, "weight_decay": 0.0})
    return groups


__all__ = ["parameter_groups"]
