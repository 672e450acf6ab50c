"""Prepared models with PyTorch's machinery: autocast, checkpointing, an ordinary loop."""

import torch
from conftest import make_llama
from preparing import ALL_Q4, quantized_copy, tokens
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import libqat


def loss_of(model, ids):
    return F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def gradients(model):
    result = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return result


def test_autocast(llama):
    prepared = libqat.prepare(llama, "gguf-q4_0")
    reference = quantized_copy(llama, prepared)
    ids = tokens()
    with torch.autocast("cpu", torch.bfloat16):
        logits, expected = llama(ids).logits, reference(ids).logits
        # w_hat is rounded once to bfloat16 in both
        assert torch.equal(logits, expected)
        loss_of(llama, ids).backward()
    assert {p.grad.dtype for p in llama.parameters()} == {torch.float32}


def test_gradient_checkpointing(llama):
    libqat.prepare(llama, "gguf-q4_0").model.train()
    ids = tokens()
    loss_of(llama, ids).backward()
    wanted = gradients(llama)
    llama.gradient_checkpointing_enable()
    loss_of(llama, ids).backward()
    got = gradients(llama)
    assert got.keys() == wanted.keys()
    for name, gradient in got.items():
        assert torch.equal(gradient, wanted[name]), name


def test_checkpointing_under_autocast():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8))
    libqat.prepare(model, ALL_Q4)
    input = torch.randn(4, 64)
    results = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        with torch.autocast("cpu", torch.bfloat16):
            run(input).float().square().sum().backward()
        results.append(gradients(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_an_ordinary_loop_trains_the_latents(llama):
    prepared = libqat.prepare(llama, "gguf-q4_0")
    optimizer = torch.optim.AdamW(llama.parameters(), lr=3e-3)
    ids = tokens(batch=4, length=16)
    losses = []
    for _ in range(12):
        loss = loss_of(llama, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    llama.eval()
    with torch.no_grad():
        before = llama(ids).logits
    ckpt = libqat.freeze(prepared)
    shipped = make_llama(seed=5).eval()
    shipped.load_state_dict(dict(libqat.dequantize(ckpt)), strict=False)  # the tied head is implied
    with torch.no_grad():
        assert torch.equal(shipped(ids).logits, before)
