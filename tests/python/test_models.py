"""libqat's decoder against transformers' LlamaForCausalLM, and its behaviour on broken model folders."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import libqat
from libqat import _core

# Two float32 implementations of the same sums in another order: observed differences are below 1e-5 for
# logits of size 1 to 10. The bound leaves a factor of ten.
LOGITS = {"atol": 1e-4, "rtol": 1e-4}

SHAPES = {
    "tied, grouped heads": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "one key-value head": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "ungrouped heads": {"num_key_value_heads": 6, "tie_word_embeddings": True},
    "head_dim apart from hidden / heads": {"head_dim": 8, "tie_word_embeddings": False},
    "biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "another rope base and eps": {"rope_theta": 500.0, "rms_norm_eps": 1e-3, "tie_word_embeddings": True},
}


def make(seed=0, kind=(LlamaConfig, LlamaForCausalLM), **changes):
    """A random model whose logits are far from uniform, whose norm gains are not 1 and whose biases not 0."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=97, hidden_size=96, intermediate_size=160, num_hidden_layers=3)
    heads = dict(
        num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.1
    )
    config, model = kind
    model = model(config(**(sizes | heads | changes))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif "bias" in name:
                parameter.uniform_(-1, 1)
    return model


def tokens_for(model, batch=2, length=40):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, model.config.vocab_size, (batch, length), generator=generator)


@pytest.fixture
def folder(tmp_path):
    """A saved tied model that a test may damage."""
    make(tie_word_embeddings=True).save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder, drop=(), **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in drop}))


def edit_tensors(folder, edit):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


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


def test_equal_stored_head_stays_tied(folder):
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    loaded = libqat.load_model(folder)
    assert "lm_head.weight" not in loaded.decoder.parameters()
    assert json.loads(loaded.config)["tie_word_embeddings"] is True


def test_different_stored_head_unties_as_in_transformers(folder):
    edit_tensors(
        folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].flip(0).contiguous()})
    )
    loaded = libqat.load_model(folder)
    assert json.loads(loaded.config)["tie_word_embeddings"] is False
    reference = LlamaForCausalLM.from_pretrained(folder)
    tokens = tokens_for(reference)
    with torch.no_grad():
        torch.testing.assert_close(loaded.decoder(tokens), reference(tokens).logits, **LOGITS)


def test_known_derived_tensors_are_passed_over(folder):
    edit_tensors(folder, lambda t: t.update({"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    libqat.load_model(folder)


def test_every_tensor_that_does_not_fit_is_listed(folder):
    def damage(tensors):
        del tensors["model.layers.0.mlp.up_proj.weight"], tensors["model.norm.weight"]
        tensors["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(32, 95)
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(96)

    edit_tensors(folder, damage)
    with pytest.raises(libqat.FileError) as caught:
        libqat.load_model(folder)
    message = str(caught.value)
    assert "missing model.layers.0.mlp.up_proj.weight, model.norm.weight;" in message
    assert "misshapen model.layers.1.self_attn.k_proj.weight [32, 95] instead of [32, 96];" in message
    assert "unknown model.layers.0.self_attn.q_proj.bias" in message
    assert str(folder) in message


def test_integer_weights_are_refused(folder):
    edit_tensors(folder, lambda t: t.update({"model.norm.weight": torch.ones(96, dtype=torch.int32)}))
    with pytest.raises(
        libqat.UnsupportedError, match=r"model\.norm\.weight: expected F32, F16 or BF16, got I32"
    ):
        libqat.load_model(folder)


@pytest.mark.parametrize(
    "key",
    [
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    ],
)
def test_missing_config_key_is_named(folder, key):
    edit_config(folder, drop=[key])
    with pytest.raises(libqat.FileError, match=f'config.json: config: "{key}": expected .*, got nothing'):
        libqat.load_model(folder)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden_size": "96"}, libqat.FileError, '"hidden_size": expected a number, got "96"'),
        ({"num_hidden_layers": 0}, libqat.FileError, '"num_hidden_layers": expected a whole number above 0'),
        ({"vocab_size": 2**63 + 5}, libqat.FileError, '"vocab_size": expected a whole number'),
        ({"vocab_size": 2**31, "hidden_size": 2**31 - 2, "head_dim": 16}, libqat.FileError, "weights"),
        ({"num_hidden_layers": 2**31}, libqat.FileError, '"num_hidden_layers": expected at most 4096'),
        ({"num_key_value_heads": 4}, libqat.FileError, '"num_key_value_heads": expected a divisor'),
        ({"head_dim": 15}, libqat.FileError, '"head_dim": expected an even number'),
        ({"rms_norm_eps": -1.0}, libqat.FileError, '"rms_norm_eps"'),
        ({"tie_word_embeddings": 1}, libqat.FileError, '"tie_word_embeddings": expected true or false'),
        ({"rope_parameters": {"rope_theta": 0}}, libqat.FileError, '"rope_theta"'),
        ({"rope_parameters": []}, libqat.FileError, '"rope_parameters": expected an object'),
        (
            {"model_type": "mistral"},
            libqat.UnsupportedError,
            '"model_type": expected .*"llama" or .*, got "mistral"',
        ),
        ({"hidden_act": "gelu"}, libqat.UnsupportedError, '"hidden_act"'),
        ({"attention_bias": 1}, libqat.FileError, '"attention_bias": expected true or false'),
        ({"attention_bias": True}, libqat.FileError, r"missing .*k_proj\.bias"),
        ({"mlp_bias": True}, libqat.FileError, r"missing .*up_proj\.bias"),
        ({"use_sliding_window": True}, libqat.UnsupportedError, '"use_sliding_window": expected false'),
        ({"layer_types": ["full_attention"] * 2}, libqat.FileError, '"layer_types.2": expected the kind'),
        (
            {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            libqat.FileError,
            '"sliding_window": expected a whole number',
        ),
        ({"layer_types": ["linear_attention"] * 3}, libqat.UnsupportedError, '"layer_types.0"'),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            libqat.UnsupportedError,
            '"quantization_config"',
        ),
    ],
)
def test_config_values_that_cannot_be_computed(folder, changes, error, message):
    edit_config(folder, **changes)
    with pytest.raises(error, match=message) as caught:
        libqat.load_model(folder)
    assert str(folder) in str(caught.value)


def test_head_dim_must_divide_when_absent(folder):
    edit_config(folder, drop=["head_dim"], hidden_size=97)
    with pytest.raises(libqat.FileError, match='"hidden_size": expected a multiple of num_attention_heads'):
        libqat.load_model(folder)


def test_files_that_are_not_models(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    for path, message in [
        (empty, "config.json"),
        (empty / "absent", "got nothing there"),
        (folder / "model.safetensors", "expected a Hugging Face directory or a .gguf file"),
    ]:
        with pytest.raises(libqat.FileError, match=message):
            libqat.load_model(path)
    (empty / "config.json").write_text("{")
    with pytest.raises(libqat.FileError, match="expected JSON"):
        libqat.load_model(empty)
    shutil.copy(folder / "config.json", empty)
    with pytest.raises(libqat.FileError, match="safetensors"):
        libqat.load_model(empty)


def test_truncated_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(libqat.FileError, match=r"model\.safetensors"):
        libqat.load_model(folder)
