"""One training step of a SmolLM2-shaped model: libqat's decoder and Hugging Face's, float and quantized.

Hugging Face's also under `torch.compile`; the first rounds, which compile, are not timed.

All variants live in one process on the same random weights and take turns; each round's times are divided by
the float step of the Hugging Face model in that round.

    python benchmarks/bench_step.py [--layers 6] [--threads 2] [--compute bfloat16] [--json out.json]
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time

import torch

import libqat


def make_folder(folder: str, layers: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        rope_theta=100000.0,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def variants(folder: str, policy: str) -> dict[str, tuple]:
    """Name -> (tokens to logits, parameters)."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prepared = copy.deepcopy(plain)
    libqat.prepare(prepared, policy)
    compiled, compiled_prepared = torch.compile(plain), torch.compile(prepared)
    native = libqat.load_model(folder).decoder
    quantized = libqat.load_model(folder).decoder
    libqat.prepare(quantized, policy)
    return {
        "transformers, float": (lambda tokens: plain(tokens).logits, list(plain.parameters())),
        "transformers, libqat.prepare": (lambda tokens: prepared(tokens).logits, list(prepared.parameters())),
        "transformers, float, torch.compile": (
            lambda tokens: compiled(tokens).logits,
            list(plain.parameters()),
        ),
        "transformers, libqat.prepare, torch.compile": (
            lambda tokens: compiled_prepared(tokens).logits,
            list(prepared.parameters()),
        ),
        "libqat decoder, float": (native, list(native.parameters().values())),
        "libqat decoder, quantized": (quantized, list(quantized.parameters().values())),
    }


def step(model: tuple, tokens: torch.Tensor, compute: torch.dtype) -> float:
    forward, parameters = model
    for parameter in parameters:
        parameter.grad = None
    start = time.perf_counter()
    with torch.autocast("cpu", compute, enabled=compute != torch.float32):
        logits = forward(tokens)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
    loss.backward()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--policy", default="gguf-q4_0")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--compute", choices=["float32", "bfloat16"], nargs="+", default=["float32", "bfloat16"]
    )
    parser.add_argument("--json", metavar="PATH", help="also write the figures there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokens = torch.randint(0, 49152, (2, 256), generator=torch.Generator().manual_seed(0))
    results = []
    with tempfile.TemporaryDirectory() as folder:
        make_folder(folder, options.layers)
        models = variants(folder, options.policy)
    for compute in options.compute:
        times: dict[str, list[float]] = {name: [] for name in models}
        for round_ in range(options.repeats + 2):
            for name, model in models.items():
                seconds = step(model, tokens, getattr(torch, compute))
                if round_ >= 2:  # the first rounds warm up
                    times[name].append(seconds)
        base = times["transformers, float"]
        for name, measured in times.items():
            ratios = sorted(a / b for a, b in zip(measured, base, strict=True))
            results.append(
                {
                    "compute": compute,
                    "variant": name,
                    "ms": 1e3 * statistics.median(measured),
                    "ratio": statistics.median(ratios),
                    "ratio_quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
                }
            )
            last = results[-1]
            print(f"{compute:9} {name:44} {last['ms']:8.1f} ms  ratio {last['ratio']:.3f}", flush=True)
    if options.json:
        setting = {**vars(options), "libqat": libqat.__version__, "torch": torch.__version__}
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"setting": setting, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
