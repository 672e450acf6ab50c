"""Scaled rotary embeddings: against transformers, in both spellings of a configuration, and through GGUF."""

import json

import gguf
import numpy as np
import pytest
import torch
from conftest import make_llama
from exporting import checkpoint_of, log_probabilities, make_kind
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import libqat
from libqat import _core, llama_cpp

# Two float32 implementations of the same sums in another order, as in test_models.py; the frequencies differ
# by a rounding of 6e-8, which 160 positions make an angle of 1e-5.
LOGITS = {"atol": 3e-4, "rtol": 1e-4}
CONTEXT = 160  # ten times what the tiny models were "trained" on

SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "llama3 with other factors": {
        "rope_type": "llama3",
        "factor": 3.0,
        "low_freq_factor": 1.5,
        "high_freq_factor": 5.0,
        "original_max_position_embeddings": 100,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn with everything": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "attention_factor": 1.3,
    },
    "yarn with mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "mscale": 0.7,
        "mscale_all_dim": 1.4,
    },
}
with_scalings = pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)


def make(scaling, theta=10000.0, **changes):
    settings = {
        "hidden_size": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": 0.1,
    }
    rope = {"rope_theta": theta} | scaling
    return make_llama(rope_parameters=rope, max_position_embeddings=CONTEXT, **(settings | changes)).eval()


def tokens(length=CONTEXT, vocabulary=320):
    return torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(1))


@with_scalings
@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling", "rope_scaling.type"])
def test_logits_equal_transformers(tmp_path, scaling, spelling):
    reference = make(scaling, theta=5000.0)
    reference.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    assert config["rope_parameters"]["rope_type"] == scaling["rope_type"]
    if spelling != "rope_parameters":
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        if spelling == "rope_scaling.type":
            rope["type"] = rope.pop("rope_type")
        path.write_text(json.dumps(config | {"rope_scaling": rope}))
    with torch.no_grad():
        expected = reference(tokens()).logits
        torch.testing.assert_close(libqat.load_model(tmp_path).decoder(tokens()), expected, **LOGITS)
        plain = make({"rope_type": "default"}, theta=5000.0)
        plain.load_state_dict(reference.state_dict())
        difference = (plain(tokens()).logits - expected).abs().max()
    assert difference > 100 * LOGITS["atol"], "the scaling does not matter here"


@pytest.mark.parametrize("name", [name for name in SCALINGS if name != "yarn with everything"])
def test_what_is_exported_is_what_is_loaded_again(tmp_path, name):
    """A GGUF holds divisors, not the parameters behind them; those that are found give the same model."""
    scaling = SCALINGS[name]
    reference = make(scaling, theta=5000.0)
    checkpoint = checkpoint_of(reference, grid="f32", embedding="f32")
    libqat.export(checkpoint, tmp_path / "a.gguf")
    assert libqat.verify(tmp_path / "a.gguf", checkpoint) == []
    loaded = libqat.load_model(tmp_path / "a.gguf")
    twin = LlamaForCausalLM(LlamaConfig(**json.loads(loaded.config))).eval()
    twin.load_state_dict(reference.state_dict())
    with torch.no_grad():
        expected = reference(tokens()).logits
        torch.testing.assert_close(loaded.decoder(tokens()), expected, **LOGITS)
        torch.testing.assert_close(twin(tokens()).logits, expected, **LOGITS)
    found = json.loads(loaded.config)["rope_parameters"]
    if name == "llama3":
        assert found == scaling | {"rope_theta": 5000.0}


@pytest.mark.skipif(not llama_cpp.available(), reason="needs xllamacpp: pip install xllamacpp")
@pytest.mark.parametrize("name", ["linear", "llama3", "yarn", "yarn with mscale"])
def test_llama_cpp_computes_the_same_beyond_the_original_context(tmp_path, name):
    vocabulary = 400
    scaling = SCALINGS[name]
    make_kind("smollm", vocabulary).save(str(tmp_path / "tokenizer.json"))
    model = make(scaling, vocab_size=vocabulary)
    checkpoint = checkpoint_of(model, grid="f32", embedding="f32", tokenizer=tmp_path)
    libqat.export(checkpoint, tmp_path / "a.gguf")
    ids = tokens(vocabulary=vocabulary)[0].tolist()
    scores = np.array(llama_cpp.score(tmp_path / "a.gguf", ids))
    expected = log_probabilities(model, ids)
    # Only the float16 key-value cache differs (2^-12 relative); see test_llama_cpp.py.
    bound = 0.003 * expected.std()
    beyond = slice(100, None)
    assert np.sqrt(np.mean((scores - expected)[beyond] ** 2)) < bound
    plain = make({"rope_type": "default"}, vocab_size=vocabulary)
    plain.load_state_dict(model.state_dict())
    assert np.sqrt(np.mean((scores - log_probabilities(plain, ids))[beyond] ** 2)) > 10 * bound


