"""Each ggml type in a GGUF file: ggml finds the trained weights in it, and llama.cpp scores it."""

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_llama
from exporting import (
    VOCAB_SIZE,
    checkpoint_of,
    hf_name,
    log_probabilities,
    model_of,
    relative_error,
    rows_as_trained,
)
from libqat.grids import grids
from safetensors import safe_open
from safetensors.numpy import save_file

import libqat
from libqat import _core, llama_cpp

libggml = pytest.importorskip("libggml", reason="needs libggml-python: pip install libggml-python")

TYPES = {
    "q4_0": (2, 2),
    "q4_1": (3, 3),
    "q5_0": (6, 8),
    "q5_1": (7, 9),
    "q8_0": (8, 7),
    "q2_k": (10, 10),
    "q3_k": (11, 11),
    "q4_k": (12, 14),
    "q5_k": (13, 16),
    "q6_k": (14, 18),
    "tq1_0": (34, 36),
    "tq2_0": (35, 37),
    "mxfp4": (39, 38),
    "nvfp4": (40, 39),
    "q1_0": (41, 40),
    "q2_0": (42, 41),
}
"""ggml_type and llama_ftype (ggml.h, llama.h)."""


def wide_llama(**changes):
    """A model whose matrices all have rows of 256 or 512 weights; vocabulary and rows as the defaults."""
    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 256,
        "intermediate_size": 512,
        "initializer_range": 0.1,  # so that log-probabilities differ between tokens
    }
    return make_llama(**(settings | changes))


