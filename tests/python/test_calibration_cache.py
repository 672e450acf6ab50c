"""What a start asks of the float model, kept for runs under other policies."""

import copy

import pytest
import torch
from command_line import run, works
from conftest import make_llama
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import libqat
from libqat import data, finetune, generation, ptq

BLOCKS = r"model\.layers\..*_proj"
OPTIONS = {"steps": 2, "batch_size": 2, "sequence_length": 32, "compute_dtype": "float32"}


def policy(grid, table="f32"):
    return {"rules": [{"match": BLOCKS, "weight": grid}, {"match": r"model\.embed_tokens", "weight": table}]}


@pytest.fixture
def tokens(hf_folder, text_file):
    return data.tokenize(libqat.load_tokenizer(hf_folder), data.read_texts([text_file]))


def started(folder, tokens, policy, out, **options):
    """The weights and scales that a run starts from, and the stages that it reported."""
    said = []
    run = finetune.start(
        folder, tokens, policy, out, on_start=lambda *now: said.append(now), **OPTIONS | options
    )
    scales = dict(run.prepared.scale_parameters())
    return {k: v.detach().clone() for k, v in (run.loaded.decoder.parameters() | scales).items()}, said


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_other_policies_start_at_the_same_bits_and_ask_the_float_model_nothing(hf_folder, tokens, tmp_path):
    cache = tmp_path / "below" / "it.safetensors"
    first, said = started(hf_folder, tokens, policy("q4_0"), tmp_path / "a", calibration_cache=cache)
    alone, everything = started(hf_folder, tokens, policy("q4_0"), tmp_path / "b")
    assert equal(first, alone)
    assert said == everything
    for grid in ("q4_0", "q2_0"):
        other, said = started(
            hf_folder, tokens, policy(grid), tmp_path / f"{grid}-c", calibration_cache=cache
        )
        alone, everything = started(hf_folder, tokens, policy(grid), tmp_path / f"{grid}-d")
        assert equal(other, alone)
        # the weights alone, without the text and the windows of the backward pass
        assert [name for *_, name in said] == [name for *_, name in everything if name.startswith("model.")]


def test_weights_that_were_not_asked_for_are_measured_and_added(hf_folder, tokens, tmp_path):
    cache = tmp_path / "it.safetensors"
    started(hf_folder, tokens, policy("q4_0"), tmp_path / "a", calibration_cache=cache)
    before = load_file(cache)
    tied, _ = started(hf_folder, tokens, policy("q4_0", "q4_0"), tmp_path / "b", calibration_cache=cache)
    assert equal(tied, started(hf_folder, tokens, policy("q4_0", "q4_0"), tmp_path / "c")[0])
    after = load_file(cache)
    assert "lookups/model.embed_tokens.weight" in after
    assert after.keys() > before.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # and what is more than a policy rounds changes nothing
    blocks, said = started(hf_folder, tokens, policy("q4_0"), tmp_path / "d", calibration_cache=cache)
    assert all(name for *_, name in said)
    assert equal(blocks, started(hf_folder, tokens, policy("q4_0"), tmp_path / "e")[0])


def test_gptq_shares_the_text(hf_folder, tokens, tmp_path):
    cache = tmp_path / "it.safetensors"
    guided, _ = started(hf_folder, tokens, policy("q4_0"), tmp_path / "a", calibration_cache=cache)
    size = cache.stat().st_size
    from_text, said = started(
        hf_folder, tokens, policy("q4_0"), tmp_path / "b", start="gptq", calibration_cache=cache
    )
    assert equal(from_text, started(hf_folder, tokens, policy("q4_0"), tmp_path / "c", start="gptq")[0])
    assert not equal(from_text, guided)
    assert all(name.startswith("model.") for *_, name in said)
    assert cache.stat().st_size == size


def test_what_was_measured_before_an_interruption_is_kept(hf_folder, tokens, tmp_path, monkeypatch):
    cache = tmp_path / "it.safetensors"

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ptq, "sensitivity", interrupted)
        with pytest.raises(KeyboardInterrupt):
            started(hf_folder, tokens, policy("q4_0"), tmp_path / "a", calibration_cache=cache)
    assert list(load_file(cache)) == ["generated"]
    monkeypatch.setattr(generation, "of_model", interrupted)
    started(hf_folder, tokens, policy("q4_0"), tmp_path / "b", calibration_cache=cache)
    assert len(load_file(cache)) > 1


