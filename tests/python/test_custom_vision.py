"""examples/custom_vision.py, on a network with random weights and pictures made here."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import libqat
from libqat import data, photos

Image = pytest.importorskip("PIL.Image", reason="the example reads pictures with Pillow")
import custom_vision  # noqa: E402
from vision import digits, efficientnet, images, qat  # noqa: E402


@pytest.fixture(scope="module")
def network():
    """Random weights, and BatchNorm statistics that keep the signal alive through 49 layers."""
    torch.manual_seed(0)
    model = efficientnet.EfficientNetLite0()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(torch.randn(16, 3, 32, 32))
    return model.eval()


# ---- the network


def test_network_has_the_published_shape(network):
    assert sum(parameter.numel() for parameter in network.parameters()) == 4_652_008
    assert len(libqat.fold_batch_norms(qat.shell(network, "freeze")).folded) == 49
    assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_padding_is_tensorflow_s_same(kernel, stride):
    """Output ceil(n / stride); the padding that this takes is split, the odd one at the end."""
    torch.manual_seed(1)
    layer = efficientnet.conv(2, 2, kernel, stride)
    input = torch.randn(1, 2, 8, 8)
    total = max((-(-8 // stride) - 1) * stride + kernel - 8, 0)
    padded = F.pad(input, (total // 2, total - total // 2) * 2)
    expected = F.conv2d(padded, layer.weight, stride=stride)
    output = layer(efficientnet.pad(input, layer))
    # the same sums, whose terms another kernel may add in another order
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)


# ---- the pictures


def save_picture(path, size=(40, 20), transparent=True, seed=0):
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    pixels[..., 3] = 255
    if transparent:
        pixels[: size[1] // 2, :, 3] = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels, "RGBA").save(path)


def test_a_cut_out_is_trimmed_and_centred_on_white(tmp_path):
    save_picture(tmp_path / "x.png")
    picture = images.read(tmp_path / "x.png", 32)
    assert picture.shape == (4, 32, 32)
    assert picture[3, 12:20].min() == 255  # 40 x 10 opaque pixels become 32 x 8
    assert picture[3, :12].max() == 0
    assert picture[3, 20:].max() == 0
    image = images.on_white(picture[None])[0]
    assert image[:, :11].min() == 255
    assert image[:, 15:17, 4:28].float().std() > 10
    assert image[:, :, 0].min() == 255  # the margin


def test_an_opaque_photo_gives_its_middle_square(tmp_path):
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 200
    Image.fromarray(pixels).save(tmp_path / "x.png")
    picture = images.read(tmp_path / "x.png", 32)
    assert picture[3].min() == 255
    assert picture[:3].min() == 200
    # bilinear sampling at the pixels' own centres gives them back, up to the rounding of float32 to bytes
    assert (images.on_white(picture[None])[0].int() - 200).abs().max() <= 1


def test_views_are_reproducible_and_use_every_picture(tmp_path):
    for seed in range(3):
        save_picture(tmp_path / f"{seed}.png", transparent=seed != 1, seed=seed)
    pictures = images.read_all(sorted(tmp_path.iterdir()), 32)
    views = images.random_views(pictures, 20, torch.Generator().manual_seed(3), batch=8)
    assert views.shape == (20, 3, 32, 32)
    assert views.dtype == torch.uint8
    assert torch.equal(views, images.random_views(pictures, 20, torch.Generator().manual_seed(3), batch=8))
    assert not torch.equal(
        views, images.random_views(pictures, 20, torch.Generator().manual_seed(4), batch=8)
    )
    assert len({bytes(view.numpy().tobytes()) for view in views}) == 20


# ---- training and scoring


def test_the_objective_is_zero_for_the_float_network(network):
    exact = qat.shell(network, "fold")
    x = torch.randn(2, 3, 32, 32)
    with qat.BlockOutputs(exact) as ours, qat.BlockOutputs(network) as theirs:
        logits, wanted = exact(x), network(x)
        # folding moves float32 rounding errors, 1e-7 of each value and squared here
        assert ours.distance(theirs) < 1e-9
    assert qat.divergence(wanted, logits).abs().max() < 1e-5
    assert not any(block._forward_hooks for block in exact.blocks)


def test_divergence_in_float64():
    torch.manual_seed(2)
    p, q = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    a, b = p.exp() / p.exp().sum(1, keepdim=True), q.exp() / q.exp().sum(1, keepdim=True)
    # the same formula in float64: rounding of 1e-16
    torch.testing.assert_close(qat.divergence(p, q), (a * (a / b).log()).sum(1), rtol=1e-12, atol=1e-14)


def test_agreement_and_its_interval():
    reference = torch.eye(4).repeat(25, 1) * 9
    logits = reference.clone()
    logits[:30] = logits[:30].roll(1, 1)
    figures = qat.agreement(reference, logits)
    assert figures["top1"] == pytest.approx(0.7)
    low, high = figures["top1_interval"]
    # a share of 0.7 of 100 has a standard error of 0.046
    assert 0.58 < low < 0.65
    assert 0.75 < high < 0.82
    assert qat.agreement(reference, reference)["kl"] == 0.0


def test_layer_errors_of_a_scaled_layer():
    first, second = nn.Sequential(nn.Conv2d(3, 4, 1)), nn.Sequential(nn.Conv2d(3, 4, 1))
    second.load_state_dict({key: 1.25 * value for key, value in first.state_dict().items()})
    errors = qat.layer_errors(first, second, ["0"], torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8))
    assert errors == {"0": pytest.approx(0.25, rel=1e-5)}  # exact but for float32 rounding


@pytest.mark.parametrize("batch_norm", qat.BATCH_NORM)
def test_training_ships_what_it_computes(network, tmp_path, batch_norm):
    pictures = torch.randint(256, (12, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
    options = qat.Training(
        steps=4, batch_size=4, learning_rate=1e-3, block_weight=1.0, batch_norm=batch_norm, seed=0
    )
    prepared = qat.attach(network, custom_vision.MIXED4, batch_norm)
    start = {name: latent.detach().clone() for name, latent in prepared.model.named_parameters()}
    steps = []
    qat.train(prepared, network, pictures, options, lambda *report: steps.append(report[:2]))
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert any(not torch.equal(latent, start[name]) for name, latent in prepared.model.named_parameters())
    qat.save(prepared, tmp_path / "x.qat.safetensors")
    read = qat.load(tmp_path / "x.qat.safetensors", qat.shell(network, batch_norm))
    assert torch.equal(qat.logits_of(read, pictures), qat.logits_of(prepared.model, pictures))


# ---- the whole program


@pytest.fixture
def program(network, tmp_path, monkeypatch):
    """Runs the example in a folder of its own and returns vision.json."""
    for index in range(9):
        save_picture(tmp_path / "my-photos" / f"{index}.png", seed=index)
    generator = torch.Generator().manual_seed(0)
    made = torch.randint(256, (30, 28, 28), generator=generator).byte(), torch.arange(30) % 10
    monkeypatch.setattr(data, "mnist", lambda cache=None: made)
    monkeypatch.setattr(efficientnet, "load", lambda: network)
    monkeypatch.setattr(custom_vision, "DIGIT_SIDE", 32)
    monkeypatch.setattr(
        custom_vision, "POLICIES", {"4 bits": ("int4-channel", 1e-4), "mix": (custom_vision.MIXED2, 1e-3)}
    )
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        small = ["--steps", "2", "--batch-size", "2", "--views", "4", "--side", "32", "--threads", "2"]
        monkeypatch.setattr(sys, "argv", ["custom_vision.py", *small, *arguments])
        custom_vision.main()
        return json.loads(Path("out/custom/vision.json").read_text(encoding="utf-8"))

    return run


def test_the_program_scores_what_it_saved_and_continues(program, monkeypatch, capsys):
    result = program("--photos", "my-photos")
    assert result["photos"]["training_pictures"] == 6
    assert result["photos"]["held_out"] == 3
    for part in ("photos", "digits"):
        rows = result[part]["rows"]
        assert [row["policy"] for row in rows] == ["4 bits", "mix"]
        assert 4 < rows[0]["bits_per_weight"] < 4.5
        for row in rows:
            for kind in ("ptq", "qat"):
                assert row[kind]["logits_differing_from_live"] == 0
                assert len(row[kind]["layer_errors"]) == 50
                assert Path(row[kind]["checkpoint"]).is_file()
    printed = capsys.readouterr().out
    assert "3 held-out photos" in printed
    assert "PTQ accuracy" in printed

    monkeypatch.setattr(qat, "train", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(digits, "fine_tune", lambda *_: pytest.fail("fine-tuned again"))
    again = program("--photos", "my-photos")
    assert again["photos"] == result["photos"]
    assert again["digits"] == result["digits"]


def test_without_photos_the_digits_remain(program, monkeypatch, capsys):
    monkeypatch.setattr(
        photos, "photos", lambda source: (_ for _ in ()).throw(libqat.FileError("no photos here"))
    )
    result = program()
    assert result["photos"] == {"skipped": "no photos here"}
    assert len(result["digits"]["rows"]) == 2
    output = capsys.readouterr()
    assert "photos: skipped: no photos here" in output.out
    assert "no photos here" in output.err


def test_the_summary_joins_both_examples(program, tmp_path, monkeypatch, capsys):
    import custom_encoder
    import custom_summary

    result = program("--photos", "my-photos")
    printed = []
    monkeypatch.setitem(custom_summary.TABLES, "encoder", printed.append)
    monkeypatch.setattr(sys, "argv", ["custom_summary.py"])
    with pytest.raises(
        SystemExit, match=r"encoder\.json: expected the figures of examples/custom_encoder\.py"
    ):
        custom_summary.main()
    (tmp_path / "out/custom/encoder.json").write_text('{"policies": []}')
    capsys.readouterr()
    custom_summary.main()
    assert "3 held-out photos" in capsys.readouterr().out
    assert printed == [{"policies": []}]
    summary = json.loads((tmp_path / "out/custom/summary.json").read_text())
    assert summary == {"vision": result, "encoder": {"policies": []}}
    assert callable(custom_encoder.print_table)
