"""Models and folders whose weights lie on a grid already: taken up, trained on, by the command line."""

import json

import numpy as np
import pytest
import torch
from command_line import works
from conftest import make_llama
from rounding import on_lattice
from safetensors.torch import save_file

import libqat
from libqat import finetune, ops

POLICY = {
    "rules": [
        {"match": "model\\.embed_tokens", "weight": "q6_k"},
        {"match": ".*_proj", "weight": "q4_0"},
    ],
    "estimator": {"kind": "lsq"},
}


def unquantized(folder, dtype=torch.bfloat16):
    """A folder as "-qat-q4_0-unquantized" ones are, and the codes and scales behind it."""
    model = make_llama(hidden_size=256, intermediate_size=256, initializer_range=0.05)
    state, truth = model.state_dict(), {}
    generator = np.random.default_rng(1)
    for key in state:
        if "_proj" in key:
            rows, width = state[key].shape
            codes = torch.from_numpy(generator.integers(-7, 8, (rows, width))).to(torch.int8)
            codes.view(rows, -1, 32)[:, :, 0] = -7  # decides the sign of each block
            codes.view(rows, -1, 32)[:, :, 1:][codes.view(rows, -1, 32)[:, :, 1:] == 7] = 6
            scales = torch.from_numpy(generator.uniform(0.004, 0.01, (rows, width // 32))).bfloat16().float()
            truth[key] = (codes, scales)
            state[key] = on_lattice(codes, scales, dtype)
    folder.mkdir()
    save_file({key: value.to(dtype) for key, value in state.items() if key != "lm_head.weight"},
              folder / "model.safetensors", {"format": "pt"})  # fmt: skip
    config = json.loads(model.config.to_json_string(use_diff=False))
    config["quantization_config"] = {"note": "without quant_method, as published files have it"}
    (folder / "config.json").write_text(json.dumps(config))
    return truth


def assert_recovered(checkpoint, truth):
    for key, (codes, scales) in truth.items():
        assert torch.equal(checkpoint.quantized[key].codes, codes), key
        assert torch.equal(checkpoint.quantized[key].scales[:, :, 0], scales), key


def test_zero_steps_reproduce_every_code_and_scale(tmp_path):
    truth = unquantized(tmp_path / "model")
    loaded = libqat.load_model(tmp_path / "model")
    prepared = libqat.prepare(loaded.decoder, POLICY)
    seen = []
    rows = libqat.lattice(prepared, progress=lambda *step: seen.append(step))
    assert {row.name for row in rows} == set(truth)
    assert all(row.lattice.exact == row.lattice.blocks and row.lattice.rule == "fitted" for row in rows)
    assert seen[-1][0] == seen[-1][1] == len(truth) + 1
    checkpoint = libqat.freeze(prepared, loaded.config, "none")
    assert_recovered(checkpoint, truth)
    libqat.export(checkpoint, tmp_path / "out.gguf")
    assert_recovered(libqat.import_checkpoint(tmp_path / "out.gguf"), truth)
    # the embedding is on no lattice: as ggml's quantizer would have it
    embedding = loaded.decoder.parameters()["model.embed_tokens.weight"].detach()
    codes, _ = ops.quantize(embedding, "q6_k")
    assert torch.equal(checkpoint.quantized["model.embed_tokens.weight"].codes, codes)


def test_hugging_face_models_are_taken_up_too(tmp_path):
    from transformers import AutoModelForCausalLM

    truth = unquantized(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    prepared = libqat.prepare(model, POLICY)
    rows = libqat.lattice(prepared)
    assert {row.name for row in rows} == set(truth)
    assert_recovered(libqat.freeze(prepared), truth)
    with pytest.raises(libqat.ArgumentError, match="expected a policy with learned scales"):
        libqat.lattice(libqat.prepare(make_llama(), "gguf-q4_0"))


def test_one_step_of_training_moves_on_from_there(tmp_path):
    truth = unquantized(tmp_path / "model")
    loaded = libqat.load_model(tmp_path / "model")
    teacher = loaded.decoder.frozen_copy(torch.float32)
    prepared = libqat.prepare(loaded.decoder, POLICY)
    libqat.lattice(prepared)
    tokens = torch.randint(320, (500,), generator=torch.Generator().manual_seed(1))
    data = libqat.TokenData.from_tensor(tokens, 320)
    options = {"steps": 2, "batch_size": 1, "sequence_length": 16, "learning_rate": 1e-2,
               "scale_learning_rate": 0.0, "compute_dtype": "float32", "warmup": 0.0}  # fmt: skip
    libqat.Trainer(prepared, teacher, data, tmp_path / "run", **options).run()
    checkpoint = prepared.freeze()
    moved = 0
    for key, (codes, scales) in truth.items():
        assert torch.equal(checkpoint.quantized[key].scales[:, :, 0], scales)  # held
        moved += (checkpoint.quantized[key].codes != codes).sum().item()
    assert moved > 0


# ---- folders of codes and scales


def mobile(folder):
    """A mobile folder with activation scales, and its checkpoint."""
    both = {"input": "int8_tensor_static", "output": "int8_tensor_static"}
    policy = {
        "rules": [
            {"match": "model\\.embed_tokens", "weight": "mobile2"} | both,
            {"match": ".*_proj", "weight": "mobile4"} | both,
        ],
        "kv_cache": "int8_tensor_static",
        "activation_scales": {"batches": 0},
        "estimator": {"kind": "lsq"},
    }
    model = make_llama().eval()
    prepared = libqat.prepare(model, policy)
    with prepared.calibrating(), torch.no_grad():
        model(torch.arange(30)[None])
    checkpoint = libqat.freeze(prepared, tokenizer="none")
    libqat.export(checkpoint, folder, target="gemma-mobile")
    return policy, checkpoint


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", ["decoder", "transformers"])
def test_a_mobile_folder_comes_back_byte_for_byte(tmp_path, kind):
    policy, _ = mobile(tmp_path / "mobile")
    source = libqat.import_checkpoint(tmp_path / "mobile")
    if kind == "decoder":
        loaded = libqat.load_model(tmp_path / "mobile")
        prepared = libqat.prepare(loaded.decoder, policy)
        libqat.take_up(prepared, source)
        checkpoint = prepared.freeze(loaded.config, "none")
    else:
        prepared = libqat.prepare(make_llama(seed=9), policy)
        libqat.take_up(prepared, source)
        checkpoint = libqat.freeze(prepared, config=source.config, tokenizer="none")
    libqat.export(checkpoint, tmp_path / "again", target="gemma-mobile")
    assert files(tmp_path / "again") == files(tmp_path / "mobile")


def test_taking_up_refuses_other_grids_and_scales_by_a_rule(tmp_path):
    policy, checkpoint = mobile(tmp_path / "mobile")
    for prepare in (lambda p: libqat.prepare(make_llama(), p), lambda p: decoder(tmp_path, p)):
        other = json.loads(json.dumps(policy).replace("mobile2", "mobile8"))
        with pytest.raises(libqat.ArgumentError, match=r"embed_tokens.* expected a tensor on mobile8, got "):
            libqat.take_up(prepare(other), checkpoint)
        rule = policy | {"estimator": {"kind": "ste"}}
        with pytest.raises(libqat.ArgumentError, match="expected a policy with learned scales"):
            libqat.take_up(prepare(rule), checkpoint)


def decoder(tmp_path, policy):
    return libqat.prepare(libqat.load_model(tmp_path / "mobile").decoder, policy)


# ---- the command line, and runs


def test_the_command_says_how_much_lies_on_the_grid(tmp_path):
    truth = unquantized(tmp_path / "model")
    (tmp_path / "policy.json").write_text(json.dumps(POLICY))
    out = tmp_path / "a.qat.safetensors"
    arguments = ("quantize", tmp_path / "model", "--policy", tmp_path / "policy.json", "--out", out)
    found = json.loads(works(*arguments, "--method", "lattice", "--json"))
    assert {row["name"] for row in found["lattices"]} == set(truth)
    assert all(row["exact"] == row["blocks"] and row["rule"] == "fitted" for row in found["lattices"])
    assert_recovered(libqat.load(out), truth)


def run_from(model, policy, folder):
    tokens = torch.randint(320, (500,), generator=torch.Generator().manual_seed(1))
    return finetune.start(model, tokens, policy, folder, start="lattice", steps=1, sequence_length=16)


def test_a_run_starts_from_what_a_model_has(tmp_path):
    truth = unquantized(tmp_path / "model")
    started = run_from(tmp_path / "model", POLICY, tmp_path / "run")
    assert started.start == "lattice"
    assert_recovered(started.prepared.freeze(), truth)
    policy, checkpoint = mobile(tmp_path / "mobile")
    started = run_from(tmp_path / "mobile", policy, tmp_path / "other")
    again = started.prepared.freeze()
    for key, tensor in checkpoint.quantized.items():
        assert torch.equal(again.quantized[key].codes, tensor.codes), key
        assert torch.equal(again.quantized[key].scales, tensor.scales), key
    assert started.prepared.activation_scales()["model.layers.1.self_attn.v_cache_scale"] > 0
