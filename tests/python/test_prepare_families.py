"""QAT on the Gemma and Qwen models of transformers: what is quantized, what forward and gradients are."""

import copy
import pickle

import pytest
import torch
from families import POLICY, SHAPES, make_family
from libqat.experts import QuantizedExperts

import libqat
from libqat import _core

EXPERTS = r".*experts\..*_proj"


def some_ids(rows=2, count=24, vocabulary=400):
    return torch.randint(vocabulary, (rows, count), generator=torch.Generator().manual_seed(1))


def shipped(model):
    """A float model with the weights that the prepared one ships."""
    plain = libqat.unprepare(copy.deepcopy(model))
    with torch.no_grad():
        for key, value in _core.dequantize(libqat.freeze(model)).items():
            if key in dict(plain.named_parameters()):
                plain.get_parameter(key).copy_(value)
    return plain


def matrices(model):
    """Every parameter with rows, but for the routers, which choose."""
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and not name.endswith("router.proj.weight")
    }


@pytest.mark.parametrize("shape", SHAPES)
def test_every_matrix_is_found(shape):
    model = make_family(shape)
    prepared = libqat.prepare(model, POLICY)
    assert prepared.quantizers().keys() == matrices(model)
    grids = {name: quantizer.grid for name, quantizer in prepared.quantizers().items()}
    assert grids["model.embed_tokens.weight"] == "q8_0"
    if shape == "26b":
        assert grids["model.layers.1.experts.gate_up_proj"] == "q4_0"
        assert "model.layers.1.experts.gate_up_proj" in [row.name for row in prepared.report()]
    assert sorted(model.state_dict()) == sorted(make_family(shape).state_dict())


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients_are_those_of_the_shipped_weights(shape):
    """Straight-through: what the shipped weights' gradient is, is the latents'."""
    model = make_family(shape)
    libqat.prepare(model, POLICY)
    plain = shipped(model)
    ids = some_ids()
    logits, expected = model(ids).logits, plain(ids).logits
    # the same float32 weights through other kernels: sums in another order, through up to 7 layers
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=0)
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * weight).sum().backward()
    (expected * weight).sum().backward()
    for name, parameter in plain.named_parameters():
        got = dict(model.named_parameters())[name].grad
        if parameter.grad is None:
            assert got is None, name
            continue
        scale = parameter.grad.abs().max()
        assert (got - parameter.grad).abs().max() <= 2e-3 * scale, name  # as above, amplified by the layers


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_each_implementation_of_experts_computes_the_same(implementation):
    model = make_family("26b")
    libqat.prepare(model, POLICY)
    model.set_experts_implementation(implementation)
    plain = shipped(model)
    plain.set_experts_implementation(implementation)
    ids = some_ids()
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, atol=2e-4, rtol=0)


def test_only_the_experts_that_a_batch_reaches_are_quantized(monkeypatch):
    model = make_family("26b", num_experts=16)
    libqat.prepare(model, POLICY)
    layer = model.model.layers[0].experts
    calls = []
    original = torch.ops.libqat.quantized_embedding

    def spy(indices, weight, *rest):
        calls.append((tuple(indices.tolist()), tuple(weight.shape)))
        return original(indices, weight, *rest)

    monkeypatch.setattr(libqat.experts._ops, "quantized_embedding", spy)
    hidden = torch.randn(3, 64)
    reached = torch.tensor([[2, 9], [9, 11], [2, 11]])
    layer(hidden, reached, torch.full((3, 2), 0.5)).sum().backward()
    assert calls == [((2, 9, 11), (16, 128 * 64)), ((2, 9, 11), (16, 64 * 64))]
    touched = layer.gate_up_proj.grad.abs().amax((1, 2)) > 0
    assert touched.nonzero().flatten().tolist() == [2, 9, 11]
    assert layer.num_experts == 16
    assert isinstance(layer.gate_up_proj, torch.nn.Parameter)


def test_a_policy_may_leave_one_matrix_of_the_experts_float():
    model = make_family("26b")
    prepared = libqat.prepare(model, {"rules": [{"match": r".*experts\.down_proj", "weight": "q4_0"}]})
    assert {name.rsplit(".", 1)[1] for name in prepared.quantizers()} == {"down_proj"}
    ids = some_ids()
    torch.testing.assert_close(model(ids).logits, shipped(model)(ids).logits, atol=2e-4, rtol=0)


