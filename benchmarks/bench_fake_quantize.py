"""One 4-bit, group-32 weight fake-quantization, forward and backward: libqat beside what people use instead.

Every variant runs in this process and takes its turn in each round; the time of a round is divided by that of
the plain copy of the same round. Bytes saved for backward are counted through autograd's own hooks.

    python benchmarks/bench_fake_quantize.py [--rows 1024] [--columns 1536] [--threads 2] [--json out.json]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import libqat

BLOCK = 32


def eager_ste(weight: Tensor) -> Tensor:
    """Q4_0's rule written in ordinary PyTorch operators, straight-through by detach."""
    blocks = weight.detach().view(-1, BLOCK)
    largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    scale = largest / -8
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    codes = torch.clamp(torch.trunc(blocks * inverse + 8.5), max=15) - 8
    quantized = (codes * scale.half().float()).view_as(weight)
    return weight + (quantized - weight).detach()


def torchao_intx() -> Callable[[Tensor], Tensor] | None:
    """The symmetric int4 group fake-quantizer of torchao (on a grid of its own), when it is installed."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer
    except ImportError:
        return None
    return IntxFakeQuantizer(IntxFakeQuantizeConfig(torch.int4, group_size=BLOCK, is_symmetric=True))


def saved_bytes(function: Callable[[Tensor], Tensor], weight: Tensor) -> int:
    """Bytes that autograd keeps for backward, the weight's own storage not counted."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() != weight.untyped_storage().data_ptr():
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function(weight)
    del result
    return sum(kept.values())


def measure(function: Callable[[Tensor], Tensor], weight: Tensor, upstream: Tensor) -> tuple[float, float]:
    """Seconds of forward and of backward."""
    weight.grad = None
    start = time.perf_counter()
    result = function(weight)
    middle = time.perf_counter()
    result.backward(upstream)
    return middle - start, time.perf_counter() - middle


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--columns", type=int, default=1536)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", metavar="PATH", help="also write the figures there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    variants: dict[str, Callable[[Tensor], Tensor]] = {
        "copy (floor)": lambda w: w.clone(),
        "libqat fake_quantize q4_0": lambda w: libqat.ops.fake_quantize(w, "q4_0"),
        "PyTorch operators, Q4_0 rule": eager_ste,
    }
    if (peer := torchao_intx()) is not None:
        variants["torchao IntxFakeQuantizer int4 g32"] = peer
    weight = torch.randn(options.rows, options.columns, requires_grad=True)
    upstream = torch.randn(options.rows, options.columns)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for round_ in range(options.repeats + 3):
        for name, function in variants.items():
            pair = measure(function, weight, upstream)
            if round_ >= 3:  # the first rounds warm up
                times[name].append(pair)

    floor = [sum(pair) for pair in times["copy (floor)"]]
    results = []
    for name, function in variants.items():
        ratio = statistics.median(sum(pair) / base for pair, base in zip(times[name], floor, strict=True))
        results.append(
            {
                "variant": name,
                "forward_ms": 1e3 * statistics.median(f for f, _ in times[name]),
                "backward_ms": 1e3 * statistics.median(b for _, b in times[name]),
                "times_a_copy": ratio,
                "saved_bytes_per_weight": saved_bytes(function, weight) / weight.numel(),
            }
        )
        last = results[-1]
        print(
            f"{name:36} forward {last['forward_ms']:7.2f} ms  backward {last['backward_ms']:7.2f} ms  "
            f"{last['times_a_copy']:6.2f} x copy  {last['saved_bytes_per_weight']:5.2f} bytes saved a weight",
            flush=True,
        )
    if options.json:
        setting = {**vars(options), "libqat": libqat.__version__, "torch": torch.__version__}
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"setting": setting, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
