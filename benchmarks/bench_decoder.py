"""One training step of libqat's decoder beside transformers' LlamaForCausalLM: same weights, same process.

Random weights of SmolLM2-135M's shape; bfloat16 autocast; cross-entropy; no optimizer. Steps of the two are
interleaved, so that other work on the machine meets both; the least and the median time are printed.

    python benchmarks/bench_decoder.py --threads 2 --steps 8
"""

import argparse
import statistics
import tempfile
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import libqat

SMOLLM2 = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    rms_norm_eps=1e-5,
    rope_theta=1e5,
    tie_word_embeddings=True,
    use_cache=False,
)


def step(model, parameters, tokens):
    """Seconds of the forward pass and of the whole step."""
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens)
    forward = time.perf_counter() - start
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    seconds = time.perf_counter() - start
    for parameter in parameters:
        parameter.grad = None
    return forward, seconds


def main():
    """Prints a line for each implementation and their ratio."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--steps", type=int, default=8)
    arguments.add_argument("--batch", type=int, default=2)
    arguments.add_argument("--length", type=int, default=256)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    reference = LlamaForCausalLM(SMOLLM2)
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        decoder = libqat.load_model(folder).decoder
    tokens = torch.randint(0, SMOLLM2.vocab_size, (options.batch, options.length))
    contenders = {
        "libqat": (decoder, list(decoder.parameters().values())),
        "transformers": (lambda ids: reference(ids).logits, list(reference.parameters())),
    }
    times = {name: [] for name in contenders}
    for i in range(options.steps + 1):
        for name, (model, parameters) in contenders.items():
            measured = step(model, parameters, tokens)
            if i > 0:  # the first step warms caches
                times[name].append(measured)
    for name, measured in times.items():
        forward, seconds = zip(*measured, strict=True)
        print(
            f"{name:13} step {min(seconds):.3f} s (median {statistics.median(seconds):.3f}), "
            f"forward {min(forward):.3f} s"
        )
    ratio = min(s for _, s in times["libqat"]) / min(s for _, s in times["transformers"])
    print(f"ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
