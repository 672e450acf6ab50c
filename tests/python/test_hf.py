"""What Hugging Face users do to a model before, after and instead of training it."""

import copy
import pickle

import pytest
import torch
from conftest import VOCABULARY, make_llama
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import libqat
from libqat import nn as qnn

MLP_ONLY = {"rules": [{"match": ".*mlp.*", "weight": "q4_0"}]}
IDS = torch.arange(24).view(2, 12)


# ---- dtypes after prepare


@pytest.mark.parametrize("convert", ["half", "bfloat16"])
@pytest.mark.parametrize("how", ["method", "to", "type"])
def test_latents_stay_float32(convert, how):
    dtype = {"half": torch.float16, "bfloat16": torch.bfloat16}[convert]
    early = libqat.prepare(make_llama().to(dtype), "gguf-q4_0").model
    late = make_llama()
    prepared = libqat.prepare(late, "gguf-q4_0")
    weight = late.model.layers[0].mlp.up_proj.weight
    late(IDS).logits.sum().backward()
    latent, gradient = weight.detach().clone(), weight.grad.clone()
    with pytest.warns(UserWarning, match=f"asked for {dtype} parameters; a prepared model keeps its latents"):
        {"method": getattr(late, convert), "to": lambda: late.to(dtype), "type": lambda: late.type(dtype)}[
            how
        ]()
    assert late.model.layers[0].mlp.up_proj.weight is weight
    assert torch.equal(weight, latent)
    assert torch.equal(weight.grad, gradient)

    # everything else is as if the model had been prepared in that dtype
    assert {name: p.dtype for name, p in late.named_parameters()} == {
        name: p.dtype for name, p in early.named_parameters()
    }
    assert late(IDS).logits.dtype == dtype
    assert prepared.quantizers()["model.embed_tokens.weight"].dtype == dtype
    with torch.no_grad():
        for name, p in early.named_parameters():
            p.copy_(late.get_parameter(name))
        assert torch.equal(late(IDS).logits, early(IDS).logits)
    late.float()
    assert {p.dtype for p in late.parameters()} == {torch.float32}
    assert late(IDS).logits.dtype == torch.float32


@pytest.mark.filterwarnings("error")
def test_moving_a_half_precision_model_keeps_its_dtypes():
    model = make_llama().bfloat16()
    quantizer = libqat.prepare(model, "gguf-q4_0").quantizers()["model.embed_tokens.weight"]
    dtypes = [value.dtype for value in model.state_dict().values()]
    expected = model(IDS).logits
    model.to("cpu").share_memory()
    assert [value.dtype for value in model.state_dict().values()] == dtypes
    assert quantizer.dtype == torch.bfloat16
    assert torch.equal(model(IDS).logits, expected)
    model.to("meta")
    assert [value.dtype for value in model.state_dict().values()] == dtypes
    assert quantizer.dtype == torch.bfloat16


def test_unprepare_after_half_gives_a_half_precision_model(llama):
    libqat.prepare(llama, "gguf-q4_0")
    with pytest.warns(UserWarning, match="float16"):
        llama.half()
    assert {p.dtype for p in libqat.unprepare(llama).parameters()} == {torch.float16}


def test_latents_replaced_by_another_dtype_are_named(llama):
    prepared = libqat.prepare(llama, "gguf-q4_0")
    llama.load_state_dict({k: v.bfloat16() for k, v in llama.state_dict().items()}, assign=True)
    for use in (lambda: llama(IDS), lambda: libqat.freeze(prepared)):
        with pytest.raises(libqat.ArgumentError, match=r"embed_tokens\.weight: .*float32 latent.*BFloat16"):
            use()


# ---- saving and copying


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_pretrained_writes_the_latents_of_an_ordinary_model(tmp_path, dtype):
    model = make_llama().to(dtype)
    libqat.prepare(model, "gguf-q4_0")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded.model.layers[0].mlp.up_proj) is nn.Linear
    assert loaded.model.layers[0].mlp.up_proj.weight.dtype == torch.float32
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name].float(), value.float()) for name, value in model.state_dict().items())


