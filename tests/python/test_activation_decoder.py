"""Activations in libqat's own decoder: the trainer calibrates them, and resumes."""

import pytest
import torch

import libqat
from libqat import _core

STATIC = "int8_tensor_static"
BOTH = {"input": STATIC, "output": STATIC}


def decoder_policy(rule="observed", batches=3):
    return {
        "rules": [
            {"match": "model\\.embed_tokens", "weight": "mobile8"} | BOTH,
            {"match": ".*_proj", "weight": "mobile4"} | BOTH,
        ],
        "kv_cache": STATIC,
        "activation_scales": {"rule": rule, "batches": batches},
        "estimator": {"kind": "lsq"},
    }


@pytest.fixture(scope="module")
def data():
    tokens = torch.randint(320, (2000,), generator=torch.Generator().manual_seed(1))
    return _core.TokenData.from_tensor(tokens, 320)


OPTIONS = {
    "steps": 6,
    "batch_size": 2,
    "sequence_length": 12,
    "learning_rate": 1e-3,
    "compute_dtype": "float32",
    "telemetry_every": 0,
    "save_every": 2,
}


def trainer(hf_folder, data, folder, rule):
    loaded = libqat.load_model(hf_folder)
    teacher = loaded.decoder.frozen_copy(torch.float32)
    prepared = libqat.prepare(loaded.decoder, decoder_policy(rule))
    return prepared, libqat.Trainer(prepared, teacher, data, folder, **OPTIONS)


@pytest.mark.parametrize("rule", ["observed", "learned"])
def test_the_trainer_calibrates_and_resumes_bit_for_bit(tmp_path, hf_folder, data, rule):
    prepared, run = trainer(hf_folder, data, tmp_path / "a", rule)
    losses = []
    assert run.run(lambda report: losses.append(report.loss))
    interrupted, run = trainer(hf_folder, data, tmp_path / "b", rule)
    assert not run.run(lambda report: report.step < 2)  # within calibration
    resumed, run = trainer(hf_folder, data, tmp_path / "b", rule)
    run.resume()
    again = []
    assert run.run(lambda report: again.append(report.loss))
    assert again == losses[2:]
    assert resumed.activation_scales() == prepared.activation_scales()
    assert interrupted.activation_scales() != prepared.activation_scales()
    names = prepared.activation_scales()
    assert len(names) == 2 * 2 * 7 + 2 + 2 * 2
    assert all(scale > 0 for scale in names.values())
    learned = [name for name, _ in prepared.scale_parameters() if "activation" in name or "cache" in name]
    assert len(learned) == (len(names) if rule == "learned" else 0)
    one, two = prepared.freeze(), resumed.freeze()
    for key, value in one.floats.items():
        assert torch.equal(value, two.floats[key]), key


def test_the_decoder_computes_what_the_hugging_face_model_does(tmp_path, hf_folder):
    """The same scales and weights on both sides, all kinds of rounding at once."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf_folder).eval()
    prepared = libqat.prepare(model, decoder_policy(batches=0))
    tokens = torch.randint(320, (2, 20), generator=torch.Generator().manual_seed(5))
    with prepared.calibrating(), torch.no_grad():
        model(tokens)
    checkpoint = libqat.freeze(prepared)
    ours = libqat.prepare(libqat.load_model(hf_folder).decoder, decoder_policy(batches=0))
    libqat.take_up(ours, checkpoint)
    with torch.no_grad():
        expected, got = model(tokens).logits, ours.decoder(tokens)
    libqat.save(checkpoint, tmp_path / "a.qat.safetensors")
    loaded = libqat.load_checkpoint(tmp_path / "a.qat.safetensors").decoder
    with torch.no_grad():
        shipped = loaded(tokens)
    # the same weights; a sum in another order moves an activation over a rounding border now and then
    step = prepared.activation_scales()["lm_head.output_activation_scale"]
    assert (expected - got).abs().max() <= 2 * step
    assert ((expected - got).abs() > 1e-6).float().mean() < 0.05
    assert (got - shipped).abs().max() <= 2 * step
    assert ((got - shipped).abs() > 1e-6).float().mean() < 0.05
