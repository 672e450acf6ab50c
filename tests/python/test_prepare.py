"""What `prepare` attaches to a model, and how it is switched, reported, copied and taken away."""

import copy
import io
import json
import pickle

import pytest
import torch
from conftest import VOCABULARY, make_llama
from preparing import ALL_Q4, quantized_copy, tokens
from torch import nn

import libqat
from libqat import nn as qnn
from libqat import ops

# ---- attaching


def test_prepare_keeps_parameters_and_keys(llama):
    keys = list(llama.state_dict())
    parameters = dict(llama.named_parameters())
    prepared = libqat.prepare(llama, "gguf-q4_0")
    assert prepared.model is llama
    assert list(llama.state_dict()) == keys
    assert all(value is parameters[name] for name, value in llama.named_parameters())
    assert type(llama.model.layers[0].mlp.down_proj) is qnn.QuantizedLinear
    assert type(llama.model.embed_tokens) is qnn.QuantizedEmbedding
    assert isinstance(llama.lm_head, nn.Linear)
    grids = {name: quantizer.grid for name, quantizer in prepared.quantizers().items()}
    assert grids.pop("model.embed_tokens.weight") == "q8_0"
    assert len(grids) == 14
    assert set(grids.values()) == {"q4_0"}


def test_forward_and_gradients_are_those_of_the_shipped_weights(llama):
    prepared = libqat.prepare(llama, "gguf-q4_0")
    reference = quantized_copy(llama, prepared)
    ids = tokens()
    logits, expected = llama(ids).logits, reference(ids).logits
    # the same float32 products in the same order
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)

    logits.square().mean().backward()
    expected.square().mean().backward()
    for (name, latent), other in zip(llama.named_parameters(), reference.parameters(), strict=True):
        # straight-through: the latent's gradient is w_hat's. Sums run in another order: float32 rounding.
        torch.testing.assert_close(latent.grad, other.grad, rtol=1e-4, atol=1e-7, msg=name)


def test_tied_weights_are_one_latent_with_one_grid():
    model = make_llama(tied=True)
    prepared = libqat.prepare(model, "gguf-q4_0")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight_quantizer is model.model.embed_tokens.weight_quantizer
    assert model.lm_head.weight_quantizer.tensor == "model.embed_tokens.weight"
    assert "lm_head.weight" not in prepared.quantizers()

    untied = libqat.prepare(make_llama(tied=False), "gguf-q4_0")
    assert untied.quantizers()["lm_head.weight"].grid == "q8_0"


@pytest.mark.parametrize("form", ["preset", "path", "dict", "policy"])
def test_policy_forms(llama, tmp_path, form):
    policy = libqat.Policy.load("gguf-q4_0")
    path = tmp_path / "policy.json"
    path.write_text(policy.to_json())
    forms = {"preset": "gguf-q4_0", "path": path, "dict": json.loads(policy.to_json()), "policy": policy}
    prepared = libqat.prepare(llama, forms[form])
    assert prepared.policy.to_json() == policy.to_json()
    assert len(prepared.slots) == 15


def test_a_clipped_estimator_reaches_the_layers():
    model = nn.Sequential(nn.Linear(32, 4, bias=False))
    prepared = libqat.prepare(model, ALL_Q4 | {"estimator": {"kind": "clipped_ste"}})
    assert prepared.quantizers()["0.weight"].estimator == "clipped_ste"
    model(torch.ones(1, 32)).sum().backward()
    gradient = torch.ones(4, 32)
    expected = torch.ops.libqat.fake_quantize_backward(gradient, model[0].weight, "q4_0", "clipped_ste")
    assert torch.equal(model[0].weight.grad, expected)


