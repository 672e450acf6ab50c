"""Gemma's mobile folders: transformers computes with the trained weights; libqat reads the folders back."""

import json

import numpy as np
import pytest
import torch
from conftest import make_llama
from exporting import broken, checkpoint_of, mixed_mobile, read_folder, some_tokens

import libqat
from libqat import _core

TARGET = "gemma-mobile"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
UP = "model.layers.0.mlp.up_proj"


def load(folder):
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        return model.eval(), model(some_tokens()).logits


def weight_of(model, key):
    """What the module multiplies with, in the model's dtype."""
    module = model.get_submodule(key.removesuffix(".weight"))
    return module._dequantize_weights(model.dtype) if hasattr(module, "weight_scale") else module.weight


def differing(model, weights):
    return [key for key, weight in weights.items() if not torch.equal(weight_of(model, key).float(), weight)]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("embedding", ["mobile2", "f32"])
def test_transformers_computes_with_the_trained_weights(tmp_path, hf_folder, tied, embedding):
    checkpoint = mixed_mobile(embedding, tied=tied, initializer_range=0.1)
    assert libqat.can_export(checkpoint, TARGET) == []
    libqat.export(checkpoint, tmp_path / "out", target=TARGET, tokenizer_from=hf_folder)
    model, logits = load(tmp_path / "out")
    weights = _core.dequantize(checkpoint)
    assert differing(model, weights) == []
    kinds = [type(module).__name__ for module in model.modules()]
    packed_head = embedding != "f32"
    assert kinds.count("QuantizedLinear") == 2 * 7 + packed_head
    assert kinds.count("QuantizedEmbedding") == packed_head
    twin = make_llama(tied=tied).eval()
    twin.load_state_dict(weights)
    with torch.no_grad():
        assert torch.equal(logits, twin(some_tokens()).logits)
    assert libqat.verify(tmp_path / "out", checkpoint) == []


def tiny_gemma():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=320,
            hidden_size=256,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            sliding_window=16,
        )
    )


def test_gemma_with_a_tied_embedding(tmp_path):
    """Gemma scales its embedding and ties the head, which the folder has to write out as a layer."""
    model = tiny_gemma().eval()
    checkpoint = checkpoint_of(model, grid="mobile4", embedding="mobile4")
    libqat.export(checkpoint, tmp_path / "out", target=TARGET)
    loaded, logits = load(tmp_path / "out")
    weights = _core.dequantize(checkpoint)
    assert differing(loaded, weights) == []
    model.load_state_dict(weights)
    with torch.no_grad():
        assert torch.equal(logits, model(some_tokens()).logits)
    assert libqat.verify(tmp_path / "out", checkpoint) == []
    again = libqat.import_checkpoint(tmp_path / "out")
    assert again.grids == checkpoint.grids
    assert libqat.verify(tmp_path / "out", again) == []
    assert json.loads(again.config)["tie_word_embeddings"] is True


def test_an_embedding_in_blocks_is_written_with_a_caution(tmp_path):
    """As published checkpoints have it. transformers decodes it, but its loader makes room for one scale."""
    from transformers.integrations.gemma_quant import QuantizedEmbedding

    model = make_llama(tied=False, hidden_size=512)
    blocks = checkpoint_of(model, grid="mobile4", embedding="mobile2_g256", grids={HEAD: "mobile8"})
    [caution] = libqat.cautions(blocks, TARGET)
    assert (caution.tensor, caution.grid) == (EMBEDDING, "mobile2_g256")
    with pytest.warns(UserWarning, match=r"embed_tokens.*makes room for one"):
        libqat.export(blocks, tmp_path / "out", target=TARGET)
    assert libqat.verify(tmp_path / "out", blocks) == []
    stored = read_folder(tmp_path / "out")
    assert stored["model.embed_tokens.embedding_scale"].shape == (320, 2)
    again = libqat.import_checkpoint(tmp_path / "out")
    assert again.grids[EMBEDDING] == "mobile2_g256"
    decoder = QuantizedEmbedding(320, 512, torch.float32, num_bits=2)
    decoder.embedding_quantized.data = stored["model.embed_tokens.embedding_quantized"]
    decoder.embedding_scale.data = stored["model.embed_tokens.embedding_scale"]
    assert torch.equal(_core.dequantize(blocks)[EMBEDDING], decoder.weight)


