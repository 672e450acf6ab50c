"""SEQ on whole models: files that hold what forward used, starts, runs."""

import copy

import numpy as np
import pytest
import torch
from conftest import make_llama, make_tokenizer
from learned_scales import normal
from safetensors.torch import load_file
from seq_policies import PROJECTIONS, SEQ
from test_export_kquants import read_by_ggml
from test_export_mlx import weights_of
from torch import nn

import libqat
from libqat import _core, data, finetune, ops, ptq


def trained(model, policy):
    """Two steps of Adam, and the checkpoint."""
    prepared = libqat.prepare(model, policy)
    optimizer = torch.optim.Adam(libqat.parameter_groups(prepared, 1e-3, 1e-2))
    ids = torch.randint(model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    return prepared, libqat.freeze(prepared)


def check_forward_saw(model, weights, checkpoint):
    """0 differing values between the file, as its consumer decodes it, and what forward multiplied with."""
    layers = dict(model.named_modules())
    assert weights
    for key, weight in weights.items():
        forward = layers[key.removesuffix(".weight")].fake_quantized().detach()
        assert torch.equal(forward, checkpoint.weight(key)), key
        assert torch.equal(weight, forward), key


def test_an_mlx_folder_holds_what_forward_used(tmp_path):
    from mlx_lm.utils import load_model

    policy = {
        "rules": [
            {"match": ".*q_proj", "weight": "mlx3_g32@bf16"},
            {"match": ".*k_proj", "weight": "mlx4_g64@fp16"},
            {"match": ".*_proj", "weight": "mlx2_g32"},
            {"match": ".*embed_tokens", "weight": "mlx4_g64"},
        ],
        "estimator": SEQ,
    }
    model = make_llama()
    _, checkpoint = trained(model, policy)
    libqat.export(checkpoint, tmp_path / "mlx", target="mlx", tokenizer_from="none")
    assert libqat.verify(tmp_path / "mlx", checkpoint) == []
    check_forward_saw(model, weights_of(load_model(tmp_path / "mlx")[0]), checkpoint)


def test_a_gguf_holds_what_forward_used(tmp_path):
    policy = {
        "rules": [
            {"match": ".*_proj", "weight": "q2_k"},
            {"match": ".*embed_tokens", "weight": "q8_0", "estimator": {"kind": "ste"}},
        ],
        "estimator": SEQ,
    }
    model = make_llama(hidden_size=256, intermediate_size=512, initializer_range=0.05)
    prepared, _ = trained(model, policy)
    make_tokenizer().save(str(tmp_path / "tokenizer.json"))
    checkpoint = libqat.freeze(prepared, tokenizer=tmp_path / "tokenizer.json")
    libqat.export(checkpoint, tmp_path / "model.gguf", target="gguf")
    assert libqat.verify(tmp_path / "model.gguf", checkpoint) == []
    weights = {
        key: torch.from_numpy(np.array(value)) for key, value in read_by_ggml(tmp_path / "model.gguf").items()
    }
    assert len(weights) == 14
    check_forward_saw(model, weights, checkpoint)


def decoder_of(folder, policy=PROJECTIONS):
    loaded = libqat.load_model(folder)
    return loaded, libqat.prepare(loaded.decoder, policy)


def test_python_and_cpp_prepare_the_same(hf_folder):
    model = make_llama()
    in_python = libqat.prepare(model, PROJECTIONS)
    loaded, in_cpp = decoder_of(hf_folder)
    scales = in_python.scale_parameters()
    found = dict(in_cpp.scale_parameters())
    assert len(found) == 14
    assert all(torch.equal(found[name], scales[name]) for name in scales)
    one, two = libqat.freeze(in_python), in_cpp.freeze(loaded.config)
    assert all(torch.equal(one.weight(name), two.weight(name)) for name in one.quantized)
    ids = torch.arange(32)[None]
    labels = torch.tensor([[7] * 32])
    model(ids, labels=labels).loss.backward()
    loaded.decoder.set_trainable(True)
    loaded.decoder(ids)[0, :-1].log_softmax(-1)[:, 7].mean().neg().backward()
    for name, free in in_cpp.scale_parameters():
        # two implementations of the same backward pass in float32
        torch.testing.assert_close(free.grad, scales[name].grad, rtol=1e-3, atol=1e-6)


@pytest.fixture
def tokens(hf_folder, text_file):
    return data.tokenize(libqat.load_tokenizer(hf_folder), data.read_texts([text_file]))


@pytest.mark.parametrize("method", ["gptq", "guided", "weighted_search", "awq"])
def test_starts_stay_on_its_levels(hf_folder, tokens, method):
    policy = copy.deepcopy(PROJECTIONS)
    policy["rules"].insert(0, {"match": ".*down_proj", "weight": "mlx4_g32"})
    loaded, prepared = decoder_of(hf_folder, policy)
    before = prepared.freeze(loaded.config)
    getattr(libqat, method)(prepared, ptq.calibration_windows(tokens, 256, 32))
    after = prepared.freeze(loaded.config)
    changed = 0
    for name in after.quantized:
        scales = after.quantized[name].scales
        assert torch.equal(ops.seq_tie(_core.seq_untie(scales, after.grids[name]), after.grids[name]), scales)
        changed += not torch.equal(before.weight(name), after.weight(name))
    assert changed > 10


def test_gptq_on_a_torch_module_beats_the_nearest_codes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32))
    mixing = normal(64, 64, seed=1)
    batches = [normal(64, 64, seed=seed) @ mixing for seed in range(2, 6)]
    x = torch.cat(batches)
    expected = model(x).detach()
    prepared = libqat.prepare(model, {"rules": [{"match": ".*", "weight": "mlx2_g32"}], "estimator": SEQ})

    def error():
        return float((model(x) - expected).detach().square().mean())

    plain = error()
    libqat.gptq(prepared, batches)
    by_gptq = error()
    assert by_gptq < 0.9 * plain
    libqat.unprepare(model)


def test_a_run_trains_resumes_and_ships(hf_folder, tokens, tmp_path):
    options = {
        "steps": 6, "batch_size": 2, "sequence_length": 16, "compute_dtype": "float32", "ema": 0.5,
        "telemetry_every": 2, "scale_learning_rate": 2e-2,
        "oscillation": {"freeze_above": 0.4, "damping": 1e-3},
        "progressive": [{"grid": "q8_0", "until": 0.3}, {"grid": "mlx4_g32", "until": 0.5}],
    }  # fmt: skip

    def start(folder, **more):
        return finetune.start(hf_folder, tokens, PROJECTIONS, tmp_path / folder, **options, **more)

    reports = []
    whole = start("whole")
    assert whole.start == "guided"
    begun = dict(whole.prepared.scale_parameters())
    begun = {name: free.clone() for name, free in begun.items()}
    assert whole.train(reports.append)
    assert reports[-1].scale_drift > 0
    part = start("part")
    assert not part.train(lambda report: report.step < 3)
    resumed = start("part", resume=True)
    assert resumed.train()
    assert whole.checkpoint.read_bytes() == resumed.checkpoint.read_bytes()
    state = load_file(tmp_path / "whole" / "state.safetensors")
    for name, free in whole.prepared.scale_parameters():
        assert free.shape == begun[name].shape
        assert torch.equal(free, state[f"average/{name}"])
        assert not torch.equal(free, begun[name])
    checkpoint = libqat.load(whole.checkpoint)
    for name in checkpoint.quantized:
        scales = checkpoint.quantized[name].scales
        assert torch.equal(ops.seq_tie(_core.seq_untie(scales, "mlx2_g32"), "mlx2_g32"), scales)
