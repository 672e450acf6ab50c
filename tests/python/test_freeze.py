"""What `freeze` writes of a prepared model."""

import json

import torch
from preparing import ALL_Q4
from torch import nn

import libqat
from libqat import ops


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