def test_whole_models_travel(llama, tmp_path):
    libqat.prepare(llama, "gguf-q4_0")
    expected = llama(IDS).logits
    torch.save(llama, tmp_path / "model.pt")
    copies = [
        copy.deepcopy(llama),
        pickle.loads(pickle.dumps(llama)),
        torch.load(tmp_path / "model.pt", weights_only=False),
    ]
    for other in copies:
        assert torch.equal(other(IDS).logits, expected)
        assert other.lm_head.weight is other.model.embed_tokens.weight
        other.lm_head.weight_quantizer.enabled = False
    assert torch.equal(llama(IDS).logits, expected)


def test_averaged_weights_freeze(llama):
    libqat.prepare(llama, "gguf-q4_0")
    averaged = torch.optim.swa_utils.AveragedModel(llama, use_buffers=False)
    averaged.update_parameters(llama)
    with torch.no_grad():
        llama.model.layers[0].mlp.up_proj.weight.mul_(3)
    averaged.update_parameters(llama)
    weights = dict(libqat.dequantize(libqat.freeze(averaged)))
    expected = averaged.module.model.layers[0].mlp.up_proj.weight.detach()
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(weights[name], libqat.ops.fake_quantize(expected, "q4_0"))
    assert not torch.equal(weights[name], dict(libqat.dequantize(libqat.freeze(llama)))[name])


# ---- what is refused, with the reason


def lora(*targets):
    return LoraConfig(task_type="CAUSAL_LM", target_modules=list(targets), r=2)


def test_adapters_before_prepare(llama):
    adapted = get_peft_model(llama, lora("q_proj"))
    for model in (adapted, adapted.base_model, llama):
        with pytest.raises(libqat.UnsupportedError, match=r"Q\(W\)x \+ BAx.*merge the adapters first"):
            libqat.prepare(model, "gguf-q4_0")
    merged = adapted.merge_and_unload()
    assert len(libqat.prepare(merged, "gguf-q4_0").slots) == 15


@pytest.mark.parametrize("target", ["q_proj", "embed_tokens"])
def test_adapters_after_prepare_leave_the_model_alone(llama, target):
    prepared = libqat.prepare(llama, "gguf-q4_0")
    classes, expected = [type(m) for m in llama.modules()], llama(IDS).logits
    with pytest.raises(libqat.UnsupportedError, match=rf"{target}\.weight: .*peft\.tuners\.lora.*merged"):
        get_peft_model(llama, lora(target))
    assert [type(m) for m in llama.modules()] == classes
    assert torch.equal(llama(IDS).logits, expected)
    libqat.freeze(prepared)


def test_adapters_beside_quantized_layers_do_not_freeze(llama):
    libqat.prepare(llama, MLP_ONLY)
    adapted = get_peft_model(llama, lora("q_proj"))
    for model in (adapted, llama):
        with pytest.raises(libqat.UnsupportedError, match=r"freeze: .*q_proj: .*without PEFT adapters"):
            libqat.freeze(model)


def test_freeze_notices_a_replaced_layer():
    model = make_llama(tied=False)
    libqat.prepare(model, "gguf-q4_0")
    model.resize_token_embeddings(VOCABULARY + 32)  # puts a new nn.Linear in the head's place
    assert type(model.lm_head) is nn.Linear
    with pytest.raises(libqat.ArgumentError, match=r"lm_head: .*q8_0.*Linear on f32.*replaced"):
        libqat.freeze(model)


def test_a_resized_tied_vocabulary_freezes(llama):
    libqat.prepare(llama, "gguf-q4_0")
    llama.resize_token_embeddings(VOCABULARY + 32)
    assert type(llama.lm_head) is qnn.QuantizedLinear
    weights = dict(libqat.dequantize(libqat.freeze(llama)))
    assert weights["model.embed_tokens.weight"].shape == (VOCABULARY + 32, 64)
