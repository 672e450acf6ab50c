"""Compressed-Tensors folders: transformers decompresses the trained weights; libqat reads them back."""

import json
import os

import pytest
import torch
from conftest import make_llama, make_tiny
from exporting import (
    ATTENTION,
    MLP,
    broken,
    checkpoint_of,
    mixed_compressed_tensors,
    read_folder,
    some_tokens,
)
from safetensors.torch import save_file

import libqat
from libqat import _core

TARGET = "compressed-tensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def load(folder, **settings):
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **settings)
    assert not any(info.values()), info
    with torch.no_grad():
        logits = model.eval()(some_tokens()).logits  # the first forward decompresses
    return model, logits


def differing(model, weights):
    """Tensors of the model, in its dtype, that are not exactly these weights."""
    state = model.state_dict()
    return [key for key, weight in weights.items() if not torch.equal(state[key].float(), weight)]


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_decompresses_the_trained_weights(tmp_path, hf_folder, tied):
    checkpoint = mixed_compressed_tensors(tied=tied, initializer_range=0.1)
    assert libqat.can_export(checkpoint, TARGET) == []
    libqat.export(checkpoint, tmp_path / "out", target=TARGET, tokenizer_from=hf_folder)
    model, logits = load(tmp_path / "out")
    weights = _core.dequantize(checkpoint)
    assert model.dtype == torch.float32
    assert differing(model, weights) == []
    twin = make_llama(tied=tied).eval()
    twin.load_state_dict(weights)
    with torch.no_grad():
        assert torch.equal(logits, twin(some_tokens()).logits)
    assert libqat.verify(tmp_path / "out", checkpoint) == []


def test_qwen3_with_untied_quantized_head(tmp_path):
    model = make_tiny("Qwen3", tied=False, intermediate_size=96, head_dim=32)
    grids = {EMBEDDING: "f32", "lm_head.weight": "int8_channel"}
    checkpoint = checkpoint_of(model, grid="int4_g32", grids=grids)
    libqat.export(checkpoint, tmp_path / "out", target=TARGET)
    loaded, _ = load(tmp_path / "out")
    assert differing(loaded, _core.dequantize(checkpoint)) == []


def test_the_package_decompresses_the_same(tmp_path):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_name

    checkpoint = mixed_compressed_tensors()
    libqat.export(checkpoint, tmp_path / "out", target=TARGET)
    config = QuantizationConfig.model_validate(
        json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    )
    stored = read_folder(tmp_path / "out")
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    for key in checkpoint.quantized:
        module = key.removesuffix(".weight")
        groups = config.config_groups.values()
        [scheme] = [g for g in groups if any(match_name(module, target) for target in g.targets)]
        local = {name: stored[f"{module}.{name}"] for name in compressor.compression_param_names(scheme)}
        assert torch.equal(compressor.decompress(local, scheme)["weight"], _core.dequantize(checkpoint)[key])


