"""Keys and values as an 8-bit cache keeps them, in Hugging Face models and in libqat's decoder."""

import copy
import io

import pytest
import torch
from conftest import make_llama
from decoder_shapes import make, tokens_for

import libqat

POLICY = {"rules": [], "kv_cache": "int8_tensor_static", "activation_scales": {"batches": 0}}


def prepared(model, **changes):
    view = libqat.prepare(model, POLICY | changes)
    with view.calibrating(), torch.no_grad():
        model(tokens_for(model))
    return view


def static(x, scale):
    return (x / scale).round().clamp(-128, 127) * scale


class Seen:
    """What attention functions get, and how far keys and values were from their rounding."""

    def __init__(self, monkeypatch, name):
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        own = ALL_ATTENTION_FUNCTIONS[name]
        self.calls = []

        def attention(module, query, key, value, *args, **kwargs):
            self.calls.append((module, key, value))
            return own(module, query, key, value, *args, **kwargs)

        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name, attention)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gemma4 E2B", "gemma4 31B"])
def test_attention_reads_keys_and_values_on_the_grid(monkeypatch, name):
    model = make(name)
    tokens = tokens_for(model)
    seen = Seen(monkeypatch, "sdpa")
    with torch.no_grad():
        model(tokens)
    plain, seen.calls = seen.calls, []
    view = prepared(model)
    scales = view.activation_scales()
    seen.calls.clear()
    with torch.no_grad():
        model(tokens)
    names = {module: path for path, module in model.named_modules()}
    assert len(seen.calls) == model.config.num_hidden_layers == len(scales) / 2
    first = scales[f"{names[plain[0][0]]}.k_cache_scale"]
    assert torch.equal(seen.calls[0][1], static(plain[0][1], torch.tensor(first)))
    for module, key, value in seen.calls:
        for tensor, part in ((key, "k"), (value, "v")):
            codes = tensor / scales[f"{names[module]}.{part}_cache_scale"]
            assert (codes - codes.round()).abs().max() < 1e-3  # one division and one product in float32
            # calibration saw the same tokens: the largest is code 127
            assert codes.abs().max().round() == 127


def test_layers_that_share_keys_share_scales():
    model = make("gemma4 E2B")
    scales = prepared(model).activation_scales()
    layers = model.model.layers
    shared = [i for i, layer in enumerate(layers) if layer.self_attn.is_kv_shared_layer]
    assert len(shared) == 3
    for i in shared:
        kind = layers[i].self_attn.layer_type
        owner = max(
            j for j, layer in enumerate(layers) if j not in shared and layer.self_attn.layer_type == kind
        )
        for part in ("k", "v"):
            name = "model.layers.{}.self_attn." + f"{part}_cache_scale"
            assert scales[name.format(i)] == scales[name.format(owner)] > 0
    frozen = libqat.freeze(libqat.PreparedModel(model)).floats
    assert {key: value.item() for key, value in frozen.items() if "cache_scale" in key} == scales
    assert not [key for key in frozen if "kv_cache" in key]


@pytest.mark.parametrize("name", ["llama", "gemma4 E2B"])
def test_a_cache_gives_what_a_full_forward_pass_does(name):
    model = make(name)
    prepared(model)
    tokens = tokens_for(model, batch=1, length=12)
    with torch.no_grad():
        full = model(tokens).logits
        first = model(tokens[:, :7], use_cache=True)
        cache, steps = first.past_key_values, [first.logits]
        for i in range(7, 12):
            step = model(tokens[:, i : i + 1], past_key_values=cache, use_cache=True)
            steps.append(step.logits)
    # products of other shapes, and a rounding border crossed now and then
    assert (torch.cat(steps, 1) - full).abs().max() < 0.02