def test_a_scale_per_row_needs_no_caution():
    assert (
        libqat.cautions(checkpoint_of(make_llama(tied=False), grid="mobile4", embedding="mobile8"), TARGET)
        == []
    )


def test_codes_are_packed_as_the_format_says(tmp_path):
    checkpoint = mixed_mobile(tied=False)
    libqat.export(checkpoint, tmp_path / "out", target=TARGET)
    stored = read_folder(tmp_path / "out")
    for key, tensor in checkpoint.quantized.items():
        module = key.removesuffix(".weight")
        name = f"{module}.embedding_quantized" if "embed" in key else key
        codes = tensor.codes.numpy().astype(np.int16)
        bits = int(checkpoint.grids[key].removeprefix("mobile"))
        if bits == 8:
            assert torch.equal(stored[name], tensor.codes)
            continue
        per = 8 // bits
        digits = (codes + 2 ** (bits - 1)).reshape(len(codes), -1, per) << (bits * np.arange(per))
        assert np.array_equal(stored[name].numpy(), digits.sum(-1))
        assert stored[f"{module}.{'embedding' if 'embed' in key else 'weight'}_scale"].dtype == torch.float32


def test_activation_scales_go_along(tmp_path):
    checkpoint = mixed_mobile(tied=False)
    state = {key: torch.tensor(value) for key, value in [("input", 0.03), ("output", 0.02)]}
    tensors = [(f"{UP}.{part}_activation_scale", value) for part, value in state.items()]
    weights = list(_core.dequantize(mixed_mobile(tied=False)).items())
    grids = {key: grid for key, grid in checkpoint.grids.items() if key.endswith("weight")}
    checkpoint = _core.freeze_tensors(
        weights + tensors,
        {k: g for k, g in grids.items() if g != "f32"},
        config=checkpoint.config,
        tokenizer="none",
        policy="",
    )
    libqat.export(checkpoint, tmp_path / "out", target=TARGET)
    stored = read_folder(tmp_path / "out")
    assert stored[f"{UP}.input_activation_scale"] == state["input"]
    assert stored["model.layers.1.mlp.up_proj.input_activation_scale"] == 0
    model, _ = load(tmp_path / "out")
    assert model.get_submodule(UP).output_activation_scale == state["output"]
    assert libqat.verify(tmp_path / "out", checkpoint) == []
    again = libqat.import_checkpoint(tmp_path / "out")
    kept = {key: value for key, value in _core.dequantize(again).items() if "activation" in key}
    assert kept == dict(tensors)
    assert libqat.verify(tmp_path / "out", again) == []


def test_integers_of_other_names_fit_exactly(tmp_path):
    """int4_channel is the same container's numbers; q4_0 has more scales than a row can have here."""
    checkpoint = checkpoint_of(make_llama(), grid="int4_channel", embedding="int8_channel")
    assert libqat.can_export(checkpoint, TARGET) == []
    libqat.export(checkpoint, tmp_path / "out", target=TARGET)
    loaded, _ = load(tmp_path / "out")
    assert differing(loaded, _core.dequantize(checkpoint)) == []
    assert libqat.verify(tmp_path / "out", checkpoint) == []
    refused = libqat.can_export(checkpoint_of(make_llama(), grid="q4_0", embedding="f32"), TARGET)
    assert {row.tensor for row in refused} == {key for key in checkpoint.quantized if "_proj" in key}
    three = libqat.can_export(checkpoint_of(make_llama(), grid="int3_channel", embedding="f32"), TARGET)
    assert {row.reason for row in three} == {"expected 2, 4 or 8 bits"}


def test_names_that_contain_one_another(tmp_path):
    """Expressions and exceptions mean whole names: `o_proj` unquantized says nothing of `layers.1`'s."""
    grids = {"model.layers.0.self_attn.o_proj.weight": "f32", HEAD: "f32", EMBEDDING: "f32"}
    checkpoint = checkpoint_of(make_llama(tied=False), grid="mobile4", grids=grids)
    libqat.export(checkpoint, tmp_path / "out", target=TARGET)
    loaded, _ = load(tmp_path / "out")
    assert differing(loaded, _core.dequantize(checkpoint)) == []


