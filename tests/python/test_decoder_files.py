"""libqat's decoder of every shape through its files: the checkpoint, GGUF, and back."""

import pytest
import torch
from families import POLICY, SHAPES, make_family

import libqat

ROUTER_STAYS = {"rules": [{"match": r".*router\.proj", "weight": "f32", "optional": True}, *POLICY["rules"]]}


@pytest.fixture(params=SHAPES)
def prepared(request, tmp_path):
    """A decoder on the grids of a GGUF file, and its checkpoint."""
    make_family(request.param).save_pretrained(tmp_path / "hf")
    loaded = libqat.load_model(tmp_path / "hf")
    model = libqat.prepare(loaded.decoder, ROUTER_STAYS)
    return loaded.decoder, model.freeze(loaded.config, "none")


def tensors(decoder):
    return decoder.parameters() | decoder.buffers()


def test_a_gguf_file_becomes_the_decoder_that_was_exported(prepared, tmp_path):
    decoder, checkpoint = prepared
    libqat.export(checkpoint, tmp_path / "a.gguf")
    back = libqat.load_model(tmp_path / "a.gguf").decoder
    shipped = libqat.dequantize(checkpoint)
    got = tensors(back)
    assert set(got) == set(tensors(decoder))
    for name, tensor in got.items():
        # Norms of Gemma 3 lose an ulp of 1 + w; all else is bit for bit what the checkpoint holds.
        atol = 1.2e-7 if "norm" in name else 0.0
        torch.testing.assert_close(tensor.detach(), shipped[name].float(), atol=atol, rtol=0, msg=name)
    tokens = torch.arange(1, 40)[None]
    with torch.no_grad():
        expected = decoder(tokens)
        # A multiplication by the quantized weight against one by the same float numbers.
        torch.testing.assert_close(back(tokens), expected, atol=2e-5 * expected.abs().max().item(), rtol=0)


def test_a_checkpoint_becomes_the_decoder_that_was_frozen(prepared, tmp_path):
    decoder, checkpoint = prepared
    libqat.save(checkpoint, tmp_path / "a.qat.safetensors")
    back = libqat.load_checkpoint(tmp_path / "a.qat.safetensors").decoder
    tokens = torch.arange(1, 40)[None]
    with torch.no_grad():
        expected = decoder(tokens)
        torch.testing.assert_close(back(tokens), expected, atol=2e-5 * expected.abs().max().item(), rtol=0)
