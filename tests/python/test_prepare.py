import copy
import io
import json
import pickle

import pytest
import torch
from conftest import VOCABULARY, make_llama
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import libqat
from libqat import nn as qnn
from libqat import ops

ALL_Q4 = {"rules": [{"match": ".*", "weight": "q4_0"}]}


def tokens(batch=2, length=12, seed=0):
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def quantized_copy(model, prepared):
    """The reference: an ordinary model whose weights were replaced by what ships."""
    reference = libqat.unprepare(copy.deepcopy(model))
    with torch.no_grad():
        for name, quantizer in prepared.quantizers().items():
            weight = reference.get_parameter(name)
            weight.copy_(ops.fake_quantize(weight.float(), quantizer.grid))
    return reference


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


# ---- refusals: each leaves the model as it was


class Adapter(nn.Module):
    """Stands in for a PEFT layer."""


Adapter.__module__ = "peft.tuners.lora"


class OwnLinear(nn.Linear):
    def forward(self, input):
        return super().forward(input) * 2


class FSDPModule:
    """Stands in for torch.distributed.fsdp.FSDPModule, which is mixed into sharded modules."""


class Sharded(FSDPModule, nn.Sequential):
    pass


class Reads(nn.Module):
    """Uses another layer's weight itself."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(32, 32)
        self.copy = self.layer.weight


REFUSED = {
    "peft": (lambda: nn.Sequential(nn.Linear(32, 32), Adapter()), "PEFT"),
    "fsdp": (lambda: Sharded(nn.Linear(32, 32)), "before fully_shard"),
    "subclass": (lambda: nn.Sequential(nn.Linear(32, 32), OwnLinear(32, 32)), r"1: .*OwnLinear.*subclass"),
    "attention": (lambda: nn.MultiheadAttention(32, 2), "NonDynamicallyQuantizableLinear"),
    "encoder": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(32, 2, 64)),
        "set_fastpath_enabled",
    ),
    "max_norm": (lambda: nn.Sequential(nn.Embedding(8, 32, max_norm=1.0)), "max_norm"),
    "weight_norm": (lambda: nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(32, 32))), "computed"),
    "parametrized": (
        lambda: nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(32, 32))),
        "ParametrizedLinear",
    ),
    "shared": (Reads, r"layer\.weight: is also the parameter copy"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("case", REFUSED)
def test_refuses_layers_that_would_not_use_the_weight(case):
    make, message = REFUSED[case]
    model = make()
    classes = [type(module) for module in model.modules()]
    with pytest.raises(libqat.UnsupportedError, match=message):
        libqat.prepare(model, ALL_Q4)
    assert [type(module) for module in model.modules()] == classes


def test_a_rule_can_leave_an_unknown_subclass_float():
    model = nn.Sequential(nn.Linear(32, 32), OwnLinear(32, 32))
    prepared = libqat.prepare(model, {"rules": [{"match": "1", "weight": "f32"}, *ALL_Q4["rules"]]})
    assert list(prepared.quantizers()) == ["0.weight"]
    assert type(model[1]) is OwnLinear


def test_refuses_float64():
    with pytest.raises(libqat.ArgumentError, match=r"0\.weight: .*float64"):
        libqat.prepare(nn.Sequential(nn.Linear(32, 32).double()), ALL_Q4)


def test_refuses_another_policy_and_accepts_the_same(llama):
    libqat.prepare(llama, "gguf-q4_0")
    assert len(libqat.prepare(llama, "gguf-q4_0").slots) == 15
    with pytest.raises(libqat.ArgumentError, match="unprepare"):
        libqat.prepare(llama, "gguf-q8_0")
    with pytest.raises(libqat.ArgumentError, match="unprepare"):
        libqat.prepare(nn.ModuleDict({"inner": llama}), "gguf-q4_0")
    libqat.unprepare(llama)
    assert libqat.prepare(llama, "gguf-q8_0").quantizers()["model.layers.0.mlp.up_proj.weight"].grid == "q8_0"


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("gguf-q5", "gguf-q4_0"),
        ("no/such/policy.json", "no/such/policy.json"),
        ({"rules": [{"match": ".*", "weight": "q9_9"}]}, r"rules\[0\]\.weight"),
        ({"rules": [{"match": ".*", "wieght": "q4_0"}]}, r"wieght"),
        ({"rules": [{"match": "nowhere", "weight": "q4_0"}]}, r"nowhere"),
        ({"rules": [{"match": "0", "weight": "q4_0"}]}, r"0\.weight|0"),
    ],
)
def test_policy_errors_leave_the_model_alone(policy, message):
    model = nn.Sequential(nn.Linear(33, 32))
    with pytest.raises(libqat.Error, match=message):
        libqat.prepare(model, policy)
    assert type(model[0]) is nn.Linear


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


# ---- with PyTorch's machinery


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


# ---- freezing


def test_freeze_holds_what_forward_computes(llama, tmp_path):
    prepared = libqat.prepare(llama, "gguf-q4_0")
    ckpt = libqat.freeze(prepared)
    weights = dict(libqat.dequantize(ckpt))
    # as in a folder that save_pretrained wrote: a head tied by the configuration is implied
    assert sorted(weights) == sorted(set(llama.state_dict()) - {"lm_head.weight"})
    for name, quantizer in prepared.quantizers().items():
        expected = ops.fake_quantize(llama.get_parameter(name).detach(), quantizer.grid)
        assert torch.equal(weights[name], expected), name
    assert torch.equal(weights["model.norm.weight"], llama.model.norm.weight)
    assert json.loads(ckpt.config)["hidden_size"] == 64
    assert json.loads(ckpt.policy) == json.loads(prepared.policy.to_json())

    libqat.save(ckpt, tmp_path / "a.qat.safetensors")
    libqat.save(libqat.freeze(llama), tmp_path / "b.qat.safetensors")
    first = (tmp_path / "a.qat.safetensors").read_bytes()
    assert first == (tmp_path / "b.qat.safetensors").read_bytes()
    libqat.save(libqat.load(tmp_path / "a.qat.safetensors"), tmp_path / "c.qat.safetensors")
    assert first == (tmp_path / "c.qat.safetensors").read_bytes()


def test_freeze_keeps_other_ties_as_aliases():
    first, second = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    libqat.prepare(model, ALL_Q4)
    ckpt = libqat.freeze(model)
    assert dict(ckpt.aliases) == {"1.weight": "0.weight"}
    weights = dict(libqat.dequantize(ckpt))
    assert torch.equal(weights["1.weight"], ops.fake_quantize(first.weight.detach(), "q4_0"))


def test_freeze_of_a_wrapped_model_uses_its_own_names(llama):
    libqat.prepare(llama, "gguf-q4_0")
    wrapped = nn.ModuleDict({"module": llama})
    assert "model.norm.weight" in dict(libqat.dequantize(libqat.freeze(wrapped)))


def test_freeze_keeps_buffers_of_ordinary_models():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 10))
    model(torch.randn(3, 1, 6, 6))
    libqat.prepare(model, {"rules": [{"match": "0|3", "weight": "int4_channel"}]})
    ckpt = libqat.freeze(model)
    weights = dict(libqat.dequantize(ckpt))
    assert torch.equal(weights["1.running_mean"], model[1].running_mean)
    assert torch.equal(weights["0.weight"], ops.fake_quantize(model[0].weight.detach(), "int4_channel"))
    assert ckpt.config == ""


def test_hugging_face_and_decoder_write_the_same_bytes(hf_folder, tmp_path):
    """The same latents through `libqat.prepare` of a transformers model and through the C++ decoder."""
    from transformers import LlamaForCausalLM

    loaded = libqat.load_model(hf_folder)
    native = libqat.freeze(libqat.prepare(loaded.decoder, "gguf-q4_0"), loaded.config, loaded.tokenizer)
    model = LlamaForCausalLM.from_pretrained(hf_folder)
    ours = libqat.freeze(libqat.prepare(model, "gguf-q4_0"))
    for name, ckpt in (("native", native), ("ours", ours)):
        libqat.save(ckpt, tmp_path / f"{name}.qat.safetensors")
        libqat.export(ckpt, tmp_path / f"{name}.gguf")
    for suffix in (".qat.safetensors", ".gguf"):
        assert (tmp_path / f"native{suffix}").read_bytes() == (tmp_path / f"ours{suffix}").read_bytes()


def test_a_decoder_reports_like_the_hugging_face_model(hf_folder):
    from transformers import LlamaForCausalLM

    native = libqat.prepare(libqat.load_model(hf_folder).decoder, "gguf-q4_0").report()
    ours = libqat.prepare(LlamaForCausalLM.from_pretrained(hf_folder), "gguf-q4_0").report()
    fields = ("name", "kind", "shape", "grid", "bits_per_weight", "bytes", "relative_error")
    assert [[getattr(row, field) for field in fields] for row in native] == [
        [getattr(row, field) for field in fields] for row in ours
    ]
