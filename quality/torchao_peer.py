"""QAT as users of torchao do it: int4 groups of 32, converted, dequantized, made Q4_0 by llama.cpp's rule.

The same float model, windows, loss (KL to the float model), optimizer and schedule as libqat's runs without a
start. torchao's scales are not Q4_0's, so llama.cpp's own rule moves the weights once more.
"""

from __future__ import annotations

import contextlib
import io
import math
from pathlib import Path

import torch
from libqat.cli import console
from torch.nn import functional as F  # noqa: N812  (PyTorch's own spelling)

import libqat

GROUP = 32


def available() -> bool:
    """Whether torchao is installed."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            import torchao.quantization.qat  # noqa: F401
    except ImportError:
        return False
    return True


def version() -> str:
    """The installed one."""
    import torchao

    return torchao.__version__


def train(
    source: Path,
    batches: list[torch.Tensor],
    folder: Path,
    learning_rate: float,
    seed: int,
) -> Path:
    """The Hugging Face folder, float32, of the model that torchao trained, converted and dequantized."""
    done = folder / "trained"
    if done.exists():
        return done
    model, teacher = _load(source, folder)
    with contextlib.redirect_stderr(io.StringIO()):
        from torchao.quantization import IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerGroup
        from torchao.quantization.qat import QATConfig
    base = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP))
    quantize_(model.model.layers, QATConfig(base, step="prepare"))
    torch.manual_seed(seed)
    _fit(model, teacher, batches, learning_rate)
    quantize_(model.model.layers, QATConfig(base, step="convert"))
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            weight = module.weight.dequantize().detach().float()
            module.weight = torch.nn.Parameter(weight, requires_grad=False)
    model.save_pretrained(done)
    return done


def _load(source: Path, folder: Path) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The float32 student and the bfloat16 teacher, as Hugging Face models."""
    import transformers

    transformers.logging.set_verbosity_error()
    float_folder = folder / "float"
    if not float_folder.exists():
        loaded = libqat.load_model(source)
        plain = libqat.prepare(loaded.decoder, {"rules": []})
        checkpoint = libqat.freeze(plain, loaded.config, loaded.tokenizer)
        libqat.export(checkpoint, float_folder, target="hf", dtype="float32")
    load = transformers.AutoModelForCausalLM.from_pretrained
    student = load(float_folder, dtype=torch.float32)
    student.model.embed_tokens.requires_grad_(False)
    return student, load(float_folder, dtype=torch.bfloat16).eval()


def _fit(model: torch.nn.Module, teacher: torch.nn.Module, batches: list, learning_rate: float) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, learning_rate, betas=(0.9, 0.95), weight_decay=0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share(step, len(batches)))
    with console.progress("torchao: training") as update:
        for step, tokens in enumerate(batches, start=1):
            with torch.no_grad():
                target = teacher(tokens).logits[:, :-1].float().log_softmax(-1)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(tokens).logits
            found = logits[:, :-1].float().log_softmax(-1)
            loss = F.kl_div(found.flatten(0, 1), target.flatten(0, 1), log_target=True, reduction="batchmean")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            update(step, len(batches), f"loss {loss.item():.4f}")


def _share(step: int, steps: int) -> float:
    """As in libqat: a tenth of warm-up, then half a cosine down to a twentieth."""
    done = step + 1
    warmup = round(0.1 * steps)
    if done <= warmup:
        return done / warmup
    progress = (done - warmup) / (steps - warmup)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))
