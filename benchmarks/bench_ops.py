"""Time of a training step with quantized_linear against the same step with float weights.

A stack of Llama-shaped blocks (by default the matrices of SmolLM2-135M, without attention and norms, whose
time would only dilute the difference) runs forward and backward on random tokens. Both variants live in one
process and take turns, so that a busy machine slows both; the ratio of each turn is what is summarised.

    python benchmarks/bench_ops.py [--blocks 6] [--tokens 512] [--threads 2] [--json out.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

import libqat
from libqat import ops


class Block(torch.nn.Module):
    """The seven matrices of a Llama block. x: [T, hidden] -> [T, hidden]."""

    def __init__(self, hidden: int, key_value: int, inner: int, grid: str | None):
        super().__init__()
        shapes = {
            "q": (hidden, hidden),
            "k": (key_value, hidden),
            "v": (key_value, hidden),
            "o": (hidden, hidden),
            "gate": (inner, hidden),
            "up": (inner, hidden),
            "down": (hidden, inner),
        }
        self.weights = torch.nn.ParameterDict(
            {
                name: torch.nn.Parameter(torch.randn(shape) * shape[1] ** -0.5)
                for name, shape in shapes.items()
            }
        )
        self.repeats = hidden // key_value
        self.grid = grid

    def project(self, name: str, x: Tensor) -> Tensor:
        if self.grid is None:
            return linear(x, self.weights[name])
        return ops.quantized_linear(x, self.weights[name], None, self.grid, tensor=name)

    def forward(self, x: Tensor) -> Tensor:
        heads = (self.project("k", x) + self.project("v", x)).repeat(1, self.repeats)
        x = x + self.project("o", self.project("q", x) * heads)
        return x + self.project("down", silu(self.project("gate", x)) * self.project("up", x))


def step(net: torch.nn.Module, x: Tensor, autocast: bool) -> float:
    """Seconds of one forward and backward."""
    net.zero_grad(set_to_none=True)
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = net(x).float().square().mean()
    loss.backward()
    return time.perf_counter() - start


def compare(grid: str, autocast: bool, options: argparse.Namespace) -> dict:
    torch.manual_seed(0)
    shape = (options.hidden, options.key_value, options.inner)
    plain = torch.nn.Sequential(*(Block(*shape, None) for _ in range(options.blocks)))
    quantized = torch.nn.Sequential(*(Block(*shape, grid) for _ in range(options.blocks)))
    x = torch.randn(options.tokens, options.hidden)
    for _ in range(3):
        step(plain, x, autocast)
        step(quantized, x, autocast)
    times = [(step(plain, x, autocast), step(quantized, x, autocast)) for _ in range(options.repeats)]
    ratios = sorted(q / p for p, q in times)
    return {
        "grid": grid,
        "compute": "bfloat16 autocast" if autocast else "float32",
        "float_ms": 1e3 * statistics.median(p for p, _ in times),
        "quantized_ms": 1e3 * statistics.median(q for _, q in times),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--grids", nargs="+", default=["q4_0", "q8_0", "int4_channel"])
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--key-value", type=int, default=192, help="width of k and v; divides --hidden")
    parser.add_argument("--inner", type=int, default=1536)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", metavar="PATH", help="also write the figures there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    results = []
    for autocast in (False, True):
        for grid in options.grids:
            result = compare(grid, autocast, options)
            low, high = result["ratio_quartiles"]
            print(
                f"{result['compute']:18} {grid:13} float {result['float_ms']:7.1f} ms   "
                f"quantized {result['quantized_ms']:7.1f} ms   ratio {result['ratio']:.3f} "
                f"({low:.3f} .. {high:.3f})",
                flush=True,
            )
            results.append(result)
    if options.json:
        setting = {**vars(options), "libqat": libqat.__version__, "torch": torch.__version__}
        with open(options.json, "w") as file:
            json.dump({"setting": setting, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