@pytest.mark.parametrize(("short", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_model_in_half_precision_computes_the_trained_weights(tmp_path, short, dtype):
    model = make_llama()
    grids = {EMBEDDING: "f32", "lm_head.weight": "f32"}
    checkpoint = checkpoint_of(model, grid=f"int4_g32@{short}:{short}", grids=grids)
    obstacles = libqat.can_export(checkpoint, TARGET)
    name = str(dtype).removeprefix("torch.")
    assert EMBEDDING in {row.tensor for row in obstacles}, "float32 embeddings, which the dtype rounds"
    assert all(f"--dtype {name}" in row.reason for row in obstacles)
    libqat.export(checkpoint, tmp_path / "out", target=TARGET, dtype=name)
    loaded, _ = load(tmp_path / "out")
    weights = _core.dequantize(checkpoint)
    assert loaded.dtype == dtype
    assert differing(loaded, {key: weights[key] for key in checkpoint.quantized}) == []
    assert {d.what for d in libqat.verify(tmp_path / "out", checkpoint)} == {"rounded"}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    exact = checkpoint_of(model, grid=f"int4_g32@{short}:{short}", grids=grids)
    libqat.export(exact, tmp_path / "exact", target=TARGET)
    assert json.loads((tmp_path / "exact" / "config.json").read_text())["dtype"] == name
    assert libqat.verify(tmp_path / "exact", exact) == []
    again = libqat.import_checkpoint(tmp_path / "exact")
    assert again.grids == exact.grids


def test_a_dtype_that_is_not_exact_is_refused(tmp_path):
    checkpoint = mixed_compressed_tensors()
    rows = libqat.can_export(checkpoint, TARGET, dtype="bfloat16")
    assert {row.tensor for row in rows} == set(checkpoint.quantized)
    with pytest.raises(libqat.UnsupportedError, match="bfloat16 model computes"):
        libqat.export(checkpoint, tmp_path / "out", target=TARGET, dtype="bfloat16")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("grid", "bits", "group"), [("q4_0", 4, 32), ("q8_0", 8, 32), ("q2_0", 2, 64)])
def test_grids_of_ggml_that_fit_exactly(tmp_path, grid, bits, group):
    """The same codes and float16 scales in another container; q2_0's code 2 needs three bits."""
    checkpoint = checkpoint_of(make_llama(), grid=grid, grids={EMBEDDING: "f32", HEAD: "f32"})
    libqat.export(checkpoint, tmp_path / "out", target=TARGET)
    loaded, _ = load(tmp_path / "out")
    assert differing(loaded, _core.dequantize(checkpoint)) == []
    assert libqat.verify(tmp_path / "out", checkpoint) == []
    again = libqat.import_checkpoint(tmp_path / "out")
    assert {again.grids[key] for key in checkpoint.quantized} == {f"int{bits}_g{group}@fp16"}


def test_what_has_no_place(tmp_path):
    rows = libqat.can_export(checkpoint_of(make_llama(), grid="q4_1", embedding="int8_channel"), TARGET)
    reasons = {row.tensor: (row.grid, row.reason) for row in rows}
    assert "unquantized embedding" in reasons[EMBEDDING][1]
    assert reasons[MLP.format(0, "up")][0] == "q4_1"
    assert "has no code on int4_g32" in reasons[MLP.format(0, "up")][1]


def test_groups_name_the_modules_that_they_mean(tmp_path):
    libqat.export(mixed_compressed_tensors(), tmp_path / "out", target=TARGET)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    targets = {
        tuple(group["weights"][key] for key in ("num_bits", "strategy", "group_size")): group["targets"]
        for group in config["config_groups"].values()
    }
    layers = r"re:model\.layers\.\d+\."
    assert targets == {
        (2, "group", 32): [rf"{layers}mlp\.gate_proj$", rf"{layers}mlp\.up_proj$"],
        (3, "group", 64): ["model.layers.0.mlp.down_proj"],
        (4, "tensor", None): ["model.layers.1.mlp.down_proj"],
        (4, "channel", None): [rf"{layers}self_attn\.{part}_proj$" for part in "kqv"],
        (8, "group", 32): ["model.layers.0.self_attn.o_proj"],
        (8, "channel", None): ["model.layers.1.self_attn.o_proj"],
    }
    assert config["ignore"] == ["lm_head"]


def test_layers_that_vllm_fuses_are_noted(tmp_path):
    checkpoint = checkpoint_of(
        make_llama(),
        grid="int4_g32",
        grids={EMBEDDING: "f32", "lm_head.weight": "f32", ATTENTION.format(1, "k"): "int8_g32"},
    )
    libqat.export(checkpoint, tmp_path / "out", target=TARGET)
    [note] = json.loads((tmp_path / "out" / "libqat.json").read_text())["notes"]
    assert "layers.1.self_attn.q_proj" in note
    assert "layers.1.self_attn.k_proj" in note
    assert note in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("parent", ["mlp", "shared_experts"])
def test_a_fused_mlp_that_is_no_stack_of_experts_is_not_noted(tmp_path, parent):
    """As Phi-3 has it: vLLM computes its two layers one after the other."""
    grids = {
        f"block.{parent}.gate_up_proj.weight": "int4_g32",
        f"block.{parent}.down_proj.weight": "int8_g32",
    }
    tensors = [(key, torch.randn(64, 64)) for key in grids]
    checkpoint = _core.freeze_tensors(tensors, grids, config="{}", tokenizer="none", policy="")
    libqat.export(checkpoint, tmp_path / "out", target=TARGET)
    assert json.loads((tmp_path / "out" / "libqat.json").read_text()).get("notes", []) == []


# ---- reading


def test_a_folder_is_taken_up_again(tmp_path, hf_folder):
    checkpoint = mixed_compressed_tensors()
    libqat.export(checkpoint, tmp_path / "out", target=TARGET, tokenizer_from=hf_folder)
    again = libqat.import_checkpoint(tmp_path / "out")
    assert again.grids == checkpoint.grids
    for key, tensor in checkpoint.quantized.items():
        assert torch.equal(again.quantized[key].codes, tensor.codes), key
        assert torch.equal(again.quantized[key].scales, tensor.scales), key
    assert again.tokenizer == str(tmp_path / "out")
    assert libqat.verify(tmp_path / "out", again) == []
    libqat.export(again, tmp_path / "again", target=TARGET)
    for path in (tmp_path / "out").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_folder_of_the_package_itself(tmp_path):
    """Written by compressed_tensors' own quantizer and packer, with class targets and bfloat16 scales."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    model = make_llama().to(torch.bfloat16)
    config = json.loads(model.config.to_json_string(use_diff=False))
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    config |= {
        "dtype": "bfloat16",
        "quantization_config": {
            "quant_method": TARGET,
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        },
    }
    tensors, expected = {}, {}
    generator = torch.Generator().manual_seed(0)
    for key, value in model.state_dict().items():
        if key == "lm_head.weight":
            continue
        if "_proj" not in key:
            tensors[key] = value
            continue
        module = key.removesuffix(".weight")
        codes = torch.randint(-8, 8, value.shape, generator=generator, dtype=torch.int8)
        scales = torch.rand(len(codes), value.shape[1] // 32, generator=generator).to(torch.bfloat16)
        tensors[f"{module}.weight_packed"] = pack_to_int32(codes, 4)
        tensors[f"{module}.weight_scale"] = scales
        tensors[f"{module}.weight_shape"] = torch.tensor(value.shape)
        expected[key] = (codes, scales)
    (tmp_path / "their").mkdir()
    save_file(tensors, tmp_path / "their" / "model.safetensors", {"format": "pt"})
    (tmp_path / "their" / "config.json").write_text(json.dumps(config))
    checkpoint = libqat.import_checkpoint(tmp_path / "their")
    assert set(checkpoint.grids.values()) - {"f32", "bf16"} == {"int4_g32@bf16:bf16"}
    for key, (codes, scales) in expected.items():
        assert torch.equal(checkpoint.quantized[key].codes, codes)
        assert torch.equal(checkpoint.quantized[key].scales[:, :, 0], scales.float())
    loaded, _ = load(tmp_path / "their")
    assert differing(loaded, _core.dequantize(checkpoint)) == []


UP = "model.layers.0.mlp.up_proj"


def _group(config):
    return next(iter(config["quantization_config"]["config_groups"].values()))


def _drop(part):
    return lambda t, c: t.pop(f"{UP}.{part}")


def _put(part, value):
    return lambda t, c: t.__setitem__(f"{UP}.{part}", value)


def _weights(**values):
    return lambda t, c: _group(c)["weights"].update(values)


BROKEN = [
    (_drop("weight_scale"), libqat.FileError, "up_proj.weight_scale"),
    (_drop("weight_shape"), libqat.FileError, "up_proj.weight_shape"),
    (
        _put("weight_packed", torch.zeros(3, 1, dtype=torch.int32)),
        libqat.FileError,
        "weight_packed: expected",
    ),
    (_put("weight_packed", torch.zeros(128, 4)), libqat.FileError, "expected I32, got F32"),
    (_put("weight_shape", torch.tensor([2**40, 2**40])), libqat.FileError, "two sizes above 0"),
    (_put("weight_shape", torch.tensor([-1, 64])), libqat.FileError, "two sizes above 0"),
    (_put("weight_shape", torch.tensor([128, 48])), libqat.FileError, "whole groups|expected"),
    (_put("weight_scale", torch.full((128, 2), torch.nan)), libqat.FileError, "finite scales"),
    (_put("weight_scale", torch.ones(2, 128)), libqat.FileError, "weight_scale: expected"),
    (_put("weight_zero_point", torch.zeros(8, 2, dtype=torch.int32)), libqat.UnsupportedError, "zero_point"),
    (_weights(num_bits=5), libqat.UnsupportedError, "num_bits"),
    (_weights(num_bits="4"), libqat.UnsupportedError, "num_bits"),
    (_weights(num_bits=4), libqat.FileError, "weight_packed: expected"),
    (_weights(group_size=0), libqat.FileError, "group_size"),
    (_weights(group_size=2**62), libqat.FileError, "group_size"),
    (_weights(symmetric=False), libqat.UnsupportedError, "symmetric"),
    (_weights(type="float"), libqat.UnsupportedError, "type"),
    (_weights(strategy="block"), libqat.UnsupportedError, "strategy"),
    (lambda t, c: _group(c).update(targets=[]), libqat.FileError, "a group of config_groups that means it"),
    (lambda t, c: _group(c).update(targets=5), libqat.FileError, "targets"),
    (lambda t, c: _group(c).update(targets=["re:(" * 9]), libqat.UnsupportedError, "regular expressions"),
    (lambda t, c: _group(c).update(targets=["re:(a{1,900}){1,900}"]), libqat.UnsupportedError, "regular"),
    (lambda t, c: _group(c).update(weights=None), libqat.FileError, "weights"),
    (
        lambda t, c: _group(c).update(input_activations={"num_bits": 8, "dynamic": True}),
        libqat.UnsupportedError,
        "activations",
    ),
    (lambda t, c: c["quantization_config"].update(config_groups=[]), libqat.FileError, "config_groups"),
    (lambda t, c: c.update(dtype="int8"), libqat.FileError, "dtype"),
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ct") / "out"
    libqat.export(mixed_compressed_tensors(), folder, target=TARGET)
    return folder


@pytest.mark.parametrize(("change", "error", "message"), BROKEN)
def test_broken_folders_are_refused_by_name(exported, change, error, message):
    with pytest.raises(error, match=message):
        libqat.import_checkpoint(broken(exported, change))


def test_the_first_tensor_without_a_place_is_named(exported):
    def change(tensors, config):
        for layer in range(2):
            tensors[f"model.layers.{layer}.mlp.up_proj.weight_g_idx"] = torch.zeros(64, dtype=torch.int32)
            tensors[f"model.layers.{layer}.self_attn.o_proj.output_scale"] = torch.ones(1)

    folder = broken(exported, change)
    with pytest.raises(libqat.UnsupportedError, match=r"layers\.0\.mlp\.up_proj\.weight_g_idx: expected"):
        libqat.import_checkpoint(folder)
    extra = {d.tensor for d in libqat.verify(folder, mixed_compressed_tensors()) if d.what == "extra"}
    assert extra == {
        f"model.layers.{layer}.{name}"
        for layer in range(2)
        for name in ("mlp.up_proj.weight_g_idx", "self_attn.o_proj.output_scale")
    }


def test_a_tricky_expression_is_no_trap(exported):
    slow = "re:(.*)*(.*)*(.*)*x$"  # exponential for backtracking
    with pytest.raises(libqat.FileError, match="a group of config_groups"):
        libqat.import_checkpoint(broken(exported, lambda t, c: _group(c).update(targets=[slow])))


def test_verify_tells_what_differs(exported):
    checkpoint = mixed_compressed_tensors()
    down, gate = "model.layers.0.mlp.down_proj", "model.layers.0.mlp.gate_proj"

    def change(tensors, config):
        tensors[f"{UP}.weight_packed"][1, 0] ^= 1
        tensors[f"{down}.weight_scale"][2, 1] *= 2
        for part in ("packed", "scale", "shape"):
            del tensors[f"{gate}.weight_{part}"]
        tensors["model.norm.weight"][0] = 3.0
        tensors["surplus"] = torch.zeros(1)
        config["rms_norm_eps"] = 0.5

    found = {(d.tensor, d.what): d.count for d in libqat.verify(broken(exported, change), checkpoint)}
    changed = int((checkpoint.quantized[f"{down}.weight"].codes[2, 64:] != 0).sum())
    assert found.pop((f"{UP}.weight", "values")) in (0, 1)
    assert found == {
        (f"{UP}.weight", "codes"): 1,
        (f"{down}.weight", "scales"): 1,
        (f"{down}.weight", "values"): changed,
        (f"{gate}.weight", "missing"): 1,
        ("model.norm.weight", "values"): 1,
        ("surplus", "extra"): 1,
        ("config.json", "metadata"): 1,
    }
