"""A model with an untied head, biases and llama3 positions: by the command line from files to consumers."""

import json
import shutil

import numpy as np
import pytest
import torch
from command_line import fails, run, works
from conftest import make_llama
from exporting import log_probabilities, some_tokens

import libqat
from libqat import llama_cpp


@pytest.fixture(scope="module")
def untied_run(tmp_path_factory, hf_folder, text_file):
    """An untied model with biases and llama3 positions, fine-tuned for two steps by the command line."""
    folder = tmp_path_factory.mktemp("untied")
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    settings = {"attention_bias": True, "mlp_bias": True, "rope_parameters": rope}
    shutil.copytree(hf_folder, folder / "model")
    model = make_llama(tied=False, initializer_range=0.1, **settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.uniform_(-1, 1)
    model.save_pretrained(folder / "model")
    works(
        *("finetune", folder / "model", "--text", text_file, "--out", folder / "run"),
        *("--steps", 2, "--sequence-length", 16),
    )
    return folder


def test_an_untied_head_is_trained_frozen_and_exported(untied_run, tmp_path):
    path = untied_run / "run" / "model.qat.safetensors"
    checkpoint = libqat.load(path)
    assert checkpoint.grids["lm_head.weight"] == "q8_0"
    assert checkpoint.aliases == {}
    before = libqat.load_model(untied_run / "model").decoder.parameters()
    moved = {key for key, weight in checkpoint.floats.items() if not torch.equal(weight, before[key])}
    assert "model.layers.0.self_attn.q_proj.bias" in moved
    works("export", path, tmp_path / "a.gguf")
    works("verify", tmp_path / "a.gguf", "--against", path)
    out = works("export", path, tmp_path / "hf", "--target", "hf", "--max-shard-size", "100KB")
    assert "float32 weights, exactly as trained" in out
    works("verify", tmp_path / "hf", "--against", path)

    decoders = [
        libqat.load_checkpoint(path).decoder,
        libqat.load_model(tmp_path / "a.gguf").decoder,
        libqat.load_model(tmp_path / "hf").decoder,
    ]
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        ours, from_gguf, from_folder = (decoder(some_tokens()) for decoder in decoders)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")(some_tokens()).logits
    assert torch.equal(ours, from_folder)
    # The GGUF's configuration went through float32 and its rope parameters were found again.
    torch.testing.assert_close(from_gguf, ours, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)


def test_llama_cpp_runs_the_untied_model(untied_run, tmp_path):
    if not llama_cpp.available():
        pytest.skip("needs xllamacpp: pip install xllamacpp")
    from transformers import AutoModelForCausalLM

    path = untied_run / "run" / "model.qat.safetensors"
    works("export", path, tmp_path / "a.gguf")
    works("export", path, tmp_path / "hf", "--target", "hf")
    ids = some_tokens().flatten().tolist()
    expected = log_probabilities(AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), ids)
    scores = np.array(llama_cpp.score(tmp_path / "a.gguf", ids))
    # llama.cpp rounds activations to 8 bits: see BOUND_8_BIT in test_llama_cpp.py.
    assert np.sqrt(np.mean((scores - expected) ** 2)) < 0.04 * expected.std()


def test_the_command_line_says_what_requantizing_gives(untied_run, tmp_path):
    path = untied_run / "run" / "model.qat.safetensors"
    out = tmp_path / "hf"
    found = json.loads(works("export", path, out, "--target", "hf", "--dtype", "bfloat16", "--json"))
    assert found["target"] == "hf"
    assert (found["dtype"], found["exact"], found["requantizes_exactly"]) == ("bfloat16", False, False)
    assert found["bytes"] == sum(file.stat().st_size for file in out.iterdir())
    fails("export", path, out, "--target", "hf", says=["earlier export", "--overwrite"])
    exactly = ("export", path, out, "--target", "hf", "--overwrite", "--dtype", "bfloat16", "--require-exact")
    fails(*exactly, says=["target hf cannot hold", "tensors exactly"])
    code, listed, _ = run(*exactly, "--json")
    assert code == 1
    reasons = {row["tensor"]: row["reason"] for row in json.loads(listed)}
    assert "do not requantize exactly from bfloat16" in reasons["lm_head.weight"]
    # Trained scales are no grid's own rule, so no dtype helps; those of rounding to nearest are.
    fails(*exactly[:-3], "--require-exact", says="cannot hold")
    rounded = tmp_path / "rtn.qat.safetensors"
    works("quantize", untied_run / "model", "--out", rounded, "--method", "rtn")
    works("export", rounded, out, "--target", "hf", "--overwrite", "--require-exact")
    fails("export", path, tmp_path / "a.gguf", "--dtype", "bfloat16", says="dtype: expected it with")
