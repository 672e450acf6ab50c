"""Text that a model writes itself, and starts that look at it."""

import json

import pytest
import torch
from command_line import run, works

import libqat
from libqat import finetune, generation, run_folder

FIRST = torch.tensor([5, 7, 11])


def test_texts_follow_the_seed(loaded):
    decoder = loaded.decoder
    texts = libqat.generate(decoder, 6, 12, FIRST, seed=3)
    assert texts.shape == (6, 12)
    assert texts.dtype == torch.long
    assert set(texts[:, 0].tolist()) <= set(FIRST.tolist())
    assert torch.equal(texts, libqat.generate(decoder, 6, 12, FIRST, seed=3))
    assert not torch.equal(texts, libqat.generate(decoder, 6, 12, FIRST, seed=4))
    begun = libqat.generate(decoder, 6, 12, FIRST, beginning=1, seed=3)
    assert (begun[:, 0] == 1).all()
    assert torch.equal(begun[:, 1], texts[:, 0])


def test_progress_counts_tokens(loaded):
    seen = []
    libqat.generate(loaded.decoder, 10, 5, FIRST, progress=lambda *now: seen.append(now))
    assert seen == [(10 * at, 50, "writing text") for at in (2, 3, 4, 5)]

    def stop(*now):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        libqat.generate(loaded.decoder, 10, 5, FIRST, progress=stop)


def test_a_text_is_what_its_seed_and_the_probabilities_say(loaded):
    """Drawn once more from whole passes, by the documented order of random numbers."""
    generator = torch.Generator().manual_seed(3)
    text = FIRST[torch.randint(len(FIRST), (6,), generator=generator)].unsqueeze(1)
    for _ in range(11):
        with torch.no_grad():
            sums = loaded.decoder(text)[:, -1].double().softmax(-1).cumsum(-1)
        at = torch.rand(6, 1, dtype=torch.double, generator=generator) * sums[:, -1:]
        text = torch.cat([text, (sums > at).int().argmax(-1, keepdim=True)], 1)
    assert torch.equal(text, libqat.generate(loaded.decoder, 6, 12, FIRST, seed=3))


def test_each_token_follows_the_ones_before(loaded):
    """A model that is sure of its next token writes what it says, with the cache as without."""
    decoder = loaded.decoder
    with torch.no_grad():
        decoder.parameters()["model.norm.weight"].mul_(1e4)
        texts = libqat.generate(decoder, 4, 20, FIRST)
        assert torch.equal(decoder(texts)[:, :-1].argmax(-1), texts[:, 1:])


def test_refusals(loaded):
    for count, window, first in ((0, 4, FIRST), (1, 0, FIRST), (1, 4, FIRST[:0])):
        with pytest.raises(libqat.ArgumentError, match="generate: expected at least one text, token and id"):
            libqat.generate(loaded.decoder, count, window, first)
    with torch.no_grad():
        loaded.decoder.parameters()["model.norm.weight"].fill_(float("nan"))
    with pytest.raises(libqat.NumericError, match="sample: logits: expected finite ones"):
        libqat.generate(loaded.decoder, 1, 4, FIRST)


def test_texts_begin_with_ordinary_tokens(hf_folder, tmp_path):
    tokenizer = libqat.load_tokenizer(hf_folder)
    size = tokenizer.get_vocab_size()
    first, beginning = generation.first_tokens(hf_folder, size)
    added = set(tokenizer.get_added_tokens_decoder())
    assert added
    assert set(first.tolist()) == set(range(size)) - added
    assert beginning == libqat.beginning_of_text(hf_folder)
    everything, none = generation.first_tokens(tmp_path, 9)
    assert everything.tolist() == list(range(9))
    assert none is None


def test_mixed_windows():
    parts = [torch.arange(12).view(6, 2), torch.arange(100, 106).view(3, 2)]
    windows = generation.mixed(parts, seed=1)
    assert not torch.equal(windows, torch.cat(parts))
    assert torch.equal(windows.sort(0).values, torch.cat(parts))
    assert generation.mixed(parts[:1]) is parts[0]


POLICY = {"rules": [{"match": r".*_proj", "weight": "q4_0"}]}
OPTIONS = {"steps": 4, "batch_size": 2, "sequence_length": 32}


def test_a_start_on_generated_text(hf_folder, text_file, tmp_path):
    tokens = finetune.tokenize_files(hf_folder, [text_file], 32)

    def weights(folder, **options):
        started = finetune.start(hf_folder, tokens, POLICY, tmp_path / folder, **OPTIONS, **options)
        return started, {name: p.detach().clone() for name, p in started.loaded.decoder.parameters().items()}

    both, mixed = weights("both")
    assert both.calibration == {"text": 256, "generated": 256}
    plain, alone = weights("alone", start_generated=0)
    assert plain.calibration == {"text": 256}
    name = "model.layers.1.mlp.down_proj.weight"
    assert not torch.equal(alone[name], mixed[name])
    assert weights("third", start_generated=1 / 3)[0].calibration == {"text": 256, "generated": 128}
    few, _ = weights("few", start_tokens=100)  # less than a batch of text
    assert few.calibration == {"text": 32, "generated": 32}
    more, _ = weights("more", start_tokens=100, start_generated=0)
    assert more.calibration == {"text": 96}
    assert weights("none", start="none")[0].calibration == {}
    with pytest.raises(libqat.ArgumentError, match="start_generated: expected a start that looks at text"):
        weights("none", start="none", start_generated=0.5)
    assert both.train()
    assert run_folder.read_finetune(tmp_path / "both")["calibration"] == both.calibration
    for wrong in ({"start_tokens": 0}, {"start_generated": 1.0}, {"start_generated": -0.1}):
        with pytest.raises(libqat.ArgumentError, match="start_tokens, start_generated: expected at least 1"):
            weights("wrong", **wrong)


def test_the_command_line(hf_folder, text_file, tmp_path):
    out = tmp_path / "guided.qat.safetensors"
    options = ["--text", text_file, "--tokens", 256, "--window", 32, "--json", "--out", out]
    found = json.loads(works("quantize", hf_folder, "--method", "guided", "--generated", 0.25, *options))
    assert found["calibration_tokens"] == 256
    written = out.read_bytes()
    found = json.loads(works("quantize", hf_folder, "--method", "guided", *options))
    assert found["calibration_tokens"] == 256
    halves = out.read_bytes()
    works("quantize", hf_folder, "--method", "guided", "--generated", 0.5, *options)
    assert out.read_bytes() == halves
    works("quantize", hf_folder, "--method", "guided", "--generated", 0, *options)
    assert len({written, halves, out.read_bytes()}) == 3
    code, _, err = run("quantize", hf_folder, "--method", "rtn", "--generated", 0.5, "--out", out)
    assert code == 2
    assert "expected no --generated for method rtn" in err
    options = ["--text", text_file, "--steps", 2, "--sequence-length", 32]
    code, _, err = run("finetune", hf_folder, *options, "--out", tmp_path / "run")
    assert code == 0
    assert "starting from guided, calibrated on 128 tokens of its own too" in err
