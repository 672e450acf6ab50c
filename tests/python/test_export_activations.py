"""Static activation scales in exported folders: consumers load them and compute what was trained."""

import json
import warnings

import pytest
import torch
from conftest import make_llama
from decoder_shapes import make, tokens_for
from exporting import broken, read_folder

import libqat

STATIC = "int8_tensor_static"
BOTH = {"input": STATIC, "output": STATIC}


def calibrated(model, rules, kv_cache=False):
    policy = {"rules": rules, "activation_scales": {"batches": 0}} | (
        {"kv_cache": STATIC} if kv_cache else {}
    )
    view = libqat.prepare(model.eval(), policy)
    with view.calibrating(), torch.no_grad():
        model(tokens_for(model))
    return view


def mobile_rules():
    return [
        {"match": ".*embed_tokens(_per_layer)?", "weight": "mobile4"} | BOTH,
        {"match": ".*per_layer_(input_gate|projection)", "weight": "mobile8", "optional": True} | BOTH,
        {"match": ".*self_attn\\..*_proj", "weight": "mobile4"} | BOTH,
        {"match": ".*layers\\.[01]\\.mlp\\..*_proj", "weight": "mobile4"} | BOTH,
        {"match": ".*mlp\\..*_proj", "weight": "mobile2"} | BOTH,
    ]


@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma4 E2B"])
def test_transformers_computes_what_was_trained(tmp_path, name):
    from transformers import AutoModelForCausalLM

    model = make(name)
    view = calibrated(model, mobile_rules(), kv_cache=name == "gemma4 E2B")
    checkpoint = libqat.freeze(view)
    libqat.export(checkpoint, tmp_path / "out", target="gemma-mobile", tokenizer_from="none")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    scales = view.activation_scales()
    layers = {key: value for key, value in scales.items() if "cache" not in key}
    for key, scale in layers.items():
        assert loaded.state_dict()[key].item() == scale > 0, key
    tokens = tokens_for(model)
    # transformers rounds no keys and values
    for module in model.modules():
        if type(module).__name__ == "KvCacheRounding":
            for rounding in module.activation_roundings.values():
                rounding.enabled = False
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tokens).logits, model(tokens).logits)
    assert libqat.verify(tmp_path / "out", checkpoint) == []
    stored = read_folder(tmp_path / "out")
    cache = {key: stored[key].item() for key in stored if "cache_scale" in key}
    assert cache == {key: value for key, value in scales.items() if "cache" in key}
    again = libqat.import_checkpoint(tmp_path / "out")
    assert {k: v.item() for k, v in again.floats.items() if k in scales} == scales
    assert libqat.verify(tmp_path / "out", again) == []


def test_transformers_in_bfloat16(tmp_path):
    from transformers import AutoModelForCausalLM

    make("llama").save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    view = calibrated(model, [{"match": ".*_proj", "weight": "mobile4@bf16:bf16"} | BOTH])
    libqat.export(libqat.freeze(view), tmp_path / "out", target="gemma-mobile", tokenizer_from="none")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = tokens_for(model)
    with torch.no_grad():
        assert loaded.dtype == torch.bfloat16
        assert torch.equal(loaded.eval()(tokens).logits, model(tokens).logits)


def ct_rules(**extra):
    return [
        {"match": ".*layers\\.0\\..*_proj", "weight": "int4_g32"} | BOTH,
        {"match": ".*self_attn\\..*_proj", "weight": "int4_g32", "input": STATIC},
        {"match": ".*_proj", "weight": "int8_channel"} | extra,
    ]