def test_refusals(hf_folder, tokens, tmp_path):
    cache = tmp_path / "it.safetensors"
    started(hf_folder, tokens, policy("q4_0"), tmp_path / "a", calibration_cache=cache)
    content = cache.read_bytes()
    for name, options in (  # in the order in which they are compared
        ("seed", {"seed": 1}),
        ("generated", {"start_generated": 0.25}),
        ("text", {"start_tokens": 64}),
        ("compute_dtype", {"compute_dtype": "bfloat16"}),
    ):
        with pytest.raises(
            libqat.FileError, match=f"calibration_cache: {cache}: {name}: expected this run's"
        ):
            started(hf_folder, tokens, policy("q2_0"), tmp_path / "b", calibration_cache=cache, **options)
    other = make_llama()
    with torch.no_grad():
        other.model.norm.weight.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(libqat.FileError, match=": model: expected this run's"):
        started(tmp_path / "other", tokens, policy("q4_0"), tmp_path / "b", calibration_cache=cache)
    with pytest.raises(libqat.ArgumentError, match="expected a start that looks at text, got start 'none'"):
        started(hf_folder, tokens, policy("q4_0"), tmp_path / "b", calibration_cache=cache, start="none")
    assert cache.read_bytes() == content


def test_damaged_files_are_refused(hf_folder, tokens, tmp_path):
    cache = tmp_path / "it.safetensors"
    started(hf_folder, tokens, policy("q4_0"), tmp_path / "a", calibration_cache=cache)
    content, tensors = cache.read_bytes(), load_file(cache)
    damaged = tmp_path / "damaged.safetensors"

    def refused(message):
        with pytest.raises(libqat.Error, match=message):
            started(hf_folder, tokens, policy("q4_0"), tmp_path / "b", calibration_cache=damaged)

    damaged.write_bytes(content[:-4])
    refused(f"calibration_cache: {damaged}: expected a safetensors file")
    for metadata in (None, {}, {"libqat_calibration": "7"}, {"libqat_calibration": '{"made_of": {}}'}):
        save_file(tensors, damaged, metadata)
        refused("libqat_calibration: expected metadata of a calibration")
    name = "model.layers.0.mlp.down_proj.weight"
    with safe_open(cache, "pt") as file:
        metadata = file.metadata()
    wrong = {
        f"tokens/{name}": tensors[f"tokens/{name}"][1:],
        f"outputs/{name}": tensors[f"outputs/{name}"] * float("nan"),
        "generated": tensors["generated"] + 10**6,
    }
    for key, tensor in wrong.items():
        save_file(tensors | {key: tensor.contiguous()}, damaged, metadata)
        refused("expected")


def test_the_command_line(hf_folder, text_file, tmp_path):
    cache = tmp_path / "it.safetensors"
    options = [hf_folder, "--text", text_file, "--steps", 2, "--sequence-length", 32]
    works("finetune", *options, "--calibration-cache", cache, "--out", tmp_path / "a")
    works("finetune", *options, "--calibration-cache", cache, "--out", tmp_path / "b")
    works("finetune", *options, "--out", tmp_path / "c")
    shipped = [(tmp_path / name / finetune.CHECKPOINT).read_bytes() for name in "abc"]
    assert shipped[0] == shipped[1] == shipped[2]
    code, _, err = run(
        "finetune", *options, "--calibration-cache", cache, "--out", tmp_path / "d", "--seed", 1
    )
    assert code == 1
    assert "seed: expected this run's 1, got 0" in err


def test_one_backward_pass_serves_several_grids(hf_folder, tokens):
    windows = ptq.calibration_windows(tokens, 256, 32)

    def rounded(grid, known=None):
        chosen = libqat.Policy.preset(grid).with_scale("learned")
        prepared = libqat.prepare(libqat.load_model(hf_folder).decoder, chosen)
        if known is None:
            known = libqat.sensitivity(prepared, windows, seed=3)
        libqat.guided(prepared, windows, sensitivity=known)
        return known, libqat.dequantize(prepared.freeze("", ""))

    known, _ = rounded("gguf-q4_0")
    assert equal(rounded("int2-channel", known)[1], rounded("int2-channel")[1])


def test_so_it_does_for_modules():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 32))
    batches = [torch.randn(50, 64) for _ in range(8)]
    chosen = libqat.Policy.from_json('{"rules": [{"match": ".*", "weight": "int2_g32"}]}').with_scale(
        "learned"
    )

    def rounded(known=None):
        prepared = libqat.prepare(copy.deepcopy(model), chosen)
        known = known or libqat.sensitivity(prepared, batches, seed=3)
        libqat.guided(prepared, batches, sensitivity=known)
        return known, dict(prepared.model.state_dict())

    known, first = rounded()
    assert set(known.tokens) == {"0.weight", "2.weight"}
    assert equal(rounded(known)[1], first)
    prepared = libqat.prepare(copy.deepcopy(model), chosen)
    libqat.guided(prepared, batches, seed=3)
    assert equal(dict(prepared.model.state_dict()), first)
