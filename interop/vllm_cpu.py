"""A Hugging Face folder in vLLM: `vllm_cpu.py REQUEST.json RESULT.json`, in the environment that has vLLM.

The request: {"folder": path, "prompts": texts or lists of tokens, "tokens": how many to generate}.
The result: for each prompt its log-probabilities and the greedy continuation; the classes that compute.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

# Before the import of vLLM, which reads them once: one process, the threads of OMP_NUM_THREADS, no network.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

import torch
import vllm

CONTEXT = 256


def answer(output) -> dict:
    """Of a prompt: log p(token | before) of every token but the first; what follows and what nearly did."""
    tokens = output.prompt_token_ids
    scored = [
        entry[token].logprob for token, entry in zip(tokens[1:], output.prompt_logprobs[1:], strict=True)
    ]
    following = output.outputs[0]
    likeliest = [{token: found.logprob for token, found in step.items()} for step in following.logprobs]
    return {
        "scores": scored,
        "tokens": list(following.token_ids),
        "likeliest": likeliest,
        "text": following.text,
    }


def kernels(model) -> list[str]:
    """The classes whose code multiplies by the weights of the linear layers."""
    found = set()
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        kernel = getattr(getattr(module, "scheme", None), "kernel", None)
        if method is not None:
            found.add(type(kernel or method).__name__)
    return sorted(found)


def main() -> None:
    # vLLM 0.32 uses AMX tiles in its 4-bit kernel without asking Linux for them, which ends the process.
    torch.cpu._init_amx()
    request = json.loads(Path(sys.argv[1]).read_text())
    prompts = request["prompts"]
    texts = isinstance(prompts[0], str)
    engine = vllm.LLM(
        request["folder"],
        dtype="auto",
        max_model_len=CONTEXT,
        max_num_seqs=len(prompts),
        enforce_eager=True,
        skip_tokenizer_init=not texts,
        seed=0,
    )
    greedy = vllm.SamplingParams(
        temperature=0.0,
        max_tokens=request["tokens"],
        ignore_eos=not texts,
        detokenize=texts,
        prompt_logprobs=0,
        logprobs=5,
    )
    asked = prompts if texts else [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = engine.generate(asked, greedy, use_tqdm=False)
    result = {
        "version": f"vllm {vllm.__version__}",
        "kernels": engine.apply_model(kernels)[0],
        "answers": [answer(output) for output in outputs],
    }
    Path(sys.argv[2]).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