def test_learned_scales_of_experts_train_and_ship():
    model = make_family("26b")
    prepared = libqat.prepare(
        model, {"rules": [{"match": EXPERTS, "weight": "q4_0"}], "estimator": {"kind": "lsq"}}
    )
    scales = prepared.scale_parameters()
    key = "model.layers.0.experts.gate_up_proj"
    assert scales[f"{key}_scales"].shape == (4, 128 * 64 // 32, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    before = scales[f"{key}_scales"].detach().clone()
    ids = some_ids()
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert not torch.equal(before, scales[f"{key}_scales"])
    checkpoint = libqat.freeze(model)
    expected = model.get_submodule(key.rsplit(".", 1)[0])
    with torch.no_grad():
        w_hat = torch.ops.libqat.fake_quantize(
            expected.gate_up_proj, "q4_0", "ste", "learned", key, scales[f"{key}_scales"], "lsq"
        )
    assert torch.equal(checkpoint.weight(key), w_hat)
    assert f"{key}_scales" not in checkpoint.floats


def test_a_few_steps_lower_the_loss_at_two_and_four_bits():
    rules = [
        {"match": r".*(self_attn|experts)\..*_proj", "weight": "q4_0"},
        {"match": r".*mlp\..*_proj", "weight": "q2_0"},
        {"match": ".*embed_tokens", "weight": "q8_0"},
    ]
    model = make_family("26b").train()
    libqat.prepare(model, {"rules": rules})
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = some_ids()
    losses = []
    for _ in range(12):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1.0  # from ln 400 = 6 and more; the two rows can be learned by heart


@pytest.mark.parametrize("shape", ["gemma3", "e2b", "26b"])
def test_models_of_half_precision_keep_float32_latents(shape):
    model = make_family(shape).bfloat16()
    libqat.prepare(model, POLICY)
    latents = {name: dict(model.named_parameters())[name].dtype for name in matrices(model)}
    assert set(latents.values()) == {torch.float32}
    ids = some_ids()
    logits = model(ids).logits
    assert logits.dtype == torch.bfloat16
    model.bfloat16()  # a second time, as a user's script may
    assert all(dict(model.named_parameters())[name].dtype == torch.float32 for name in latents)
    assert torch.equal(model(ids).logits, logits)
    # the embedding times the scale that a bfloat16 model uses: sqrt(64) = 8 is exact, the rows are rounded
    rows = model.model.embed_tokens(ids)
    assert rows.dtype == torch.bfloat16
    plain = libqat.unprepare(model)
    assert all(parameter.dtype == torch.bfloat16 for parameter in plain.parameters())


@pytest.mark.parametrize("shape", ["gemma3", "26b"])
def test_copies_and_pickles_compute_the_same(shape):
    model = make_family(shape)
    libqat.prepare(model, POLICY)
    ids = some_ids()
    logits = model(ids).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(ids).logits, logits)
        assert type(other.model.embed_tokens) is type(model.model.embed_tokens)


@pytest.mark.parametrize("shape", ["gemma3", "e2b", "26b"])
def test_unprepare_gives_the_model_back(shape):
    model = make_family(shape)
    classes = {name: type(module) for name, module in model.named_modules()}
    keys = list(model.state_dict())
    ids = some_ids()
    logits = model(ids).logits
    prepared = libqat.prepare(model, POLICY | {"estimator": {"kind": "lsq"}})
    assert not torch.equal(model(ids).logits, logits)
    with prepared.enabled(False):
        # the embedding and the experts run through libqat's forward, the same products in the same order
        torch.testing.assert_close(model(ids).logits, logits, atol=1e-4, rtol=0)
    libqat.unprepare(prepared)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert list(model.state_dict()) == keys
    assert torch.equal(model(ids).logits, logits)
    assert not any(isinstance(module, QuantizedExperts) for module in model.modules())


@pytest.mark.parametrize("grid", ["int4_channel", "mobile4"])
def test_a_scale_for_a_whole_expert_is_refused(grid):
    model = make_family("26b")
    with pytest.raises(
        libqat.UnsupportedError, match=f"experts need a grid with blocks inside a row, and {grid}"
    ):
        libqat.prepare(model, {"rules": [{"match": EXPERTS, "weight": grid}]})
    assert not hasattr(model.model.layers[0].experts, "expert_quantizers")


def test_a_block_across_rows_is_refused():
    model = make_family("26b", moe_intermediate_size=48)
    with pytest.raises(libqat.ArgumentError, match=r"experts\.down_proj"):
        libqat.prepare(model, {"rules": [{"match": EXPERTS, "weight": "q4_0"}]})


def test_experts_of_another_layout_are_refused():
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_local_experts=2,
        num_experts_per_tok=1,
        layer_types=["full_attention"],
        pad_token_id=0,
    )
    model = GptOssForCausalLM(config)
    with pytest.raises(
        libqat.UnsupportedError, match=r"experts\.gate_up_proj: (its matrices are transposed|exp)"
    ):
        libqat.prepare(model, {"rules": [{"match": EXPERTS, "weight": "q4_0"}]})


def test_experts_of_other_families_are_found():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_experts=4,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config).float().eval()
    prepared = libqat.prepare(model, {"rules": [{"match": EXPERTS, "weight": "q4_0"}]})
    assert len(prepared.quantizers()) == 2
    ids = some_ids(vocabulary=64)
    torch.testing.assert_close(model(ids).logits, shipped(model)(ids).logits, atol=1e-4, rtol=0)
