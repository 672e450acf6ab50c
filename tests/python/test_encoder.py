"""A BERT encoder: Linear with bias, three kinds of embedding, LayerNorm left alone, and reading it back."""

import pytest
import torch
from libqat.nn import QuantizedEmbedding, QuantizedLinear
from torch import nn
from transformers import BertConfig, BertModel

import libqat
from libqat import ops

MIXED = {
    "rules": [
        {"match": "embeddings\\.word_embeddings", "weight": "q8_0"},
        {"match": "embeddings\\.position_embeddings", "weight": "int4_g32"},
        {"match": "encoder\\.layer\\.\\d+\\.attention\\..*", "kind": "linear", "weight": "int4_g64"},
        {"match": "encoder\\.layer\\.\\d+\\.(intermediate|output)\\.dense", "weight": "int2_g32"},
    ]
}
EVERYTHING = {"rules": [{"match": ".*", "weight": "int4_g32"}]}
PADDING = 0


def make_bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        pad_token_id=PADDING,
    )
    model = BertModel(config, add_pooling_layer=False).eval()
    with torch.no_grad():  # as after training: no bias is zero, no LayerNorm is the identity
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "LayerNorm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch():
    tokens = torch.randint(1, 96, (3, 10), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    tokens[2, 6:] = PADDING
    mask[2, 6:] = 0
    segments = (torch.arange(10) > 4).long().expand(3, 10)
    return {"input_ids": tokens, "attention_mask": mask, "token_type_ids": segments}


def weights_on_grids(model, prepared):
    """The float model's weights, those of a slot rounded to its grid."""
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name, quantizer in prepared.quantizers().items():
        state[name] = ops.fake_quantize(state[name], quantizer.grid)
    return state


def test_a_policy_decides_over_linears_and_embeddings_and_nothing_else():
    model = make_bert()
    prepared = libqat.prepare(model, MIXED)
    grids = {name: quantizer.grid for name, quantizer in prepared.quantizers().items()}
    block = "encoder.layer.1."
    assert grids["embeddings.word_embeddings.weight"] == "q8_0"
    assert grids["embeddings.position_embeddings.weight"] == "int4_g32"
    assert "embeddings.token_type_embeddings.weight" not in grids
    assert grids[block + "attention.self.query.weight"] == "int4_g64"
    assert grids[block + "attention.output.dense.weight"] == "int4_g64"
    assert grids[block + "intermediate.dense.weight"] == "int2_g32"
    assert grids[block + "output.dense.weight"] == "int2_g32"
    assert len(grids) == 2 + 2 * 6
    assert type(model.embeddings.token_type_embeddings) is nn.Embedding
    assert type(model.embeddings.word_embeddings) is QuantizedEmbedding
    assert all(type(module) is QuantizedLinear for module in model.modules() if isinstance(module, nn.Linear))


@pytest.mark.parametrize("policy", [MIXED, EVERYTHING])
def test_layer_norms_and_biases_stay_float(policy):
    before = {name: tensor.clone() for name, tensor in make_bert().state_dict().items()}
    model = make_bert()
    prepared = libqat.prepare(model, policy)
    norms = [module for name, module in model.named_modules() if name.endswith("LayerNorm")]
    assert len(norms) == 5
    assert all(type(norm) is nn.LayerNorm for norm in norms)
    checkpoint = libqat.freeze(prepared)
    floats = [name for name in before if "LayerNorm" in name or name.endswith("bias")]
    assert len(floats) == 2 * 5 + 2 * 6
    for name in floats:
        assert name not in checkpoint.grids
        assert torch.equal(checkpoint.weight(name), before[name]), name


@pytest.mark.parametrize("policy", [MIXED, EVERYTHING])
def test_forward_and_gradients_are_those_of_the_shipped_weights(policy):
    model, reference = make_bert(), make_bert()
    prepared = libqat.prepare(model, policy)
    reference.load_state_dict(weights_on_grids(reference, prepared))
    hidden, expected = (m(**batch()).last_hidden_state for m in (model, reference))
    assert torch.equal(hidden, expected)

    for output in (hidden, expected):
        output.square().mean().backward()
    for name, parameter in reference.named_parameters():
        grad = model.get_parameter(name).grad
        # The same sums, but an embedding's rows are added in another order: a few units of float32.
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-5, atol=1e-9, msg=name)
        if not name.endswith("key.bias"):  # it shifts all scores of a query alike: its gradient is noise
            assert grad.abs().max() > 1e-8, name
    assert not model.embeddings.word_embeddings.weight.grad[PADDING].any()


def test_a_checkpoint_read_back_is_the_trained_encoder(tmp_path):
    model = make_bert()
    prepared = libqat.prepare(model, MIXED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        model(**batch()).last_hidden_state[:, 0].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    path = tmp_path / "bert.qat.safetensors"
    libqat.save(libqat.freeze(prepared), path)

    plain = make_bert()
    plain.load_state_dict(dict(libqat.dequantize(libqat.load(path))))
    with torch.no_grad():
        assert torch.equal(plain(**batch()).last_hidden_state, model(**batch()).last_hidden_state)


def test_the_group_preset_takes_the_linears_of_an_encoder():
    prepared = libqat.prepare(make_bert(), "int2-g32")
    assert {quantizer.grid for quantizer in prepared.quantizers().values()} == {"int2_g32"}
    assert all(slot.kind == "linear" for slot in prepared.slots)
    assert len(prepared.slots) == 2 * 6
