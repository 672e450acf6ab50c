"""Objectives of training: values and gradients against autograd."""

import pytest
import torch

from libqat import ArgumentError, _core


def test_objective_equals_autograd_in_float64():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(2, 6, 50, generator=generator, dtype=torch.float64)
    teacher = torch.randn(2, 6, 50, generator=generator, dtype=torch.float64)
    tokens = torch.randint(50, (2, 6), generator=generator)
    ours, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
    loss = _core.objective_loss(ours, teacher, tokens, kl=0.7, ce=0.3, temperature=2.0)
    kl = torch.nn.functional.kl_div(
        torch.log_softmax(theirs[:, :-1] / 2, -1).flatten(0, 1),
        torch.log_softmax(teacher[:, :-1] / 2, -1).flatten(0, 1),
        log_target=True,
        reduction="batchmean",
    )
    ce = torch.nn.functional.cross_entropy(theirs[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    expected = 0.7 * 4 * kl + 0.3 * ce
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-16)
    with pytest.raises(ArgumentError, match="teacher"):
        _core.objective_loss(ours, None, tokens)


@pytest.mark.parametrize(
    "terms",
    [{"reverse_kl": 1.0}, {"jsd": 1.0, "jsd_alpha": 0.85}, {"cakld": 1.0}, {"cakld": 2.0, "cakld_beta": 0.2}],
)
def test_divergences_equal_autograd_in_float64(terms):
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(2, 6, 50, generator=generator, dtype=torch.float64)
    teacher = torch.randn(2, 6, 50, generator=generator, dtype=torch.float64)
    tokens = torch.randint(50, (2, 6), generator=generator)
    ours, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
    _core.objective_loss(ours, teacher, tokens, kl=0.0, temperature=1.5, **terms).backward()

    def kl(a, b):
        return torch.nn.functional.kl_div(b, a, log_target=True, reduction="batchmean")

    log_p = torch.log_softmax(teacher[:, :-1].flatten(0, 1) / 1.5, -1)
    log_q = torch.log_softmax(theirs[:, :-1].flatten(0, 1) / 1.5, -1)
    alpha = terms.get("jsd_alpha", 0.5)
    log_m = (alpha * log_p.exp() + (1 - alpha) * log_q.exp()).log()
    sure = torch.softmax(teacher[:, :-1], -1).gather(-1, tokens[:, 1:, None]).mean()
    beta = terms.get("cakld_beta", sure)
    expected = (
        terms.get("reverse_kl", 0) * kl(log_q, log_p)
        + terms.get("jsd", 0) * (alpha * kl(log_p, log_m) + (1 - alpha) * kl(log_q, log_m))
        + terms.get("cakld", 0) * (beta * kl(log_q, log_p) + (1 - beta) * kl(log_p, log_q))
    )
    (expected * 1.5**2).backward()
    # Sums of 50 doubles in another order.
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("chunk", [0, 3])
def test_head_loss_equals_the_loss_of_full_logits(chunk):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 6, 32, generator=generator), torch.randn(50, 32, generator=generator)
    teacher = torch.randn(2, 6, 16, generator=generator), torch.randn(50, 16, generator=generator)
    tokens = torch.randint(50, (2, 6), generator=generator)
    hidden.requires_grad_()
    weight.requires_grad_()
    shipped = torch.ops.libqat.fake_quantize(weight, "int4_channel")
    expected = _core.objective_loss(hidden @ shipped.T, teacher[0] @ teacher[1].T, tokens, kl=0.7, ce=0.3)
    reference = torch.autograd.grad(expected, [hidden, weight])
    loss = _core.head_loss(
        hidden, weight, tokens, grid="int4_channel", teacher=teacher, kl=0.7, ce=0.3, chunk=chunk
    )
    # float32 sums of 32 products in another order.
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(torch.autograd.grad(loss, [hidden, weight]), reference, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    with pytest.raises(ArgumentError, match="teacher"):
        _core.head_loss(hidden, weight, tokens)
