"""Activations in training: policies, calibration, learned scales, what ships."""

import copy
import json

import pytest
import torch
from conftest import make_llama
from torch import nn

import libqat
from libqat import ops

STATIC = "int8_tensor_static"
BOTH = {"input": STATIC, "output": STATIC}


def policy(batches=2, rule="observed", weight="int8_channel", **keys):
    return {
        "rules": [{"match": ".*", "kind": "linear", "weight": weight} | (keys or BOTH)],
        "activation_scales": {"rule": rule, "batches": batches},
    }


def make(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def batch(seed, scale=1.0):
    return scale * torch.randn(5, 16, generator=torch.Generator().manual_seed(seed))


def static(x, scale):
    return (x / scale).round().clamp(-128, 127) * scale


# ---- policies


def test_policies_name_formats_and_round_trip():
    text = json.dumps(policy(rule="learned") | {"kv_cache": STATIC})
    parsed = libqat.Policy.from_json(text)
    assert parsed.activations([("a", "linear", (4, 32))]) == [(STATIC, STATIC)]
    assert parsed.kv_cache == STATIC
    assert parsed.activation_scales == ("learned", 2)
    assert libqat.Policy.from_json(parsed.to_json()) == parsed
    plain = libqat.Policy.preset("gguf-q4_0")
    assert (plain.kv_cache, plain.activation_scales) == ("", ("observed", 16))
    assert "activation" not in plain.to_json()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": "int7"}, r"rules\[0\].input: expected one of int8_tensor_static, int8_token, q8_0"),
        ({"output": "int8_token"}, r"rules\[0\].output: expected one of int8_tensor_static"),
        ({"weight": "f32"}, r"rules\[0\].input: expected no such key for the float grid f32"),
    ],
)
def test_rules_refuse_what_no_consumer_computes(change, message):
    broken = policy()
    broken["rules"][0] |= change
    with pytest.raises(libqat.ArgumentError, match=message):
        libqat.Policy.from_json(json.dumps(broken))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kv_cache": "q8_0"}, "kv_cache: expected one of int8_tensor_static"),
        ({"activation_scales": {"rule": "guessed"}}, "activation_scales.rule: expected one of observed"),
        ({"activation_scales": {"batches": -1}}, "activation_scales.batches: expected a whole number"),
        ({"activation_scales": {"steps": 1}}, "activation_scales: expected only the keys rule, batches"),
    ],
)
def test_policies_refuse_other_settings(keys, message):
    with pytest.raises(libqat.ArgumentError, match=message):
        libqat.Policy.from_json(json.dumps(policy() | keys))


@pytest.mark.parametrize("name", ["gemma4-e2b-mobile", "gemma4-e4b-mobile"])
def test_mobile_presets_round_inputs_outputs_keys_and_values(name):
    """Of every quantized layer; the table that only tokens are looked up in has no product."""
    preset = libqat.Policy.preset(name)
    assert preset.kv_cache == STATIC
    layer = "model.layers.20."
    linears = ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj", "per_layer_input_gate"]
    tensors = [(layer + linear, "linear", (256, 256)) for linear in linears]
    tensors += [("model.layers.2.mlp.up_proj", "linear", (256, 256)), ("lm_head", "linear", (256, 256))]
    tensors += [("model.embed_tokens", "embedding", (256, 256))]
    assert set(preset.activations(tensors)) == {(STATIC, STATIC)}
    table = ("model.embed_tokens_per_layer", "embedding", (256, 256))
    assert preset.activations([*tensors, table])[-1] == ("", "")


# ---- calibration


def test_scales_are_those_of_the_first_training_batches():
    prepared = libqat.prepare(make(), policy())
    model = prepared.model
    model.eval()
    model(batch(9, 100.0))
    assert set(prepared.activation_scales().values()) == {0.0}
    model.train()
    seen = [batch(0), batch(1, 3.0), batch(2, 50.0)]
    for x in seen:
        model(x)
    scales = prepared.activation_scales()
    largest = torch.stack(seen[:2]).abs().max()
    assert scales["0.input_activation_scale"] == (largest.double() / 127).float().item()
    assert all(scale > 0 for scale in scales.values())
    model(batch(3, 500.0))
    assert prepared.activation_scales() == scales


def test_forward_is_the_closed_formula():
    prepared = libqat.prepare(make(), policy(batches=1))
    model = prepared.model
    model(batch(0))
    scales = prepared.activation_scales()
    first, _, second = model
    x = batch(4)
    hidden = static(x, scales["0.input_activation_scale"])
    hidden = torch.nn.functional.linear(hidden, first.fake_quantized(), first.bias)
    hidden = static(hidden, scales["0.output_activation_scale"]).relu()
    out = torch.nn.functional.linear(
        static(hidden, scales["2.input_activation_scale"]), second.fake_quantized(), second.bias
    )
    # one product may be summed in another order
    assert torch.allclose(model(x), static(out, scales["2.output_activation_scale"]), atol=1e-6)
    with prepared.enabled(False):
        assert torch.equal(model(x), copy.deepcopy(libqat.unprepare(model))(x))


def test_calibration_on_request_counts_nothing_else():
    prepared = libqat.prepare(make(), policy(batches=0)).model.eval()
    view = libqat.PreparedModel(prepared)
    prepared(batch(0))
    assert set(view.activation_scales().values()) == {0.0}
    with view.calibrating(), torch.no_grad():
        prepared(batch(0))
        prepared(batch(1, 2.0))
    largest = torch.stack([batch(0), batch(1, 2.0)]).abs().max()
    assert view.activation_scales()["0.input_activation_scale"] == (largest.double() / 127).float().item()


