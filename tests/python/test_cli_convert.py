"""`libqat convert`: from one container to another, or a list of reasons."""

import json

import pytest
import torch
from command_line import fails, run, works
from conftest import make_llama
from exporting import checkpoint_of

import libqat

QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def model():
    return make_llama()


@pytest.fixture
def gguf(model, tmp_path):
    path = tmp_path / "model.gguf"
    libqat.export(checkpoint_of(model), path)
    return path


def test_there_and_back_is_the_same_file(gguf, tmp_path):
    """q4_0's codes and scales also make an int4_g32 tensor; the embedding's q8_0 stays."""
    middle, back = tmp_path / "m.qat.safetensors", tmp_path / "back.gguf"
    found = json.loads(works("convert", gguf, middle, "--grid", "q4_0=int4_g32", "--json"))
    assert found["differences"] == []
    assert found["target"] == "libqat"
    assert {(row["from"], row["to"]) for row in found["tensors"]} == {("q4_0", "int4_g32"), ("q8_0", "q8_0")}
    assert libqat.load(middle).grids[QUERY] == "int4_g32"
    out = works("convert", middle, back, "--tokenizer-from", "none")
    assert "int4_g32" in out
    assert "read back: every number is the same" in out
    assert back.read_bytes() == gguf.read_bytes()


def test_rules_are_tried_in_order_by_whole_name(gguf, tmp_path):
    middle = tmp_path / "m.qat.safetensors"
    works("convert", gguf, middle, "--grid", r".*\.q_proj=int8_g32", "--grid", "q4_0=int4_g32")
    grids = libqat.load(middle).grids
    assert {key: grid for key, grid in grids.items() if grid == "int8_g32"}.keys() == {
        key for key in grids if key.endswith("q_proj.weight")
    }


ROUTES = {
    # target: grids of the checkpoint (matrices, embedding), of the folder, and of the GGUF made from it
    "mlx": (("q4_0", "q8_0"), {"mlx4_g32", "mlx8_g32"}, {"q4_0", "q8_0"}),
    "compressed-tensors": (("q4_0", "f16"), {"int4_g32@fp16"}, {"q4_0"}),
    "gemma-mobile": (("mobile4@fp16", "mobile2@fp16"), {"mobile4@fp16", "mobile2@fp16"}, {"q4_0", "q2_0"}),
}


@pytest.mark.parametrize("target", ROUTES)
def test_from_a_checkpoint_to_a_folder_to_a_gguf(target, model, tmp_path):
    """Every number stays; a mobile scale of two bits changes its sign on the way to q2_0."""
    source, folder, gguf = tmp_path / "m.qat.safetensors", tmp_path / "folder", tmp_path / "m.gguf"
    (matrices, embedding), in_folder, in_gguf = ROUTES[target]
    checkpoint = checkpoint_of(model, matrices, embedding)
    libqat.save(checkpoint, source)
    works("convert", source, folder, "--target", target, "--tokenizer-from", "none")
    assert set(libqat.import_checkpoint(folder).grids.values()) == in_folder
    works("convert", folder, gguf, "--tokenizer-from", "none")
    taken = libqat.import_checkpoint(gguf)
    assert set(taken.grids.values()) == in_gguf
    for key in checkpoint.grids:
        assert torch.equal(taken.weight(key), checkpoint.weight(key)), key


@pytest.mark.parametrize(
    ("target", "tensor"),
    [
        ("compressed-tensors", "model.embed_tokens.weight"),
        ("gemma-mobile", "model.layers.0.mlp.up_proj.weight"),
    ],
)
def test_blocks_without_a_place_in_a_folder_are_listed(target, tensor, gguf, tmp_path):
    """Layers with one scale per row hold no blocks of 32, and Compressed Tensors no embedding."""
    code, text, err = run("convert", gguf, tmp_path / "folder", "--target", target, "--json")
    assert code == 1
    assert "nothing written" in err
    assert tensor in {row["tensor"] for row in json.loads(text)}
    assert not (tmp_path / "folder").exists()


def test_what_the_target_cannot_hold_is_listed_and_nothing_is_written(model, tmp_path):
    """A float32 scale has no place in a GGUF."""
    source, out = tmp_path / "m.qat.safetensors", tmp_path / "out.gguf"
    libqat.save(checkpoint_of(model, grid="int4_g32"), source)
    code, text, err = run("convert", source, out, "--json")
    assert code == 1
    rows = json.loads(text)
    assert {row["tensor"] for row in rows} == {
        key for key, grid in libqat.load(source).grids.items() if grid == "int4_g32"
    }
    assert all("scales of q4_0 cannot hold" in row["reason"] for row in rows)
    assert "nothing written" in err
    assert not out.exists()
    code, text, _ = run("convert", source, out)
    assert code == 1
    assert "cannot hold" in text


def test_a_grid_that_does_not_hold_the_numbers_is_an_error(gguf, tmp_path):
    out = tmp_path / "m.qat.safetensors"
    fails("convert", gguf, out, "--grid", "q4_0=int2_g32", says="cannot be held exactly; nothing written")
    fails("convert", gguf, out, "--grid", "q9", says="grid: expected one of")
    assert not out.exists()


def test_a_folder_of_floats_is_a_target_too(gguf, tmp_path):
    out = tmp_path / "hf"
    found = json.loads(works("convert", gguf, out, "--target", "hf", "--tokenizer-from", "none", "--json"))
    assert found["differences"] == []
    assert {row["to"] for row in found["tensors"]} == {"float"}


def test_wrong_usage(gguf, tmp_path):
    code, _, err = run("convert", gguf, tmp_path / "something")
    assert code == 2
    assert "--target" in err
    code, _, err = run("convert", gguf, tmp_path / "a.gguf", "--grid", "(=q4_0")
    assert code == 2
    assert "--grid" in err
    fails("convert", tmp_path / "absent.gguf", tmp_path / "a.gguf", says="absent.gguf")


def test_verify_takes_any_container(gguf, model, tmp_path):
    """The same checkpoint against a GGUF, a folder and a checkpoint file; then another model's."""
    source = tmp_path / "m.qat.safetensors"
    checkpoint = checkpoint_of(model)
    libqat.save(checkpoint, source)
    libqat.export(checkpoint, tmp_path / "hf", target="hf")
    for file in (gguf, tmp_path / "hf", source):
        assert json.loads(works("verify", file, "--against", source, "--json")) == []
    other = make_llama()
    with torch.no_grad():
        other.get_parameter(QUERY)[3, 5] *= -1
    libqat.save(checkpoint_of(other), source)
    code, text, _ = run("verify", gguf, "--against", source, "--json")
    assert code == 1
    assert {(row["tensor"], row["what"]) for row in json.loads(text)} == {(QUERY, "codes"), (QUERY, "values")}
