"""Weights that lie on a grid already: their codes and scales are found again."""

import json

import numpy as np
import pytest
import torch
from command_line import works
from conftest import make_llama
from safetensors.torch import save_file

import libqat
from libqat import _core, finetune, ops

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def on_lattice(codes, scales, dtype):
    """codes int8 [R, N], scales [R, G] -> the weights as a file of that dtype holds them, float32."""
    scales = scales.repeat_interleave(codes.shape[1] // scales.shape[1], 1)
    return (codes.float() * scales.float()).to(dtype).float()


def found(weight, grid="q4_0"):
    lattice = _core.find_lattice(weight, grid)
    codes, stored = ops.quantize(weight, grid, "learned", "", lattice.scales)
    return lattice, codes, stored[:, :, 0]


def gaussian(rows=64, width=128, seed=0):
    return 0.02 * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ggmls_own_rule_is_recovered(dtype):
    """The extremum / -8, as f16; in a bfloat16 file the products are rounded, so that the rule misses it."""
    codes, scales = ops.quantize(gaussian(), "q4_0")
    weight = on_lattice(codes, scales[:, :, 0], DTYPES[dtype])
    lattice, again, stored = found(weight)
    assert lattice.rule == "consumer"
    assert (lattice.blocks, lattice.exact, lattice.worst) == (256, 256, 0)
    assert torch.equal(again, codes)
    # 8 significant bits of the products do not decide an f16 scale: it is off by some units in the last place
    assert torch.allclose(stored, scales[:, :, 0], rtol=2**-8 if dtype == "bf16" else 0, atol=0)
    assert torch.equal(on_lattice(again, stored, DTYPES[dtype]), weight)


def test_bfloat16_scales_by_the_rule_come_back_exactly():
    """The signed extremum / -8 of numbers in bfloat16 is a bfloat16 number: nothing is undecided."""
    weight = gaussian().bfloat16().float()
    blocks = weight.view(64, -1, 32)
    extremum = blocks.gather(2, blocks.abs().argmax(2, keepdim=True))
    scale = extremum / -8
    codes = (blocks / scale + 8.5).floor().clamp(0, 15) - 8
    stored = (codes * scale).bfloat16().float().view(64, 128)
    lattice, again, scales = found(stored)
    assert (lattice.rule, lattice.exact) == ("consumer", lattice.blocks)
    assert torch.equal(scales, scale[:, :, 0])
    assert torch.equal(again, codes.view(64, 128).to(torch.int8))
    naive_codes, naive = ops.quantize(stored, "q4_0")
    assert torch.equal(naive_codes, again)
    assert torch.equal(naive[:, :, 0], scales)  # here llama-quantize would do as well


@pytest.mark.parametrize("scale_type", ["bf16", "f16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_learned_scales_without_a_code_of_minus_eight(dtype, scale_type):
    """The grid's own rule finds other codes in nearly every block; fitting finds the ones that were there."""
    generator = np.random.default_rng(3)
    codes = torch.from_numpy(generator.integers(-7, 8, (64, 128))).to(torch.int8)
    scales = torch.from_numpy(generator.uniform(0.002, 0.01, (64, 4))).to(DTYPES[scale_type]).float()
    blocks = codes.view(64, 4, 32)
    # the largest weight, the first of equals, has a negative code, as by the rule
    largest = blocks.gather(2, blocks.int().abs().argmax(2, keepdim=True))
    codes = (blocks * -largest.sign()).view(64, 128)
    scales = scales * torch.from_numpy(generator.choice([-1.0, 1.0], (64, 4))).float()
    weight = on_lattice(codes, scales, DTYPES[dtype])
    lattice, again, stored = found(weight)
    assert lattice.rule == "fitted"
    assert lattice.exact == lattice.blocks
    assert torch.equal(again, codes)
    assert torch.equal(on_lattice(again, stored, DTYPES[dtype]), weight)
    if scale_type == "bf16" or dtype != "bf16":
        assert torch.equal(stored, scales)
    naive, _ = ops.quantize(weight, "q4_0")
    assert (naive.view(64, 4, 32) == codes.view(64, 4, 32)).all(2).float().mean() < 0.2


def test_zeros_and_sparse_blocks():
    codes = torch.zeros(1, 6 * 32, dtype=torch.int8)
    codes[0, 32] = -8
    codes[0, 64:66] = torch.tensor([-8, 4])
    codes[0, 96:99] = torch.tensor([-8, 7, 1])
    codes[0, 128:160] = -8
    codes[0, 160:162] = torch.tensor([-8, -8])
    scales = torch.tensor([[0.0, 0.5, 0.25, 0.125, 0.0625, -0.03125]])
    weight = on_lattice(codes, scales, torch.bfloat16)
    lattice, again, stored = found(weight)
    assert (lattice.rule, lattice.exact) == ("consumer", 6)
    assert torch.equal(again[:, 32:], codes[:, 32:])
    assert torch.equal(stored[:, 1:], scales[:, 1:])
    assert torch.equal(ops.dequantize(again, lattice.scales, "q4_0"), weight)


def test_ties_of_the_extremum():
    """-8 and +8 cannot both be codes; the first of two equal magnitudes has the code -8, as ggml has it."""
    weight = torch.zeros(2, 32)
    weight[0, :3] = torch.tensor([-0.5, 0.4375, 0.0625])
    weight[1, :3] = torch.tensor([0.5, -0.4375, 0.0625])
    lattice, codes, stored = found(weight)
    assert lattice.exact == 2
    assert codes[:, :3].tolist() == [[-8, 7, 1], [-8, 7, -1]]
    assert stored.flatten().tolist() == [0.0625, -0.0625]


def test_a_few_blocks_off_the_lattice_are_counted_and_nearest():
    codes, scales = ops.quantize(gaussian(seed=2), "q4_0")
    weight = on_lattice(codes, scales[:, :, 0], torch.float16)
    weight[3, 5] += 0.3 * scales[3, 0, 0].abs().half().float()
    weight = weight.half().float()
    lattice, again, stored = found(weight)
    assert (lattice.rule, lattice.blocks - lattice.exact) == ("consumer", 1)
    assert 0.2 < lattice.worst < 0.5
    assert torch.equal(again, codes)
    assert torch.equal(stored, scales[:, :, 0])


def test_weights_on_no_lattice_are_left_to_the_rule():
    weight = gaussian(seed=4)
    lattice, codes, stored = found(weight)
    assert lattice.rule == "none"
    assert lattice.exact == 0
    expected_codes, expected = ops.quantize(weight, "q4_0")
    assert torch.equal(codes, expected_codes)
    assert torch.equal(stored, expected[:, :, 0])


@pytest.mark.parametrize("grid", ["mobile4", "mobile2", "int4_channel", "int4_g32", "q8_0", "q5_0"])
def test_other_grids(grid):
    codes, scales = ops.quantize(gaussian(seed=5), grid, "search" if grid == "mobile2" else "reference")
    weight = ops.dequantize(codes, scales, grid).reshape(64, 128)
    lattice, again, _ = found(weight, grid)
    assert lattice.exact == lattice.blocks
    assert torch.equal(again, codes)
    assert torch.equal(ops.dequantize(again, lattice.scales, grid), weight)


def test_grids_without_a_lattice_and_broken_weights_are_refused():
    assert not _core.has_lattice("q4_1")
    assert not _core.has_lattice("q6_k")
    assert _core.has_lattice("q4_0")
    with pytest.raises(libqat.ArgumentError, match=r"levels code \* scale"):
        _core.find_lattice(torch.ones(2, 32), "q4_1")
    with pytest.raises(libqat.NumericError, match="up"):
        _core.find_lattice(torch.full((2, 32), float("nan")), "q4_0", "up")


# ---- whole models


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
