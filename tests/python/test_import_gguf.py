"""GGUF files taken up as checkpoints: exactly the file's codes and scales, under Hugging Face's names."""

import json

import gguf
import numpy as np
import pytest
import torch
from test_models_gguf import HEADS, TYPES, interleave, shapes, write

import libqat

QUANTIZED = {"Q4_0": "q4_0", "Q4_1": "q4_1", "Q8_0": "q8_0"}


def tensors_of(path):
    """name -> (type, bytes) as the `gguf` package reads the file."""
    reader = gguf.GGUFReader(path)
    return {t.name: (t.tensor_type.name, t.data.tobytes()) for t in reader.tensors}


@pytest.mark.parametrize("tied", [True, False])
def test_codes_scales_floats_and_row_order_are_those_of_the_file(tmp_path, tied):
    path = tmp_path / "model.gguf"
    weights = write(path, tied)
    checkpoint = libqat.import_checkpoint(path)
    types = {hf: TYPES[i % len(TYPES)].name for i, (hf, _, _) in enumerate(shapes(tied).values())}
    assert checkpoint.quantized.keys() | checkpoint.floats.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(checkpoint.weight(name), torch.from_numpy(np.array(weight))), name
        if weight.ndim == 2 and types[name] in QUANTIZED:
            assert checkpoint.grids[name] == QUANTIZED[types[name]]
    assert json.loads(checkpoint.config)["tie_word_embeddings"] is tied
    assert checkpoint.aliases == ({"lm_head.weight": "model.embed_tokens.weight"} if tied else {})
    assert checkpoint.tokenizer == str(path)
    assert checkpoint.policy == ""


def test_floats_keep_their_type(tmp_path):
    path = tmp_path / "model.gguf"
    write(path)
    dtypes = {tensor.dtype for tensor in libqat.import_checkpoint(path).floats.values()}
    assert dtypes == {torch.float32, torch.float16, torch.bfloat16}


def test_the_scale_of_an_interleaved_row_moves_with_it(tmp_path):
    """q_proj in Q8_0 whose row i has the scale i: nothing but the order of rows can go wrong."""
    path = tmp_path / "model.gguf"
    rows = np.repeat(np.arange(1, 65, dtype=np.float32)[:, None], 64, axis=1)
    name = "blk.0.attn_q.weight"
    data = gguf.quants.quantize(interleave(rows, HEADS), gguf.GGMLQuantizationType.Q8_0)
    write(path, drop=(name,), extra={name: (data, gguf.GGMLQuantizationType.Q8_0)})
    tensor = libqat.import_checkpoint(path).quantized["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(tensor.codes, torch.full((64, 64), 127, dtype=torch.int8))
    expected = (torch.arange(1.0, 65.0) / 127).half().float()
    assert torch.equal(tensor.scales[:, :, 0], expected[:, None].expand(64, 2))


@pytest.mark.parametrize("tied", [True, False])
def test_exporting_an_imported_file_gives_the_same_tensor_bytes(tmp_path, tied):
    source, copy = tmp_path / "model.gguf", tmp_path / "copy.gguf"
    write(source, tied)
    checkpoint = libqat.import_checkpoint(source)
    libqat.export(checkpoint, copy, tokenizer_from="none")
    assert tensors_of(copy) == tensors_of(source)
    assert libqat.verify(copy, checkpoint) == []
    assert libqat.verify(source, checkpoint) == []


def test_a_checkpoint_file_between_import_and_export_changes_nothing(tmp_path):
    source, middle, copy = (tmp_path / name for name in ("model.gguf", "m.qat.safetensors", "copy.gguf"))
    write(source)
    libqat.save(libqat.import_checkpoint(source), middle)
    libqat.export(libqat.import_checkpoint(middle), copy, tokenizer_from="none")
    assert tensors_of(copy) == tensors_of(source)


def test_a_key_that_the_file_lacks_is_a_difference_unless_llama_cpp_implies_it(tmp_path):
    source = tmp_path / "model.gguf"
    write(source)
    checkpoint = libqat.import_checkpoint(source)
    write(source, drop=["llama.rope.dimension_count"])
    found = libqat.verify(source, checkpoint)
    assert [(row.tensor, row.what) for row in found] == [("llama.rope.dimension_count", "metadata")]


def test_the_threads_do_not_matter(tmp_path):
    source = tmp_path / "model.gguf"
    write(source)
    before = torch.get_num_threads()
    files = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        libqat.save(libqat.import_checkpoint(source), tmp_path / "file")
        files.append((tmp_path / "file").read_bytes())
    torch.set_num_threads(before)
    assert files[0] == files[1]


def test_a_tensor_of_another_model_is_named(tmp_path):
    path = tmp_path / "model.gguf"
    write(path, extra={"blk.0.other.weight": (np.zeros((2, 32), np.float32), gguf.GGMLQuantizationType.F32)})
    with pytest.raises(libqat.FileError, match=r"import_checkpoint: .*blk.0.other.weight: expected a tensor"):
        libqat.import_checkpoint(path)


def test_a_scale_that_is_not_finite_is_named(tmp_path):
    path = tmp_path / "model.gguf"
    name = "blk.0.attn_v.weight"
    data = gguf.quants.quantize(np.ones((32, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    data[3, :2] = np.frombuffer(np.float16(np.inf).tobytes(), np.uint8)
    write(path, drop=(name,), extra={name: (data, gguf.GGMLQuantizationType.Q8_0)})
    with pytest.raises(libqat.FileError, match=r"v_proj.weight: expected finite scales .* got inf in row 3"):
        libqat.import_checkpoint(path)


def test_heads_that_do_not_divide_the_rows_are_named(tmp_path):
    path = tmp_path / "model.gguf"
    write(path, keys={"llama.attention.head_count": 5, "llama.attention.head_count_kv": 5})
    with pytest.raises(libqat.FileError, match=r"import_checkpoint: .*attn_[kq].weight: .* even parts"):
        libqat.import_checkpoint(path)


def test_a_truncated_file_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    write(path)
    whole = path.read_bytes()
    for size in (8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(libqat.FileError, match=r"model\.gguf"):
            libqat.import_checkpoint(path)


def test_smollm2_survives_the_round_trip(tmp_path, smollm2):
    checkpoint = libqat.import_checkpoint(smollm2)
    libqat.export(checkpoint, tmp_path / "copy.gguf")
    assert tensors_of(tmp_path / "copy.gguf") == tensors_of(smollm2)
    assert set(checkpoint.grids.values()) == {"q4_1", "q8_0"}