def test_compressed_tensors_with_static_activations(tmp_path):
    from transformers import AutoModelForCausalLM

    model = make_llama(tied=False)
    view = calibrated(model, ct_rules())
    checkpoint = libqat.freeze(view)
    libqat.export(checkpoint, tmp_path / "out", target="compressed-tensors", tokenizer_from="none")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    groups = config["config_groups"].values()
    kinds = {(bool(g["input_activations"]), bool(g["output_activations"])) for g in groups}
    assert kinds == {(True, True), (True, False), (False, False)}
    assert all(g["input_activations"] is None or not g["input_activations"]["dynamic"] for g in groups)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    tokens = tokens_for(model)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tokens).logits, model(tokens).logits)
    assert libqat.verify(tmp_path / "out", checkpoint) == []
    again = libqat.import_checkpoint(tmp_path / "out")
    scales = view.activation_scales()
    assert {k: v.item() for k, v in again.floats.items() if "activation" in k} == scales
    libqat.export(again, tmp_path / "again", target="compressed-tensors")
    for path in (tmp_path / "out").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_wrong_scale_is_a_difference(tmp_path):
    view = calibrated(make_llama(tied=False), ct_rules())
    checkpoint = libqat.freeze(view)
    for target, name in (
        ("compressed-tensors", "model.layers.0.mlp.up_proj.input_scale"),
        ("gemma-mobile", "model.layers.0.mlp.up_proj.input_activation_scale"),
    ):
        if target == "gemma-mobile":
            rules = [{"match": ".*_proj", "weight": "mobile4"} | BOTH]
            checkpoint = libqat.freeze(calibrated(make_llama(tied=False), rules))
        libqat.export(checkpoint, tmp_path / target, target=target, tokenizer_from="none")

        def change(tensors, config, name=name):
            tensors[name] = tensors[name] * 1.5

        [difference] = libqat.verify(broken(tmp_path / target, change), checkpoint)
        assert difference.tensor == "model.layers.0.mlp.up_proj.input_activation_scale"
        assert difference.what == "values"

        def spoil(tensors, config, name=name):
            tensors[name] = torch.tensor(float("nan"))

        with pytest.raises(libqat.FileError, match="one finite number"):
            libqat.import_checkpoint(broken(tmp_path / target, spoil))


BAD_GROUPS = [
    ({"dynamic": True}, "input_activations.dynamic"),
    ({"num_bits": 4}, "input_activations.num_bits"),
    ({"strategy": "token"}, "input_activations.strategy"),
    ({"symmetric": False}, "input_activations.symmetric"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_GROUPS)
def test_other_activations_of_compressed_tensors_are_refused(tmp_path, changes, message):
    checkpoint = libqat.freeze(calibrated(make_llama(tied=False), ct_rules()))
    libqat.export(checkpoint, tmp_path / "out", target="compressed-tensors", tokenizer_from="none")

    def change(tensors, config):
        for group in config["quantization_config"]["config_groups"].values():
            if group["input_activations"]:
                group["input_activations"] |= changes

    with pytest.raises(libqat.UnsupportedError, match=message):
        libqat.import_checkpoint(broken(tmp_path / "out", change))


@pytest.mark.parametrize("target", ["gguf", "hf", "mlx", "compressed-tensors"])
def test_what_has_no_place_is_left_out_with_a_warning(tmp_path, target):
    grid = {"gguf": "q8_0", "hf": "q8_0", "mlx": "mlx8_g32", "compressed-tensors": "int8_channel"}[target]
    rules = [{"match": ".*_proj", "weight": grid} | BOTH]
    checkpoint = libqat.freeze(calibrated(make_llama(tied=False), rules, kv_cache=True))
    dropped = libqat.left_out(checkpoint, target)
    caches = [key for key in dropped if "cache" in key]
    assert len(caches) == 4
    assert len(dropped) == (4 if target == "compressed-tensors" else 4 + 2 * 2 * 7)
    assert libqat.left_out(checkpoint, "gemma-mobile") == []
    path = tmp_path / ("out.gguf" if target == "gguf" else "out")
    with pytest.warns(UserWarning, match=f"target {target} has no place for static activation scales"):
        libqat.export(checkpoint, path, target=target, tokenizer_from="none")
    assert libqat.verify(path, checkpoint) == []


def test_nothing_left_out_needs_no_warning(tmp_path):
    checkpoint = libqat.freeze(calibrated(make_llama(tied=False), ct_rules()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        libqat.export(checkpoint, tmp_path / "out", target="compressed-tensors", tokenizer_from="none")
