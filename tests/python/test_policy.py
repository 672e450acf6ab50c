import json
import pickle

import pytest

import libqat
from libqat import Policy


def llama_tensors(prefix="model."):
    return [
        (f"{prefix}embed_tokens.weight", "embedding", [128, 64]),
        (f"{prefix}layers.0.self_attn.q_proj.weight", "linear", [64, 64]),
        (f"{prefix}layers.0.mlp.down_proj.weight", "linear", [64, 128]),
        ("lm_head.weight", "linear", [128, 64]),
    ]


def test_presets_resolve_hugging_face_names():
    assert Policy.presets()[:3] == ["gguf-q4_0", "gguf-q8_0", "gguf-q2_0-mixed"]
    assert all(Policy.preset_summary(name) for name in Policy.presets())
    for prefix in ("model.", ""):
        policy = Policy.load("gguf-q4_0")
        assert policy.resolve(llama_tensors(prefix)) == ["q8_0", "q4_0", "q4_0", "q8_0"]
        assert policy.resolve(llama_tensors(prefix)[:3]) == ["q8_0", "q4_0", "q4_0"]
    int4 = Policy.preset("int4-channel")
    assert int4.name == "int4-channel"
    assert int4.resolve(llama_tensors()) == ["f32", "int4_channel", "int4_channel", "int4_channel"]


def test_presets_resolve_the_modules_of_a_real_model(llama):
    kinds = {"Linear": "linear", "Embedding": "embedding"}
    tensors = [
        (f"{name}.weight", kinds[type(module).__name__], list(module.weight.shape))
        for name, module in llama.named_modules()
        if type(module).__name__ in kinds and name != "lm_head"
    ]
    grids = Policy.preset("gguf-q4_0").resolve(tensors)
    assert grids == ["q8_0"] + ["q4_0"] * (len(tensors) - 1)


def test_json_and_pickle_give_the_same_policy_back(tmp_path):
    text = json.dumps(
        {
            "rules": [{"match": "é'\\d.*", "weight": "q4_0", "kind": "linear"}],
            "estimator": {"kind": "clipped_ste"},
        }
    )
    policy = Policy.from_json(text)
    assert policy.estimator == "clipped_ste"
    assert policy.name == ""
    assert json.loads(policy.to_json()) == json.loads(text)
    path = tmp_path / "policy.json"
    path.write_text(text)
    assert Policy.load(str(path)) == Policy.from_file(path) == pickle.loads(pickle.dumps(policy)) == policy
    assert hash(Policy.from_file(path)) == hash(policy)
    assert policy != Policy.preset("gguf-q8_0")
    assert eval(repr(policy)) == policy


def test_errors_are_python_errors_with_the_path():
    with pytest.raises(
        libqat.ArgumentError, match=r"^policy: rules\[0\]\.weight: expected one of .*q4_9"
    ) as error:
        Policy.from_json('{"rules": [{"match": "a", "weight": "q4_9"}]}')
    assert isinstance(error.value, ValueError)
    with pytest.raises(libqat.FileError, match=r"absent\.json"):
        Policy.from_file("absent.json")
    with pytest.raises(libqat.ArgumentError, match=r"kind: expected one of linear"):
        Policy.preset("int4-channel").resolve([("a", "dense", [4, 4])])
    with pytest.raises(libqat.ArgumentError, match=r"w: expected a width that is a multiple of 32"):
        Policy.from_json('{"rules": [{"match": "w", "weight": "q4_0"}]}').resolve([("w", "linear", [4, 33])])
    with pytest.raises(libqat.ArgumentError, match="expected JSON"):
        Policy.from_json('{"rules": ["\ud800'.encode("utf-8", "surrogatepass"))