def test_bfloat16_latents_are_raised_and_activations_are_not():
    model = make_llama().bfloat16()
    parameters = dict(model.named_parameters())
    libqat.prepare(model, "gguf-q4_0")
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.float32
    assert model.model.embed_tokens.weight.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.norm.weight.dtype == torch.bfloat16
    assert all(value is parameters[name] for name, value in model.named_parameters())
    logits = model(tokens()).logits
    assert logits.dtype == torch.bfloat16
    logits.float().square().mean().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.dtype == torch.float32

    libqat.unprepare(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(tokens()).logits.dtype == torch.bfloat16


def conv_cases():
    return [
        (nn.Conv1d(4, 6, 8, padding=1, padding_mode="circular"), (2, 4, 20)),
        (nn.Conv2d(4, 6, (2, 4), stride=2, groups=2), (2, 4, 9, 9)),
        (nn.Conv3d(4, 6, 2, dilation=2), (2, 4, 5, 5, 5)),
        (nn.ConvTranspose1d(4, 8, 4, stride=2), (2, 4, 7)),
        (nn.ConvTranspose2d(4, 8, 2, stride=2), (2, 4, 5, 5)),
        (nn.ConvTranspose3d(4, 4, 2, stride=2, bias=False), (1, 4, 3, 3, 3)),
    ]


@pytest.mark.parametrize("case", range(6))
def test_convolutions(case):
    torch.manual_seed(case)
    layer, shape = conv_cases()[case]
    input = torch.randn(shape)
    reference = copy.deepcopy(layer)
    model = nn.Sequential(layer)
    libqat.prepare(model, {"rules": [{"match": ".*", "kind": "conv", "weight": "int4_channel"}]})
    with torch.no_grad():
        reference.weight.copy_(ops.fake_quantize(reference.weight, "int4_channel"))
    output, expected = model(input), reference(input)
    assert torch.equal(output, expected)
    output.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(layer.weight.grad, reference.weight.grad)


def test_transposed_convolution_takes_an_output_size():
    layer = nn.ConvTranspose2d(4, 8, 3, stride=2)
    reference = copy.deepcopy(layer)
    libqat.prepare(nn.Sequential(layer), {"rules": [{"match": "0", "weight": "f16"}]})
    input = torch.randn(1, 4, 5, 5)
    with torch.no_grad():
        reference.weight.copy_(reference.weight.half().float())
    assert torch.equal(layer(input, output_size=[12, 12]), reference(input, output_size=[12, 12]))


def test_unprepare_brings_the_float_model_back(llama):
    ids = tokens()
    before, classes = llama(ids).logits, [type(module) for module in llama.modules()]
    libqat.prepare(llama, "gguf-q4_0")
    assert not torch.equal(llama(ids).logits, before)
    assert libqat.unprepare(llama) is llama
    assert torch.equal(llama(ids).logits, before)
    assert [type(module) for module in llama.modules()] == classes
    with pytest.raises(libqat.ArgumentError, match="expected a prepared model"):
        libqat.unprepare(llama)


# ---- switching, reporting, copying


def test_enabled_switches_and_restores(llama):
    ids = tokens()
    before = llama(ids).logits
    prepared = libqat.prepare(llama, "gguf-q4_0")
    quantized = llama(ids).logits
    with prepared.enabled(False):
        assert torch.equal(llama(ids).logits, before)
        with prepared.enabled():
            assert torch.equal(llama(ids).logits, quantized)
        assert torch.equal(llama(ids).logits, before)
    assert torch.equal(llama(ids).logits, quantized)
    prepared.enabled(False)
    assert torch.equal(llama(ids).logits, before)


def test_report_counts_what_ships(llama):
    report = libqat.prepare(llama, "gguf-q4_0").report()
    rows = {row.name: row for row in report}
    assert list(rows) == [name for name, _ in llama.named_parameters()]
    down = rows["model.layers.1.mlp.down_proj.weight"]
    # a Q4_0 block is 32 codes of 4 bits and one fp16 scale: 18 bytes; a Q8_0 block is 34
    assert (down.kind, down.shape, down.grid, down.bytes) == (
        "linear",
        (64, 128),
        "q4_0",
        64 * 128 // 32 * 18,
    )
    assert down.bits_per_weight == 4.5
    # 16 levels over +-max of 32 uniform numbers: a step of 1/8 of the maximum, error step/sqrt(12) of
    # RMS max/sqrt(3), so about 1/16
    assert 0.03 < down.relative_error < 0.12
    assert rows["model.embed_tokens.weight"].bytes == VOCABULARY * 64 // 32 * 34
    norm = rows["model.norm.weight"]
    assert (norm.grid, norm.bytes, norm.relative_error) == ("f32", 64 * 4, 0.0)
    assert report.bytes == sum(row.bytes for row in report)
    assert report.weights == sum(p.numel() for p in llama.parameters())
    text = str(report)
    assert "model.layers.1.mlp.down_proj.weight" in text
    assert f"{report.bytes:,}" in text


def test_deepcopy_pickle_and_state_dict(llama, tmp_path):
    prepared = libqat.prepare(llama, "gguf-q4_0")
    ids = tokens()
    expected = llama(ids).logits
    copied = copy.deepcopy(prepared)
    assert copied.model is not llama
    assert torch.equal(copied.model(ids).logits, expected)
    assert copied.model.lm_head.weight_quantizer is copied.model.model.embed_tokens.weight_quantizer
    with copied.enabled(False):
        assert torch.equal(llama(ids).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(llama))(ids).logits, expected)

    buffer = io.BytesIO()
    torch.save(llama.state_dict(), buffer)
    buffer.seek(0)
    fresh = make_llama(seed=1)
    fresh.load_state_dict(torch.load(buffer))
    libqat.prepare(fresh, "gguf-q4_0")
    assert torch.equal(fresh(ids).logits, expected)