def published(head_dim, theta, factor, low, high, context):
    """Divisors as llama.cpp's converter writes them: wavelengths in float32."""
    frequencies = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    divisors = []
    for frequency in frequencies:
        wavelength = 2 * torch.pi / frequency
        if wavelength < context / high:
            divisors.append(1)
        elif wavelength > context / low:
            divisors.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


@pytest.mark.parametrize(
    ("head_dim", "factor"), [(64, 32.0), (128, 8.0)], ids=["Llama 3.2 1B and 3B", "Llama 3.1 8B"]
)
def test_the_parameters_of_published_models_are_found(tmp_path, head_dim, factor):
    divisors = published(head_dim, 500000.0, factor, 1.0, 4.0, 8192)
    assert len(set(divisors.tolist()) - {1.0, factor}) >= 3
    rope = rope_of(tmp_path, divisors, head_dim, 500000.0)
    assert rope == {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "original_max_position_embeddings": 8192,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }


@pytest.mark.parametrize("divisors", [[1, 1, 1, 5, 8, 8, 8, 8], [1, 1, 8, 8, 8, 8, 8, 8], [3] * 8, [1] * 8])
def test_any_parameters_that_give_the_divisors_will_do(tmp_path, divisors):
    rope = rope_of(tmp_path, np.array(divisors, np.float32), 16, 10000.0)
    config = LlamaConfig(
        hidden_size=16, num_attention_heads=1, max_position_embeddings=4096, rope_parameters=rope
    )
    plain = 10000.0 ** -(np.arange(0, 16, 2) / 16)
    if rope["rope_type"] == "default":
        assert divisors == [1] * 8
        return
    frequencies, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu")
    assert factor == 1
    np.testing.assert_allclose(plain / frequencies.numpy(), divisors, rtol=1e-6)  # float32 there


@pytest.mark.parametrize(
    "divisors", [[1, 2, 3, 4, 5, 6, 7, 8], [8, 8, 8, 8, 1, 1, 1, 1], [0] * 8, [1, 1, 1, 1, 1, 1, 1, np.nan]]
)
def test_other_divisors_are_refused(tmp_path, divisors):
    with pytest.raises(libqat.UnsupportedError, match=r"a\.gguf: rope_freqs\.weight: expected the divisors"):
        rope_of(tmp_path, np.array(divisors, np.float32), 16, 10000.0)


def rope_of(folder, divisors, head_dim, theta):
    """What `load_model` makes of a file with these divisors."""
    model = make_llama(
        hidden_size=head_dim, num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=4096
    )
    libqat.export(checkpoint_of(model, grid="f32", embedding="f32"), folder / "plain.gguf")
    rewrite(folder / "plain.gguf", folder / "a.gguf", {"llama.rope.freq_base": theta}, divisors)
    return json.loads(libqat.load_model(folder / "a.gguf").config)["rope_parameters"]


def rewrite(source, target, keys, divisors=None):
    """The same GGUF with other keys, and divisors of the rotary embedding."""
    writer = gguf.GGUFWriter(target, "llama")
    reader = gguf.GGUFReader(source)
    kept = {
        name: field.contents()
        for name, field in reader.fields.items()
        if name.startswith("llama.") and name not in keys
    }
    for key, value in (kept | keys).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(key, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", divisors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"type": "longrope"},
            r'llama\.rope\.scaling\.type: expected "none", "linear" or "yarn", got "longrope"',
        ),
        (
            {"type": "yarn", "factor": 4.0, "yarn_log_multiplier": 0.1},
            r"llama\.rope\.scaling\.yarn_log_multiplier",
        ),
        ({"type": "yarn", "factor": 4.0, "yarn_ext_factor": 0.5}, r"llama\.rope\.scaling\.yarn_ext_factor"),
        ({"type": "yarn", "factor": 4.0, "yarn_beta_slow": 2.0}, r"llama\.rope\.scaling\.yarn_beta_slow"),
        ({"alpha": 2.0}, r"llama\.rope\.scaling\.alpha"),
    ],
)
def test_scalings_of_gguf_that_are_not_computed(tmp_path, keys, message):
    libqat.export(checkpoint_of(make_llama()), tmp_path / "plain.gguf")
    keys = {f"llama.rope.scaling.{key}": value for key, value in keys.items()}
    rewrite(tmp_path / "plain.gguf", tmp_path / "a.gguf", keys)
    with pytest.raises(libqat.UnsupportedError, match=message):
        libqat.load_model(tmp_path / "a.gguf")


