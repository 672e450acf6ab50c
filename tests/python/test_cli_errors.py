"""What the command line says about bad input, and what it leaves alone."""

import json
import shutil
import signal
import struct
from pathlib import Path

import pytest
import torch
from command_line import QUICK, fails, works
from safetensors.torch import load_file, save_file

import libqat


def test_missing_files(hf_folder, text_file, ckpt, tmp_path):
    gone = tmp_path / "gone"
    fails("quantize", gone, says=str(gone))
    fails("export", gone, tmp_path / "x.gguf", says=str(gone))
    fails("inspect", gone, says=str(gone))
    fails("verify", gone, "--against", ckpt, says=str(gone))
    fails("finetune", hf_folder, "--text", gone, "--out", tmp_path / "run", says=str(gone))
    fails(
        "finetune",
        hf_folder,
        "--text",
        text_file,
        "--policy",
        f"{gone}.json",
        "--out",
        gone,
        says=f"{gone}.json",
    )
    fails("finetune", hf_folder, "--text", text_file, "--out", tmp_path / "run", "--resume", says="run")
    assert list(tmp_path.iterdir()) == [] or [p.name for p in tmp_path.iterdir()] == ["run"]


def broken(path: Path, target: Path, change) -> Path:
    target.write_bytes(change(path.read_bytes()))
    return target


@pytest.mark.parametrize("change", ["truncated", "garbage", "empty"])
def test_malformed_files(change, hf_folder, ckpt, gguf, tmp_path):
    spoil = {
        "truncated": lambda content: content[: len(content) * 2 // 3],
        "garbage": lambda content: content[:4] + b"\xff" * 8 + content[12:],
        "empty": lambda content: b"",
    }[change]
    bad_gguf = broken(gguf, tmp_path / "bad.gguf", spoil)
    bad_ckpt = broken(ckpt, tmp_path / "bad.qat.safetensors", spoil)
    model = tmp_path / "model"
    shutil.copytree(hf_folder, model)
    bad_weights = broken(hf_folder / "model.safetensors", model / "model.safetensors", spoil)
    fails("quantize", bad_gguf, says="bad.gguf")
    fails("inspect", bad_gguf, says="bad.gguf")
    fails("export", bad_ckpt, tmp_path / "x.gguf", says="bad.qat.safetensors")
    fails("verify", bad_gguf, "--against", ckpt, says="bad.gguf")
    fails("quantize", model, says=str(bad_weights))
    assert not (tmp_path / "x.gguf").exists()


def test_wrong_dtype_in_a_model(hf_folder, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(hf_folder, model)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.int32)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    fails("quantize", model, "--out", tmp_path / "x.qat.safetensors", says=["model.norm.weight", "I32"])
    assert not (tmp_path / "x.qat.safetensors").exists()


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ({"rules": [{"match": ".*", "weight": "q4_9"}]}, ["rules[0].weight", "q4_9"]),
        ({"rules": [{"match": ".*", "weight": "q4_0", "bits": 4}]}, ["rules[0]", "bits"]),
        ({"rules": [{"match": "nothing_here", "weight": "q4_0"}]}, ["rules[0]", "nothing_here"]),
        ({"rules": [{"match": "(", "weight": "q4_0"}]}, ["rules[0].match"]),
    ],
)
def test_bad_policies(policy, says, hf_folder, tmp_path):
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(policy))
    fails("quantize", hf_folder, "--policy", path, "--out", tmp_path / "x.safetensors", says=says)


def test_width_that_does_not_divide(tmp_path):
    from conftest import make_llama

    make_llama(hidden_size=48, intermediate_size=96, num_attention_heads=2, head_dim=32).save_pretrained(
        tmp_path
    )
    fails("quantize", tmp_path, "--out", tmp_path / "x", says=["model.embed_tokens.weight", "32", "48"])


def test_empty_text(hf_folder, tmp_path):
    text = tmp_path / "empty.txt"
    text.write_text("\n")
    fails("finetune", hf_folder, "--text", text, "--out", tmp_path / "run", says=["empty.txt", "empty"])
    fails("eval", hf_folder, "--reference", hf_folder, "--text", text, says="empty.txt")
    assert not (tmp_path / "run").exists()


def test_text_shorter_than_a_sequence(hf_folder, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("A few words.")
    fails("finetune", hf_folder, "--text", text, "--out", tmp_path / "run", says="256")


def test_token_ids_beyond_the_vocabulary(hf_folder, text_file, tmp_path):
    """A tokenizer that belongs to another model."""
    from tokenizers import Tokenizer

    model = tmp_path / "model"
    shutil.copytree(hf_folder, model)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.add_tokens(["the", "of"])
    tokenizer.save(str(model / "tokenizer.json"))
    fails("finetune", model, "--text", text_file, "--out", tmp_path / "run", says=["320", "token"])
    fails("eval", model, "--reference", model, "--text", text_file, says="320")


def test_bad_options(hf_folder, text_file, tmp_path):
    command = ["finetune", hf_folder, "--text", text_file, "--out", tmp_path / "run"]
    fails(*command, "--steps", 0, says=["steps", "0"])
    fails(*command, "--learning-rate", -1, says="learning_rate")
    fails(*command, "--frozen", "no_such_parameter", says="no_such_parameter")


def test_a_second_run_does_not_overwrite_the_first(hf_folder, text_file, tmp_path):
    command = ["finetune", hf_folder, "--text", text_file, "--out", tmp_path, *QUICK]
    works(*command)
    before = (tmp_path / "model.qat.safetensors").read_bytes()
    fails(*command, "--seed", 1, says="resume")
    assert (tmp_path / "model.qat.safetensors").read_bytes() == before


def test_a_checkpoint_without_a_tokenizer_offers_the_option(hf_folder, tmp_path):
    loaded = libqat.load_model(hf_folder)
    bare = tmp_path / "bare.qat.safetensors"
    libqat.save(libqat.freeze(libqat.prepare(loaded.decoder, "gguf-q4_0"), loaded.config), bare)
    fails("export", bare, tmp_path / "x.gguf", says="tokenizer_from")
    works("export", bare, tmp_path / "x.gguf", "--tokenizer-from", hf_folder)


def limit_file_size():
    """Writing beyond 16 KiB then fails in this process, as on a full disk."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384))


def test_a_full_disk_leaves_the_earlier_file(hf_folder, ckpt, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"earlier")
    fails("export", ckpt, path, says="model.gguf", preexec_fn=limit_file_size)
    assert path.read_bytes() == b"earlier"
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]

    target = tmp_path / "x.qat.safetensors"
    target.write_bytes(b"earlier")
    fails("quantize", hf_folder, "--out", target, says="x.qat.safetensors", preexec_fn=limit_file_size)
    assert target.read_bytes() == b"earlier"


def test_a_folder_as_the_output(ckpt, tmp_path):
    fails("export", ckpt, tmp_path, says=str(tmp_path))
    fails("export", ckpt, tmp_path / "no" / "folder.gguf", says="folder.gguf")


def test_a_huge_header_is_refused(tmp_path):
    """Counts in a header are never trusted."""
    path = tmp_path / "huge.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    fails("inspect", path, says="huge.safetensors")
    path = tmp_path / "huge.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 61, 1 << 61))
    fails("inspect", path, says="huge.gguf")