def test_recomputed_forward_passes_are_not_counted_again():
    from torch.utils.checkpoint import checkpoint

    model = libqat.prepare(make(), policy(batches=10)).model
    checkpoint(model, batch(0).requires_grad_(), use_reentrant=False).sum().backward()
    assert model[0].input_activation_scale_batches.item() == 1


def test_nan_is_refused_while_calibrating():
    model = libqat.prepare(make(), policy()).model
    with pytest.raises(libqat.NumericError, match=r"0\.input_activation_scale: expected finite"):
        model(torch.full((2, 16), float("nan")))


def test_dynamic_formats_have_no_scale():
    prepared = libqat.prepare(make(), policy(input="int8_token"))
    x = batch(0)
    linear = prepared.model[0]
    expected = torch.nn.functional.linear(
        ops.fake_quantize_activation(x, "int8_token"), linear.fake_quantized(), linear.bias
    )
    assert torch.allclose(linear(x), expected, atol=1e-6)  # summed in another order
    assert prepared.activation_scales() == {}
    assert [key for key in prepared.model.state_dict() if "activation" in key] == []


# ---- learned scales


def test_learned_scales_start_where_calibration_ends_and_train():
    prepared = libqat.prepare(make(), policy(batches=1, rule="learned"))
    model = prepared.model
    names = {name for name in prepared.scale_parameters() if "activation" in name}
    assert len(names) == 4
    with pytest.raises(libqat.ArgumentError, match="expected a calibrated scale, got 0"):
        libqat.parameter_groups(prepared, 1e-3, 1e-2)
    model(batch(0)).sum().backward()
    assert all(model.get_parameter(name).grad is None for name in names)  # while it calibrates
    before = prepared.activation_scales()
    optimizer = torch.optim.AdamW(libqat.parameter_groups(prepared, 1e-3, 1e-2))
    for step in range(3):
        optimizer.zero_grad()
        model(batch(step)).square().sum().backward()
        optimizer.step()
    after = prepared.activation_scales()
    for name in names:
        assert before[name] != after[name]
        # three steps of Adam at a relative rate of 1e-2
        assert abs(after[name] / before[name] - 1) < 0.05


def run(model, optimizer, steps):
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = model(batch(step)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("rule", ["observed", "learned"])
def test_a_resumed_run_is_the_same_bit_for_bit(rule):
    """The state is saved in the middle of calibration."""

    def start():
        model = libqat.prepare(make(), policy(batches=4, rule=rule)).model
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3)

    straight, optimizer = start()
    expected = run(straight, optimizer, range(7))
    first, optimizer = start()
    run(first, optimizer, range(2))
    state = copy.deepcopy((first.state_dict(), optimizer.state_dict()))
    second, optimizer = start()
    run(second, optimizer, range(20, 26))  # another past, which loading must undo
    second.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    assert run(second, optimizer, range(2, 7)) == expected[2:]
    for key, tensor in straight.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[key]), key


def test_casting_keeps_scales_in_float32():
    with pytest.warns(UserWarning, match="latents"):
        model = libqat.prepare(make(), policy(batches=1)).model.bfloat16()
    out = model(batch(0).bfloat16())
    assert out.dtype == torch.bfloat16
    assert model[0].input_activation_scale.dtype == torch.float32


def test_models_are_copied_and_pickled_with_their_scales():
    import io

    model = libqat.prepare(make(), policy(batches=1)).model
    model(batch(0))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(other(batch(1)), model(batch(1)))
        other.load_state_dict(libqat.prepare(make(1), policy(batches=1)).model.state_dict())
        other(batch(5))  # calibrates anew
        assert other[0].input_activation_scale_batches.item() == 1


def test_compiled_models_calibrate_and_then_stay_one_graph():
    model = libqat.prepare(make(), policy(batches=2)).model
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager")
    for step in range(4):
        # the same operators, so the same numbers
        assert torch.equal(compiled(batch(step)), plain(batch(step)))
    assert model[0].input_activation_scale_batches.item() == 2


# ---- what ships


def test_freezing_keeps_scales_by_their_names_and_no_counts(tmp_path):
    prepared = libqat.prepare(make(), policy(batches=1))
    prepared.model(batch(0))
    checkpoint = libqat.freeze(prepared)
    scales = {key: value for key, value in checkpoint.floats.items() if "activation" in key}
    assert {key: value.item() for key, value in scales.items()} == prepared.activation_scales()
    assert all(value.shape == () and value.dtype == torch.float32 for value in scales.values())
    assert not [key for key in checkpoint.floats if "batches" in key]
    libqat.save(checkpoint, tmp_path / "a.qat.safetensors")
    assert libqat.verify(tmp_path / "a.qat.safetensors", checkpoint) == []
    [row, *_] = prepared.report()
    assert (row.input, row.output) == (STATIC, STATIC)
    assert "in/out int8_tensor_static" in str(prepared.report())
    back = libqat.unprepare(prepared)
    assert sorted(back.state_dict()) == sorted(make().state_dict())


def test_a_tied_head_rounds_and_the_embedding_does_not():
    model = make_llama().eval()
    rules = [{"match": "model\\.embed_tokens", "weight": "mobile8"} | BOTH]
    prepared = libqat.prepare(model, {"rules": rules, "activation_scales": {"batches": 0}})
    tokens = torch.arange(12)[None]
    with prepared.calibrating(), torch.no_grad():
        model(tokens)
    assert set(prepared.activation_scales()) == {
        "lm_head.input_activation_scale",
        "lm_head.output_activation_scale",
    }
    embedded = model.model.embed_tokens(tokens)
    assert torch.equal(embedded, model.model.embed_tokens.fake_quantized()[tokens])