def test_the_implementation_can_still_be_changed():
    model = make_llama().eval()
    prepared(model)
    tokens = tokens_for(model)
    with torch.no_grad():
        sdpa = model(tokens).logits
        model.set_attn_implementation("eager")
        eager = model(tokens).logits
    assert torch.allclose(sdpa, eager, atol=1e-4)  # the same sums in another order, small logits
    assert model.config._attn_implementation == "eager"
    assert "libqat" not in model.config.to_json_string()


def test_unprepared_copied_and_disabled():
    model = make_llama().eval()
    tokens = tokens_for(model)
    with torch.no_grad():
        plain = model(tokens).logits
        view = prepared(model)
        rounded = model(tokens).logits
        assert not torch.equal(plain, rounded)
        with view.enabled(False):
            assert torch.equal(model(tokens).logits, plain)
        other = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for copied in (other, torch.load(file, weights_only=False)):
            assert torch.equal(copied(tokens).logits, rounded)
        assert other.model.layers[0].self_attn.config.own is other.config
        assert torch.equal(libqat.unprepare(model)(tokens).logits, plain)
        assert torch.equal(other(tokens).logits, rounded)
    assert model.model.layers[0].self_attn.config is model.config


def test_learned_scales_get_gradients_from_every_reader():
    model = make("gemma4 E2B")
    changes = {"activation_scales": {"rule": "learned", "batches": 0}}
    view = prepared(model, **changes)
    model(tokens_for(model)).logits.square().mean().backward()
    scales = view.scale_parameters()
    assert len(scales) == 2 * 3
    assert all(scale.grad.abs() > 0 for scale in scales.values())
    model.bfloat16()
    assert all(scale.dtype == torch.float32 for scale in scales.values())


@pytest.mark.parametrize("rule", ["observed", "learned"])
def test_training_calibrates_each_owner_once_a_pass(rule):
    """Readers of shared keys show them to no one again, and backward finds the scales of its own pass."""
    model = make("gemma4 E2B").train()
    view = libqat.prepare(model, POLICY | {"activation_scales": {"rule": rule, "batches": 3}})
    tokens = tokens_for(model)
    for batches in (2, 3, 3):
        losses = [model(tokens).logits.square().mean()]
        if batches == 2:  # two passes before their backward
            losses.append(model(tokens.flip(1)).logits.square().mean())
        sum(losses).backward()
        counts = {value.item() for key, value in model.state_dict().items() if key.endswith("_batches")}
        assert counts == {batches}
    assert all(scale > 0 for scale in view.activation_scales().values())


def test_other_models_are_refused():
    with pytest.raises(libqat.UnsupportedError, match="kv_cache: expected a Hugging Face model"):
        libqat.prepare(torch.nn.Linear(4, 4), POLICY)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma4 E2B", "gemma4 31B"])
def test_the_decoder_rounds_the_same(tmp_path, name):
    model = make(name)
    view = prepared(model)
    tokens = tokens_for(model, length=16)
    libqat.unprepare(copy.deepcopy(model)).save_pretrained(tmp_path)
    decoder = libqat.load_model(tmp_path).decoder
    ours = libqat.prepare(decoder, POLICY)
    ours.set_calibrating(True)
    decoder(tokens_for(model))
    ours.set_calibrating(False)
    expected, got = view.activation_scales(), ours.activation_scales()
    own = {key for key in expected if key in got}
    assert len(own) == len(got)
    for key in own:
        # float32 sums in another order, and a rounding border crossed now and then in the layers before
        assert got[key] == pytest.approx(expected[key], rel=2e-3)
    with torch.no_grad():
        # a rounding border crossed now and then
        assert (decoder(tokens) - model(tokens).logits).abs().max() < 0.02
    frozen = ours.freeze().floats
    assert {key for key in frozen if "cache_scale" in key} == set(expected)
    cache = decoder.new_cache()
    with torch.no_grad():
        steps = [decoder(tokens[:, :9], cache)] + [decoder(tokens[:, i : i + 1], cache) for i in range(9, 16)]
        assert (torch.cat(steps, 1) - decoder(tokens)).abs().max() < 0.02