class Params(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


@pytest.fixture(scope="module")
def ggml():
    library = ctypes.CDLL(str(Path(libggml.__file__).parent / "lib64" / "libggml-base.so"))
    library.gguf_init_from_file.argtypes = [ctypes.c_char_p, Params]
    library.gguf_init_from_file.restype = ctypes.c_void_p
    library.gguf_get_tensor_name.restype = ctypes.c_char_p
    for name in ("gguf_get_n_tensors", "gguf_find_key"):
        getattr(library, name).restype = ctypes.c_int64
    for name in ("gguf_get_data_offset", "gguf_get_tensor_offset", "gguf_get_tensor_size"):
        getattr(library, name).restype = ctypes.c_size_t
    return library


def read_by_ggml(ggml, path):
    """(state_dict key -> (ggml_type, values as a flat float32 array in the file's order), file_type)."""
    context = ctypes.c_void_p(ggml.gguf_init_from_file(str(path).encode(), Params(True, None)))
    assert context.value
    data = np.fromfile(path, np.uint8)
    names = {value[0]: name for name, value in TYPES.items()}
    tensors = {}
    for i in map(ctypes.c_int64, range(ggml.gguf_get_n_tensors(context))):
        start = ggml.gguf_get_data_offset(context) + ggml.gguf_get_tensor_offset(context, i)
        raw = data[start : start + ggml.gguf_get_tensor_size(context, i)].copy()
        kind = ggml.gguf_get_tensor_type(context, i)
        key = hf_name(ggml.gguf_get_tensor_name(context, i).decode())
        if kind == 0:
            tensors[key] = (kind, raw.view(np.float32))
            continue
        weights = raw.size // ggml.ggml_type_size(kind) * ggml.ggml_blck_size(kind)
        values = np.empty(weights, np.float32)
        decode = ggml[f"dequantize_row_{names[kind].replace('_k', '_K')}"]
        decode(
            raw.ctypes.data_as(ctypes.c_void_p),
            values.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_int64(weights),
        )
        tensors[key] = (kind, values)
    at = ctypes.c_int64(ggml.gguf_find_key(context, b"general.file_type"))
    file_type = ggml.gguf_get_val_u32(context, at)
    ggml.gguf_free(context)
    return tensors, file_type


def check(ggml, path, checkpoint):
    """ggml decodes the checkpoint's weights from the file; returns the types by key and the file's type."""
    tensors, file_type = read_by_ggml(ggml, path)
    weights = _core.dequantize(checkpoint)
    weights.pop("lm_head.weight")
    assert tensors.keys() == weights.keys()
    for key, (_, values) in tensors.items():
        expected = weights[key].numpy()
        heads = {"q_proj": 4, "k_proj": 2}.get(key.split(".")[-2])
        got = values.reshape(expected.shape)
        got = rows_as_trained(got, heads) if heads else got
        assert np.count_nonzero(got.view(np.uint32) != expected.view(np.uint32)) == 0, key
    return {key: kind for key, (kind, _) in tensors.items()}, file_type


def test_the_list_of_types_is_complete():
    def has_blocks(name):
        with pytest.raises(libqat.ArgumentError) as error:
            _core.ggml_unpack(name, np.zeros((1, 1), np.uint8))  # no type has blocks of one byte
        return "expected a grid of ggml blocks" not in str(error.value)

    assert set(TYPES) == {name for name, grid in grids().items() if grid.codes and has_blocks(name)}


def test_the_page_about_gguf_has_the_types_as_they_are():
    page = (Path(__file__).resolve().parents[2] / "docs" / "formats" / "gguf.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("| `")]
    table = {row[0].strip(" `"): [cell.strip() for cell in row[1:]] for row in rows if "," not in row[0]}
    assert set(table) == set(TYPES)
    for name, (block, bits, _, _, _, file_type, _) in table.items():
        assert float(bits) == grids()[name].bits_per_weight(512)
        assert int(block) == (64 if name == "nvfp4" else grids()[name].block)
        assert int(file_type) == TYPES[name][1]


@pytest.mark.parametrize("grid", TYPES)
def test_ggml_decodes_exactly_the_checkpoint(ggml, tmp_path, grid):
    checkpoint = checkpoint_of(wide_llama(), grid=grid, embedding=grid)
    libqat.export(checkpoint, tmp_path / "a.gguf")
    kinds, file_type = check(ggml, tmp_path / "a.gguf", checkpoint)
    assert sorted(set(kinds.values())) == [0, TYPES[grid][0]]
    assert file_type == TYPES[grid][1]
    assert libqat.verify(tmp_path / "a.gguf", checkpoint) == []


@pytest.mark.parametrize("grid", TYPES)
def test_a_file_is_taken_up_again_as_it_was_written(tmp_path, grid):
    checkpoint = checkpoint_of(wide_llama(), grid=grid, embedding=grid)
    libqat.export(checkpoint, tmp_path / "a.gguf")
    weights = _core.dequantize(checkpoint)
    weights.pop("lm_head.weight")
    imported = libqat.import_checkpoint(tmp_path / "a.gguf")
    assert imported.grids == checkpoint.grids
    loaded = libqat.load_model(tmp_path / "a.gguf").decoder.parameters()
    again = _core.dequantize(imported)
    for key, expected in weights.items():
        assert torch.equal(again[key], expected)
        assert torch.equal(loaded[key], expected)
    libqat.export(imported, tmp_path / "b.gguf", tokenizer_from="none")
    assert libqat.verify(tmp_path / "b.gguf", checkpoint) == []


def test_any_mixture_of_types(ggml, tmp_path):
    model = wide_llama(num_hidden_layers=3)
    matrices = [key for key, value in model.state_dict().items() if value.dim() == 2 and "layers" in key]
    mixture = dict(zip(matrices, [*TYPES, "q2_0", "tq2_0", "q1_0", "f32", "q2_0"], strict=True))
    checkpoint = checkpoint_of(model, embedding="q2_0", grids=mixture)
    libqat.export(checkpoint, tmp_path / "a.gguf")
    kinds, file_type = check(ggml, tmp_path / "a.gguf", checkpoint)
    expected = {key: 0 if grid == "f32" else TYPES[grid][0] for key, grid in mixture.items()}
    assert {key: kinds[key] for key in mixture} == expected
    counts = dict.fromkeys(TYPES, 0)
    for key, grid in {**mixture, "model.embed_tokens.weight": "q2_0"}.items():
        if grid != "f32":
            counts[grid] += model.state_dict()[key].numel()
    assert max(counts, key=counts.get) == "q2_0"
    assert file_type == TYPES["q2_0"][1]
    assert libqat.verify(tmp_path / "a.gguf", checkpoint) == []


def test_a_width_that_blocks_do_not_divide_is_refused_with_the_tensor(tmp_path):
    with pytest.raises(libqat.ArgumentError, match=r"self_attn.k_proj.weight.* 256 .*tq2_0"):
        checkpoint_of(make_llama(), grids={"model.layers.1.self_attn.k_proj.weight": "tq2_0"})
    # 16 weights share a scale of nvfp4, but ggml packs 64 at once.
    model = make_llama(hidden_size=96, num_attention_heads=4)
    checkpoint = checkpoint_of(model, grid="q4_0", grids={"model.layers.1.self_attn.k_proj.weight": "nvfp4"})
    [obstacle] = libqat.can_export(checkpoint, "gguf")
    assert (obstacle.tensor, obstacle.grid) == ("model.layers.1.self_attn.k_proj.weight", "nvfp4")
    assert "whole blocks of 64" in obstacle.reason
    with pytest.raises(libqat.UnsupportedError, match=r"self_attn\.k_proj\.weight.*blocks of 64"):
        libqat.export(checkpoint, tmp_path / "a.gguf")


# llama.cpp rounds the input of a matrix product to 8 bits, in blocks of 32 (Q8_0) or 256 (Q8_K): an error of
# 0.5 % to 0.7 % for each product (see test_llama_cpp.py), of which about 15 add up to 2.7 % of the spread of
# the log-probabilities. Three times that is allowed. A wrong scale or order of codes gives more than
# 100 %.
BOUND = 0.08


needs_llama_cpp = pytest.mark.skipif(
    not llama_cpp.available(), reason="needs xllamacpp: pip install xllamacpp"
)


def error_of_llama_cpp(checkpoint, folder):
    """Of the log-probabilities of some tokens, relative to their spread."""
    libqat.export(checkpoint, folder / "a.gguf")
    assert libqat.verify(folder / "a.gguf", checkpoint) == []
    ids = torch.randint(VOCAB_SIZE, (16,), generator=torch.Generator().manual_seed(1)).tolist()
    settings = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": VOCAB_SIZE}
    expected = log_probabilities(model_of(checkpoint, **settings), ids)
    return relative_error(llama_cpp.score(folder / "a.gguf", ids), expected)


@needs_llama_cpp
@pytest.mark.parametrize("grid", [name for name in TYPES if not name.endswith("_k")])
def test_llama_cpp_scores_the_trained_weights(tmp_path, tokenizer_folder, grid):
    checkpoint = checkpoint_of(wide_llama(), grid=grid, embedding=grid, tokenizer=tokenizer_folder)
    assert error_of_llama_cpp(checkpoint, tmp_path) < BOUND


@needs_llama_cpp
@pytest.mark.parametrize("grid", ["q2_0", "tq2_0"])
def test_llama_cpp_knows_the_fourth_level_and_negative_scales(tmp_path, tokenizer_folder, grid):
    """ggml's rule gives neither; a scale that is searched or learned does."""
    checkpoint = checkpoint_of(wide_llama(), grid=grid, embedding="q8_0", tokenizer=tokenizer_folder)
    libqat.save(checkpoint, tmp_path / "rule.qat.safetensors")
    with safe_open(tmp_path / "rule.qat.safetensors", "np") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    rng = np.random.default_rng(5)
    for key in [key for key, kind in checkpoint.grids.items() if kind == grid]:
        codes, scales = f"{key}.codes", f"{key}.scales"
        levels = rng.choice(4, (*tensors[codes].shape, 4), p=(0.4, 0.35, 0.1, 0.15))  # of mean 0
        tensors[codes] = (levels @ (1, 4, 16, 64)).astype(np.uint8)
        # The size of the weights stays about the same: codes of -1 to 2, rather than a few of -1 and 1.
        tensors[scales] = tensors[scales] * rng.choice(np.float16([-0.3, 0.3]), tensors[scales].shape)
    save_file(tensors, tmp_path / "all.qat.safetensors", metadata)
    changed = libqat.load(tmp_path / "all.qat.safetensors")
    assert error_of_llama_cpp(changed, tmp_path) < BOUND
