"""MLX folders: mlx and mlx-lm compute the trained weights from them, and what does not fit is refused."""

import json
import shutil

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import torch
from conftest import make_llama, make_tiny, make_tokenizer
from exporting import checkpoint_of
from mlx_lm.utils import load_model
from safetensors.torch import load_file, save_file

import libqat
from libqat import _core

DOWN = "model.layers.0.mlp.down_proj.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"
MIXED = {
    DOWN: "mlx2_g32",
    QUERY: "mlx3_g32@bf16",
    "model.layers.0.self_attn.k_proj.weight": "mlx5_g64@fp16",
    "model.layers.0.self_attn.v_proj.weight": "mlx6_g64",
    "model.layers.1.mlp.down_proj.weight": "mlx8_g128",
    "model.layers.1.mlp.up_proj.weight": "f32",
}


def make_qwen3():
    rope = {"rope_type": "default", "rope_theta": 1e6}
    return make_tiny("Qwen3", seed=3, head_dim=32, rope_parameters=rope)


MODELS = {
    "llama, tied, another rope base": lambda: make_llama(
        rope_parameters={"rope_type": "default", "rope_theta": 500.0}
    ),
    "llama, untied, scaled rope": lambda: make_llama(
        tied=False,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "qwen3": make_qwen3,
}


def export(checkpoint, path):
    libqat.export(checkpoint, path, target="mlx", overwrite=True)
    assert libqat.verify(path, checkpoint) == []
    return path


def weights_of(model):
    """state_dict key -> float32 weight of each quantized module, computed by MLX."""
    weights = {}
    for name, module in model.named_modules():
        if "scales" in module:
            parts = (module.weight, module.scales, module.biases)
            weight = mx.dequantize(*parts, group_size=module.group_size, bits=module.bits)
            weights[f"{name}.weight"] = torch.from_numpy(np.array(weight.astype(mx.float32)))
    return weights


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_mlx_computes_the_trained_weights_and_the_same_text(make, tmp_path):
    tokenizer = tmp_path / "tokenizer.json"
    make_tokenizer().save(str(tokenizer))
    model = make()
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    checkpoint = checkpoint_of(model, "mlx4_g64", "mlx8_g32", tokenizer=tokenizer, grids=MIXED)
    folder = export(checkpoint, tmp_path / "mlx")
    loaded, tokens = mlx_lm.load(str(folder))
    weights = weights_of(loaded)
    assert weights.keys() == checkpoint.grids.keys()
    for key, weight in weights.items():
        assert torch.equal(weight.view(torch.int32), checkpoint.weight(key).view(torch.int32)), key

    model.load_state_dict(_core.dequantize(checkpoint))
    prompt = [5, 17, 200, 9, 33, 71]
    logits = torch.from_numpy(np.array(loaded(mx.array([prompt])).astype(mx.float32)))
    with torch.no_grad():
        # Sums in another order, some in bfloat16 beside the @bf16 layer: up to 1.4e-3 at logits of 0.6.
        torch.testing.assert_close(logits, model(torch.tensor([prompt])).logits, atol=1e-2, rtol=0)
        twin = model.generate(
            torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    text = mlx_lm.generate(loaded, tokens, prompt=prompt, max_tokens=8)
    assert text == tokens.decode(twin[0, len(prompt) :].tolist())


def test_numbers_of_other_grids_are_taken_over_exactly(tmp_path):
    model = make_llama(hidden_size=256, intermediate_size=256)
    layers = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    names = [f"model.layers.{i}.{name}.weight" for i in (0, 1) for name in layers]
    grids = ["q4_0", "q4_1", "q4_k", "q5_k", "q8_0", "int4_channel@bf16", "int2_g64@fp16", "tq2_0"]
    checkpoint = checkpoint_of(model, "q4_0", grids=dict(zip(names, grids, strict=True)))
    assert libqat.can_export(checkpoint, "mlx") == []
    folder = export(checkpoint, tmp_path / "mlx")
    weights = weights_of(load_model(folder)[0])
    for key in checkpoint.grids:
        assert torch.equal(weights[key], checkpoint.weight(key)), key
    stored = libqat.import_checkpoint(folder).grids
    # Of the grids that hold the numbers the smallest: q4_0's scales have 11 bits, a product 4 more.
    assert [stored[name] for name in names[:5]] == [
        "mlx4_g32",
        "mlx4_g32",
        "mlx4_g32",
        "mlx5_g32",
        "mlx8_g32",
    ]


def test_what_mlx_cannot_compute_is_refused(tmp_path):
    """A float32 scale times a code is rounded, and MLX rounds again when it adds the bias."""
    model = make_llama(hidden_size=256, intermediate_size=256)
    grids = {QUERY: "int4_g32", DOWN: "q6_k"}
    checkpoint = checkpoint_of(model, "mlx4_g64", "mlx4_g64", grids=grids)
    reasons = {row.tensor: row.reason for row in libqat.can_export(checkpoint, "mlx")}
    assert reasons.keys() == {QUERY, DOWN}
    assert "has no code on mlx4_g32" in reasons[QUERY]
    assert "128 weights of mlx6_g128 would share the scales" in reasons[DOWN]
    with pytest.raises(libqat.UnsupportedError, match="has no code on mlx4_g32"):
        libqat.export(checkpoint, tmp_path / "mlx", target="mlx")
    assert not (tmp_path / "mlx").exists()


@pytest.fixture
def checkpoint():
    return checkpoint_of(make_llama(), "mlx4_g64", "mlx8_g32", grids=MIXED)


@pytest.fixture
def folder(checkpoint, tmp_path):
    return export(checkpoint, tmp_path / "mlx")


def test_import_gives_the_codes_and_scales_and_exports_the_same_bytes(checkpoint, folder, tmp_path):
    taken = libqat.import_checkpoint(folder)
    assert taken.grids == checkpoint.grids
    for key, tensor in checkpoint.quantized.items():
        assert torch.equal(taken.quantized[key].codes, tensor.codes)
        assert torch.equal(taken.quantized[key].scales, tensor.scales)
    again = export(taken, tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_the_threads_do_not_matter(checkpoint, folder, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    again = export(checkpoint, tmp_path / "again")
    torch.set_num_threads(before)
    for path in folder.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_a_folder_that_mlx_quantized_is_read(bits, group, tmp_path):
    weight = mx.random.normal((6, 384), key=mx.random.key(bits)).astype(mx.float16)
    packed, scales, biases = mx.quantize(weight, group_size=group, bits=bits)
    tensors = {"head.weight": packed, "head.scales": scales, "head.biases": biases}
    mx.save_safetensors(str(tmp_path / "model.safetensors"), tensors, {"format": "mlx"})
    config = {"model_type": "other", "quantization": {"group_size": group, "bits": bits}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    taken = libqat.import_checkpoint(tmp_path)
    assert taken.grids == {"head.weight": f"mlx{bits}_g{group}@fp16"}
    expected = mx.dequantize(packed, scales, biases, group_size=group, bits=bits)
    assert torch.equal(taken.weight("head.weight"), torch.from_numpy(np.array(expected.astype(mx.float32))))
    assert taken.tokenizer == "none"


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "mlx"})


def change_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization"])
    (folder / "config.json").write_text(json.dumps(config))


def test_verify_lists_what_differs(checkpoint, folder):
    def change(tensors):
        module = DOWN.removesuffix(".weight")
        tensors[module + ".weight"][3, 1] ^= 1
        tensors[module + ".biases"][5, 2] *= 2
        tensors["model.norm.weight"][0] = 7
        tensors["more"] = torch.zeros(1)
        del tensors["model.layers.0.input_layernorm.weight"]

    change_tensors(folder, change)
    found = {(row.tensor, row.what): row.count for row in libqat.verify(folder, checkpoint)}
    assert found.pop((DOWN, "values")) > 1
    assert found == {
        (DOWN, "codes"): 1,
        (DOWN, "scales"): 1,
        ("model.norm.weight", "values"): 1,
        ("more", "extra"): 1,
        ("model.layers.0.input_layernorm.weight", "missing"): 1,
    }


BROKEN_TENSORS = {
    "no biases": (lambda t: t.pop(DOWN.replace("weight", "biases")), "biases"),
    "no weight": (lambda t: t.pop(DOWN), "down_proj.weight"),
    "words of another type": (lambda t: t.update({DOWN: t[DOWN].view(torch.int32)}), "expected U32, got I32"),
    "too few words": (lambda t: t.update({DOWN: t[DOWN][:, 1:].contiguous()}), r"expected \[64, 8\]"),
    "biases of another type": (
        lambda t: t.update({DOWN.replace("weight", "biases"): t[DOWN.replace("weight", "biases")].half()}),
        "expected F32, got F16",
    ),
    "a scale that is not finite": (lambda t: t[DOWN.replace("weight", "scales")].fill_(torch.inf), "finite"),
    "scales of whole rows": (
        lambda t: t.update({DOWN.replace("weight", "scales"): torch.ones(64)}),
        r"expected \[R, N / group\]",
    ),
}


@pytest.mark.parametrize(("change", "says"), BROKEN_TENSORS.values(), ids=BROKEN_TENSORS)
def test_broken_tensors_are_named(change, says, folder):
    change_tensors(folder, change)
    with pytest.raises(libqat.FileError, match=says):
        libqat.import_checkpoint(folder)


BROKEN_CONFIGS = {
    "bits": (lambda q: q.update(bits="4"), "bits: expected a whole number"),
    "no group": (lambda q: q.pop("group_size"), "group_size: expected a whole number"),
    "7 bits": (lambda q: q.update(bits=7), "expected 2, 3, 4, 5, 6 or 8 bits"),
    "groups of 2^40": (lambda q: q.update(group_size=2**40), "in groups of 32, 64 or 128"),
    "another mode": (lambda q: q.update(mode="mxfp4"), 'expected the mode "affine"'),
    "other groups": (lambda q: q.update(group_size=128), r"weight: expected \["),
}


@pytest.mark.parametrize(("change", "says"), BROKEN_CONFIGS.values(), ids=BROKEN_CONFIGS)
def test_broken_configurations_are_named(change, says, folder):
    change_config(folder, change)
    with pytest.raises((libqat.FileError, libqat.UnsupportedError), match=says):
        libqat.import_checkpoint(folder)


def test_truncated_folders_are_refused(folder, tmp_path):
    whole = (folder / "model.safetensors").read_bytes()
    for size in (0, 7, 100, len(whole) - 1):
        (folder / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(libqat.FileError):
            libqat.import_checkpoint(folder)
    shutil.rmtree(folder)
    with pytest.raises(libqat.FileError):
        libqat.import_checkpoint(folder)


def test_an_older_folder_stays_when_the_export_is_refused(checkpoint, folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(libqat.FileError):
        libqat.export(checkpoint, folder, target="mlx")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