@pytest.mark.parametrize("type", [None, "linear"])
def test_a_factor_without_a_type_is_linear_as_in_llama_cpp(tmp_path, type):
    libqat.export(checkpoint_of(make_llama()), tmp_path / "plain.gguf")
    keys = {"llama.rope.scaling.factor": 4.0} | ({"llama.rope.scaling.type": type} if type else {})
    rewrite(tmp_path / "plain.gguf", tmp_path / "a.gguf", keys)
    config = json.loads(libqat.load_model(tmp_path / "a.gguf").config)
    assert config["rope_parameters"] == {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    rewrite(tmp_path / "plain.gguf", tmp_path / "b.gguf", keys | {"llama.rope.scaling.type": "none"})
    config = json.loads(libqat.load_model(tmp_path / "b.gguf").config)
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("rope", "error", "message"),
    [
        (
            {"rope_type": "dynamic", "factor": 2.0},
            libqat.UnsupportedError,
            r'"rope_parameters\.rope_type": .*"dynamic"',
        ),
        ({"rope_type": "longrope"}, libqat.UnsupportedError, r'"rope_parameters\.rope_type": .*"longrope"'),
        ({"rope_type": 3}, libqat.FileError, r'"rope_parameters\.rope_type": expected a string'),
        (
            {"rope_type": "linear"},
            libqat.FileError,
            r'"rope_parameters\.factor": expected a number, got nothing',
        ),
        (
            {"rope_type": "linear", "factor": "2"},
            libqat.FileError,
            r'"rope_parameters\.factor": expected a number',
        ),
        ({"rope_type": "linear", "factor": -1.0}, libqat.FileError, r'"factor": expected a number > 0'),
        (
            SCALINGS["llama3"] | {"low_freq_factor": None},
            libqat.FileError,
            r'"rope_parameters\.low_freq_factor"',
        ),
        (
            SCALINGS["llama3"] | {"low_freq_factor": 4.0},
            libqat.FileError,
            r'"high_freq_factor": expected more than',
        ),
        (SCALINGS["yarn"] | {"truncate": False}, libqat.UnsupportedError, r'"rope_parameters\.truncate"'),
        (
            SCALINGS["linear"] | {"partial_rotary_factor": 0.5},
            libqat.UnsupportedError,
            "partial_rotary_factor",
        ),
        (
            SCALINGS["linear"] | {"type": "yarn"},
            libqat.UnsupportedError,
            '"linear" as another key says, got "yarn"',
        ),
    ],
)
def test_configurations_that_are_refused(tmp_path, rope, error, message):
    make_llama().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_parameters": rope}))
    with pytest.raises(error, match=message) as caught:
        libqat.load_model(tmp_path)
    assert str(path) in str(caught.value)


def test_borders_of_yarn_that_llama_cpp_does_not_read_are_refused(tmp_path):
    checkpoint = checkpoint_of(make(SCALINGS["yarn with everything"]))
    with pytest.raises(libqat.UnsupportedError, match="beta_fast, beta_slow: expected 32 and 1"):
        libqat.export(checkpoint, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


def test_qwen_files_hold_no_divisors(tmp_path):
    config = json.dumps({"model_type": "qwen2", "rope_theta": 10000.0, "rope_scaling": SCALINGS["llama3"]})
    checkpoint = _core.freeze_tensors(
        [("model.norm.weight", torch.ones(4))], {}, config=config, tokenizer="none"
    )
    with pytest.raises(libqat.UnsupportedError, match=r"rope_type: .* for qwen2, .*llama3"):
        libqat.export(checkpoint, tmp_path / "a.gguf")
