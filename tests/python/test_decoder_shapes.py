"""libqat's decoder against transformers, for every shape of model: logits, gradients, names, decoding."""

import json

import pytest
import torch
from decoder_shapes import SHAPES, make, tokens_for
from safetensors.torch import load_file, save_file

import libqat
from libqat import _core

# Two float32 implementations of the same sums in another order. Observed differences are below 2e-6 of the
# largest logit, and below 1e-5 of the largest entry of each gradient. The bounds leave a factor of ten.
LOGITS = 2e-5
GRADIENTS = 1e-4


@pytest.fixture(params=SHAPES)
def pair(request, tmp_path):
    reference = make(request.param)
    reference.save_pretrained(tmp_path)
    return reference, libqat.load_model(tmp_path).decoder


def relative(got, expected):
    return ((got - expected).abs().max() / expected.abs().max()).item()


def test_logits_equal_transformers(pair):
    reference, decoder = pair
    tokens = tokens_for(reference)
    with torch.no_grad():
        expected = reference(tokens).logits
        logits = decoder(tokens)
    assert expected.std() > 0.3  # logits of 0 would agree with anything
    assert relative(logits, expected) < LOGITS


def test_gradients_equal_transformers(pair):
    reference, decoder = pair
    tokens = tokens_for(reference)
    for logits in (reference(tokens).logits, decoder(tokens)):
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    parameters = decoder.parameters()
    assert set(parameters) == {name for name, _ in reference.named_parameters()}
    for name, parameter in reference.named_parameters():
        assert parameter.grad.abs().max() > 1e-7, name  # zeros would agree with anything
        assert relative(parameters[name].grad, parameter.grad) < GRADIENTS, name


def test_decoding_with_a_cache_equals_one_pass(pair):
    reference, decoder = pair
    tokens = tokens_for(reference)
    cache = decoder.new_cache()
    pieces = torch.split(tokens, [11, 1, 1, 5, 1, 10], dim=1)
    logits = torch.cat([decoder(piece, cache) for piece in pieces], dim=1)
    assert cache.length == tokens.shape[1]
    with torch.no_grad():
        assert relative(logits, decoder(tokens)) < LOGITS


def test_names_and_shapes_are_known_without_memory(pair):
    reference, decoder = pair
    known = {name: shape for name, shape, _, _ in _core.parameter_shapes(reference.config.to_json_string())}
    tensors = decoder.parameters() | decoder.buffers()
    assert known == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    stored = set(reference.state_dict()) - {"lm_head.weight"} | {
        name for name, _ in reference.named_parameters()
    }
    assert set(known) == stored
    for name, tensor in decoder.buffers().items():
        assert torch.equal(tensor, reference.state_dict()[name])


def test_every_matrix_takes_a_grid(pair):
    """Tables and stacks of experts too; with the same numbers, transformers computes the same."""
    reference, decoder = pair
    rules = [
        {"match": r".*router\.proj", "weight": "f32", "optional": True},
        {"match": ".*", "weight": "q4_0"},
    ]
    prepared = libqat.prepare(decoder, {"rules": rules})
    state = reference.state_dict()
    report = {line.name: line for line in prepared.report()}
    for name, tensor in state.items():
        if name in report and tensor.dim() > 1 and "router" not in name:
            assert report[name].grid == "q4_0", name
            tensor.copy_(libqat.ops.fake_quantize(tensor.flatten(0, -2), "q4_0").view_as(tensor))
    tokens = tokens_for(reference)
    with torch.no_grad():
        assert relative(decoder(tokens), reference(tokens).logits) < LOGITS


def test_files_of_models_with_more_than_text(tmp_path):
    """The decoder lies under another name, its configuration is nested, and layers that share keys carry dead
    ones of their own."""
    reference = make("gemma4 E2B")
    reference.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    outer = {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": "gemma4",
        "text_config": config,
        "tie_word_embeddings": True,
        "vision_config": {"model_type": "gemma4_vision"},
    }
    (tmp_path / "config.json").write_text(json.dumps(outer))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {key.replace("model.", "model.language_model.", 1): tensor for key, tensor in tensors.items()}
    tensors["model.vision_tower.patch_embedder.input_proj.weight"] = torch.zeros(4, 4)
    dead = "model.language_model.layers.5.self_attn."
    tensors |= {dead + "k_proj.weight": torch.zeros(32, 64), dead + "k_norm.weight": torch.zeros(32)}
    save_file(tensors, tmp_path / "model.safetensors")
    loaded = libqat.load_model(tmp_path)
    assert json.loads(loaded.config)["architectures"] == ["Gemma4ForCausalLM"]
    assert json.loads(loaded.config)["model_type"] == "gemma4_text"
    tokens = tokens_for(reference)
    with torch.no_grad():
        assert relative(loaded.decoder(tokens), reference(tokens).logits) < LOGITS


def test_older_spellings_of_gemma3(tmp_path):
    """As files of early 2025: no list of layers, a rope for full layers and a base for the others."""
    reference = make("gemma3 27B")
    reference.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["layer_types"], config["rope_parameters"]
    config |= {
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window_pattern": 6,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokens = tokens_for(reference)
    with torch.no_grad():
        assert relative(libqat.load_model(tmp_path).decoder(tokens), reference(tokens).logits) < LOGITS


def test_published_spellings_of_gemma4(tmp_path):
    """Flat fields for full layers, where transformers writes a table; null for what is absent."""
    reference = make("gemma4 31B")
    reference.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "global_head_dim" not in config
    del config["per_layer_config"]
    config |= {
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
        "num_experts": None,
        "top_k_experts": None,
        "moe_intermediate_size": None,
        "use_bidirectional_attention": "vision",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokens = tokens_for(reference)
    with torch.no_grad():
        assert relative(libqat.load_model(tmp_path).decoder(tokens), reference(tokens).logits) < LOGITS
