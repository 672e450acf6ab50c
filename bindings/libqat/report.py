"""The per-tensor report of a prepared model."""

import io
import math

import torch
from torch import nn

from . import _core
from ._core import TensorReport
from .activations import activation_names
from .slots import Slot, scale_names


class Report(list[TensorReport]):
    """A list of TensorReport that prints as a table with totals."""

    @property
    def bytes(self) -> int:
        """Bytes of all parameters as they ship."""
        return sum(row.bytes for row in self)

    @property
    def weights(self) -> int:
        """Number of weights in all parameters."""
        return sum(math.prod(row.shape) for row in self)

    @property
    def bits_per_weight(self) -> float:
        """Mean over all parameters."""
        return 8 * self.bytes / self.weights if self.weights else 0.0

    def __rich__(self):
        from rich.table import Table

        table = Table(show_footer=True)
        table.add_column("tensor", footer="total", overflow="fold")
        table.add_column("shape", justify="right", footer=f"{self.weights:,}")
        table.add_column("grid")
        table.add_column("bits", justify="right", footer=f"{self.bits_per_weight:.2f}")
        table.add_column("error", justify="right")
        table.add_column("bytes", justify="right", footer=f"{self.bytes:,}")
        for row in self:
            error = f"{row.relative_error:.2%}" if row.relative_error else "-"
            shape = " x ".join(map(str, row.shape))
            bits = f"{row.bits_per_weight:.2f}"
            table.add_row(row.name, shape, _storage(row), bits, error, f"{row.bytes:,}")
        return table

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=120).print(self)
        return text.getvalue()


def _storage(row: TensorReport) -> str:
    """The grid, and how activations are rounded if they are."""
    sides = [f"{side} {format}" for side, format in (("in", row.input), ("out", row.output)) if format]
    if row.input == row.output and sides:
        sides = [f"in/out {row.input}"]
    return " ".join([row.grid, *sides])


@torch.no_grad()
def report_of(model: nn.Module, slots: list[Slot]) -> Report:
    """Each parameter of the model once, in model order; those outside `slots` ship as they are."""
    by_name = {slot.name: slot for slot in slots}
    scales = scale_names(model) | set(activation_names(model)[0])
    rows = Report()
    for name, parameter in model.named_parameters():
        slot = by_name.get(name)
        if name in scales:
            continue
        if slot is None:
            rows.append(_core.report_tensor(name, "other", parameter.detach(), "f32"))
            continue
        layer = slot.layers[0][1]
        rule, learned = layer.weight_quantizer.shipped(layer.weight, layer.weight_scales)
        quantizer = layer.weight_quantizer
        rows.append(
            _core.report_tensor(
                name,
                slot.kind,
                parameter.detach(),
                quantizer.grid,
                rule,
                learned,
                quantizer.input,
                quantizer.output,
            )
        )
    return rows