# ---- reading


def test_a_folder_is_taken_up_again(tmp_path, hf_folder):
    checkpoint = mixed_mobile()
    libqat.export(checkpoint, tmp_path / "out", target=TARGET, tokenizer_from=hf_folder)
    again = libqat.import_checkpoint(tmp_path / "out")
    assert again.grids == checkpoint.grids
    for key, tensor in checkpoint.quantized.items():
        assert torch.equal(again.quantized[key].codes, tensor.codes), key
        assert torch.equal(again.quantized[key].scales, tensor.scales), key
    libqat.export(again, tmp_path / "again", target=TARGET)
    for path in (tmp_path / "out").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_folders_of_others_need_no_manifest(tmp_path):
    checkpoint = mixed_mobile(tied=False)
    libqat.export(checkpoint, tmp_path / "out", target=TARGET)
    (tmp_path / "out" / "libqat.json").unlink()
    again = libqat.import_checkpoint(tmp_path / "out")
    assert again.grids == checkpoint.grids
    assert libqat.verify(tmp_path / "out", checkpoint) == []


def _put(name, value):
    return lambda t, c: t.__setitem__(name, value)


def _config(**values):
    return lambda t, c: c["quantization_config"].update(values)


BROKEN = [
    (lambda t, c: t.pop(f"{UP}.weight"), libqat.FileError, "up_proj.weight"),
    (lambda t, c: t.pop("model.embed_tokens.embedding_quantized"), libqat.FileError, "embedding_quantized"),
    (_put(f"{UP}.weight", torch.zeros(128, 32)), libqat.FileError, "expected U8, got F32"),
    (_put(f"{UP}.weight", torch.zeros(128, dtype=torch.uint8)), libqat.FileError, "a matrix"),
    (_put(f"{UP}.weight_scale", torch.ones(7, 1)), libqat.FileError, "weight_scale: expected"),
    (_put(f"{UP}.weight_scale", torch.full((128, 1), torch.inf)), libqat.FileError, "finite scales"),
    (_put("model.embed_tokens.embedding_scale", torch.ones(320, 3)), libqat.FileError, "blocks that divide"),
    (_put("model.embed_tokens.embedding_scale", torch.ones(0, 0)), libqat.FileError, "embedding_scale"),
    (_config(num_bits=3), libqat.FileError, "2, 4 or 8"),
    (_config(module_quant_configs=[]), libqat.FileError, "module_quant_configs"),
    (_config(module_quant_configs={"up": {"num_bits": True}}), libqat.FileError, "2, 4 or 8"),
    (_config(module_quant_configs={"(": {"num_bits": 2}}), libqat.UnsupportedError, "regular expressions"),
    (_config(module_quant_configs={}, num_bits=8), libqat.FileError, "expected I8, got U8"),
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mobile") / "out"
    libqat.export(mixed_mobile(), folder, target=TARGET)
    return folder


@pytest.mark.parametrize(("change", "error", "message"), BROKEN)
def test_broken_folders_are_refused_by_name(exported, change, error, message):
    with pytest.raises(error, match=message):
        libqat.import_checkpoint(broken(exported, change))


def test_verify_tells_what_differs(exported):
    checkpoint = mixed_mobile()
    down = "model.layers.0.mlp.down_proj"

    def change(tensors, config):
        tensors[f"{UP}.weight"][1, 0] ^= 0x10
        tensors[f"{down}.weight_scale"][2, 0] *= 2
        del tensors["model.layers.1.mlp.up_proj.weight_scale"]
        config["rms_norm_eps"] = 0.5

    found = {(d.tensor, d.what): d.count for d in libqat.verify(broken(exported, change), checkpoint)}
    assert found == {
        (f"{UP}.weight", "codes"): 1,
        (f"{UP}.weight", "values"): 1,
        (f"{down}.weight", "scales"): 1,
        (f"{down}.weight", "values"): int((checkpoint.quantized[f"{down}.weight"].codes[2] != 0).sum()),
        ("model.layers.1.mlp.up_proj.weight", "missing"): 1,
        ("config.json", "metadata"): 1,
    }
