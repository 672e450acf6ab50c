"""libqat's decoder against transformers' LlamaForCausalLM."""

import pytest
import torch
from random_llama import LOGITS, edit_config, make, tokens_for

import libqat
from libqat import _core

pytest_plugins = ["random_llama"]

SHAPES = {
    "tied, grouped heads": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "one key-value head": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "ungrouped heads": {"num_key_value_heads": 6, "tie_word_embeddings": True},
    "head_dim apart from hidden / heads": {"head_dim": 8, "tie_word_embeddings": False},
    "biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "another rope base and eps": {"rope_theta": 500.0, "rms_norm_eps": 1e-3, "tie_word_embeddings": True},
}


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_logits_equal_transformers(changes, tmp_path):
    reference = make(**changes)
    reference.save_pretrained(tmp_path)
    loaded = libqat.load_model(str(tmp_path))
    tokens = tokens_for(reference)
    with torch.no_grad():
        expected = reference(tokens).logits
        torch.testing.assert_close(loaded.decoder(tokens), expected, **LOGITS)
    assert expected.std() > 0.5  # logits of 0 would agree with anything
    assert list(loaded.decoder.parameters()) == [name for name, _ in reference.named_parameters()]
    assert loaded.tokenizer == str(tmp_path)


def test_qwen2_has_biases_on_queries_keys_and_values(tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    reference = make(kind=(Qwen2Config, Qwen2ForCausalLM), tie_word_embeddings=True)
    reference.save_pretrained(tmp_path)
    loaded = libqat.load_model(tmp_path)
    tokens = tokens_for(reference)
    with torch.no_grad():
        torch.testing.assert_close(loaded.decoder(tokens), reference(tokens).logits, **LOGITS)
    assert list(loaded.decoder.parameters()) == [name for name, _ in reference.named_parameters()]
    assert sum("bias" in name for name in loaded.decoder.parameters()) == 9


def test_old_spelling_of_the_config(tmp_path):
    reference = make(rope_theta=500.0, tie_word_embeddings=True)
    reference.save_pretrained(tmp_path)
    edit_config(tmp_path, drop=["rope_parameters", "head_dim"], rope_theta=500.0, rope_scaling=None)
    tokens = tokens_for(reference)
    with torch.no_grad():
        logits = libqat.load_model(str(tmp_path)).decoder(tokens)
        torch.testing.assert_close(logits, reference(tokens).logits, **LOGITS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shards_and_half_precision_files(tmp_path, dtype):
    reference = make(tie_word_embeddings=False).to(dtype)
    reference.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    decoder = libqat.load_model(str(tmp_path)).decoder
    for name, parameter in reference.named_parameters():
        assert decoder.parameters()[name].dtype == torch.float32
        assert torch.equal(decoder.parameters()[name], parameter.float())


def test_gradients_equal_transformers(tmp_path):
    reference = make(tie_word_embeddings=True)
    reference.save_pretrained(tmp_path)
    decoder = libqat.load_model(str(tmp_path)).decoder
    tokens = tokens_for(reference)
    for logits in (reference(tokens).logits, decoder(tokens)):
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for name, parameter in reference.named_parameters():
        # The same sums in another order; relative to the largest entry, because single entries cancel.
        scale = parameter.grad.abs().max()
        assert scale > 1e-4
        torch.testing.assert_close(
            decoder.parameters()[name].grad / scale, parameter.grad / scale, atol=1e-4, rtol=0
        )


def test_a_checkpoint_computes_what_transformers_computes_with_its_numbers(tmp_path):
    reference = make(tie_word_embeddings=True)
    state = reference.state_dict()
    grids = {
        key: "q8_0" if "embed" in key else "q4_0"
        for key in state
        if "norm" not in key and key != "lm_head.weight"
    }
    checkpoint = _core.freeze_tensors(list(state.items()), grids, config=reference.config.to_json_string())
    path = tmp_path / "model.qat.safetensors"
    libqat.save(checkpoint, path)
    with torch.no_grad():
        for key, grid in grids.items():
            state[key].copy_(libqat.ops.fake_quantize(state[key], grid))
        tokens = tokens_for(reference)
        loaded = libqat.load_checkpoint(path)
        torch.testing.assert_close(loaded.decoder(tokens), reference(tokens).logits, **LOGITS)
    assert "lm_head.weight" not in loaded.decoder.parameters()


def test_autocast_multiplies_in_bfloat16_only(tmp_path):
    reference = make(tie_word_embeddings=True)
    reference.save_pretrained(tmp_path)
    decoder = libqat.load_model(str(tmp_path)).decoder
    tokens = tokens_for(reference)
    products = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            if name in ("mm", "addmm", "bmm", "matmul") or "attention" in name:
                products.append((name, args[0].dtype))
            return func(*args, **(kwargs or {}))

    with torch.autocast("cpu", torch.bfloat16), Watch():
        logits = decoder(tokens)
    with Watch():
        logits.float().square().mean().backward()
    layers, linears = 3, 7
    # Forward one product per linear and the head, backward two; attention once each way.
    assert len([1 for name, _ in products if "attention" not in name]) == 3 * (layers * linears + 1)
    assert len([1 for name, _ in products if "attention" in name]) == 2 * layers
    assert {dtype for _, dtype in products} == {torch.bfloat16}
    expected = reference(tokens).logits
    # bfloat16 keeps 8 bits; 3 layers of products with errors of 2^-9 each add up to about 1 %.
    assert (logits.float() - expected).square().mean().sqrt() < 0.03 * expected.square().mean().sqrt()
    assert all(p.grad.dtype == torch.float32 for p in decoder.parameters().values())


def test_frozen_copy_is_a_teacher_of_its_own(folder):
    decoder = libqat.load_model(folder).decoder
    tokens = tokens_for(make())
    teacher = decoder.frozen_copy(torch.bfloat16)
    for name, parameter in teacher.parameters().items():
        assert parameter.dtype == (torch.float32 if "norm" in name else torch.bfloat16)
        assert not parameter.requires_grad
    expected = decoder(tokens).detach()
    with torch.no_grad():
        for parameter in decoder.parameters().values():
            parameter.zero_()
    logits = teacher(tokens)
    assert logits.dtype == torch.bfloat16
    # As under autocast, and the embedding's rows are rounded too.
    assert (logits.float() - expected).square().mean().sqrt() < 0.03 * expected.square().mean().sqrt()


def test_hidden_and_head_are_the_halves_of_forward(folder):
    decoder = libqat.load_model(folder).decoder
    tokens = tokens_for(make())
    hidden = decoder.hidden(tokens)
    assert hidden.shape == (2, 40, 96)
    assert torch.equal(decoder.head(hidden), decoder(tokens))
    # A chunk of positions is another matrix shape, hence another order of sums.
    torch.testing.assert_close(decoder.head(hidden[:, :7]), decoder(tokens)[:, :7], **LOGITS)


def test_set_trainable(folder):
    decoder = libqat.load_model(folder).decoder
    decoder.set_trainable(False)
    assert not decoder(tokens_for(make())).requires_grad
    decoder.set_trainable(True)
    assert decoder(tokens_for(make())).requires_grad


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.tensor([[0, 97]]), r"\[0, 97\), got 97"),
        (torch.tensor([[-1, 5]]), r"got -1"),
        (torch.tensor([1, 2]), r"int64\[B, T\]"),
        (torch.tensor([[1, 2]], dtype=torch.int32), r"int64\[B, T\], got Int"),
        (torch.zeros((1, 0), dtype=torch.int64), "at least one token"),
    ],
)
def test_bad_tokens(folder, tokens, message):
    with pytest.raises(libqat.ArgumentError, match=message):
        libqat.load_model(folder).decoder(tokens)


def test_double_backward_raises(folder):
    decoder = libqat.load_model(folder).decoder
    loss = decoder(tokens_for(make())).square().mean()
    # The engine passes every exception of a C++ node on as a RuntimeError.
    with pytest.raises(RuntimeError, match="expected a first derivative, got a second"):
        torch.autograd.grad(loss, list(decoder.parameters().values()), create_graph=True)
