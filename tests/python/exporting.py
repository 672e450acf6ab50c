"""What the tests of exported files share: tiny checkpoints, tokenizers of each kind, independent readers."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import make_llama
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from libqat import _core

KINDS = ("gpt-2", "smollm", "llama-bpe", "qwen2")
TEXTS = (
    "",
    " ",
    "Hello world",
    "  two  spaces   three    four ",
    "line\nline\n\nline\r\n\r\n  indented\t\ttabs \n",
    "1 22 333 4444 55555 1234567890 3.14159 1e-5 ½ ² Ⅷ ٣٤ 四",
    "don't I'll WE'RE they've 'tis 'S 'lL don’t",
    "def f(x):\n    return x[0] != {'a': -1}  # comment\n\n\nclass A(B): pass",
    "naïve café e\u0301 Ünïcödé ß Привет мир Ελληνικά עברית العربية हिन्दी",
    "日本語のテキスト 한국어 中文字符,。!",
    "emoji 😀👩‍👩‍👧 🇩🇪 ❤️ \u200d \u00a0 \u3000 \ufeff \u2028",
    "\x00\x01\x7f control",
    "<|start|>user\nHi there<|end|>\n<|start|> <tool>x</tool><|end|",
    "!!! ??? ... --- ***bold*** https://example.com/a?b=c&d=e#f user@example.com",
    "word" * 40,
)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
with_dtypes = pytest.mark.parametrize("dtype", DTYPES)
SPECIAL = ("<|start|>", "<|end|>")
VOCAB_SIZE = 400
"""Of models that take a tokenizer of `make_kind`."""


def pre_tokenizer(kind):
    """As in the published tokenizer.json files of GPT-2, SmolLM2, Llama 3 and Qwen 2."""
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if kind == "gpt-2":
        return words
    if kind == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    numbers = {"llama-bpe": r"\p{N}{1,3}", "qwen2": r"\p{N}"}[kind]
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + numbers
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def make_kind(kind, vocab_size):
    """A tokenizer of `kind` with fewer tokens than `vocab_size`, two special ones and a user-defined one."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizer(kind)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 8,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text for text in TEXTS if "<|" not in text], trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return tokenizer


def checkpoint_of(model, grid="q4_0", embedding="q8_0", tokenizer="none", grids=None):
    """A checkpoint of a LlamaForCausalLM: matrices on `grid`, but for those that `grids` names by key."""
    tensors = [(key, value.detach()) for key, value in model.state_dict(keep_vars=True).items()]
    chosen = {key: grid for key, value in tensors if value.dim() == 2}
    chosen |= {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding}
    chosen |= grids or {}
    config = model.config.to_json_string(use_diff=False)
    return _core.freeze_tensors(tensors, chosen, config=config, tokenizer=str(tokenizer), policy="")


MLP, ATTENTION = "model.layers.{}.mlp.{}_proj.weight", "model.layers.{}.self_attn.{}_proj.weight"


def mixed_compressed_tensors(**settings):
    """Widths 2, 3, 4 and 8 with groups, channels and whole tensors, differing from layer to layer."""
    grids = {"model.embed_tokens.weight": "f32", "lm_head.weight": "f32"}
    for layer in range(2):
        grids |= {MLP.format(layer, part): "int2_g32" for part in ("gate", "up")}
        grids[MLP.format(layer, "down")] = ("int3_g64", "int4_tensor")[layer]
        grids |= {ATTENTION.format(layer, part): "int4_channel" for part in "qkv"}
        grids[ATTENTION.format(layer, "o")] = ("int8_g32", "int8_channel")[layer]
    return checkpoint_of(make_llama(**settings), grids=grids)


def mixed_mobile_grids():
    grids = {}
    for layer in range(2):
        for part in ("gate", "up", "down"):
            grids[f"model.layers.{layer}.mlp.{part}_proj.weight"] = "mobile2" if layer else "mobile4"
        grids[f"model.layers.{layer}.self_attn.o_proj.weight"] = "mobile8"
    return grids


def mixed_mobile(embedding="mobile2", **settings):
    model = make_llama(**settings)
    return checkpoint_of(model, grid="mobile4", embedding=embedding, grids=mixed_mobile_grids())


def model_of(checkpoint, **settings):
    """A LlamaForCausalLM in float32 with exactly the checkpoint's weights."""
    model = make_llama(**settings)
    model.load_state_dict(_core.dequantize(checkpoint))
    return model.eval()


def log_probabilities(model, ids):
    """log p(ids[i] | ids[:i]) for i >= 1 in float64, by the reference model."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()


def relative_error(got, expected):
    """Root mean square of the errors, as a share of the spread of what was expected."""
    return float(np.sqrt(np.mean((np.array(got) - expected) ** 2)) / expected.std())


def rows_as_trained(rows, heads):
    """Undoes llama.cpp's order of q and k rows, by reshaping; rows: [R, ...]."""
    return np.ascontiguousarray(
        rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
        .swapaxes(1, 2)
        .reshape(rows.shape)
    )


HF_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def hf_name(gguf_name):
    parts = gguf_name.split(".")
    if parts[0] != "blk":
        return f"{OUTSIDE[parts[0]]}.weight"
    return f"model.layers.{parts[1]}.{HF_NAMES[parts[2]]}.weight"


def read_by_gguf_py(path):
    """state_dict key -> (type name, float32 array): the file as the package gguf reads and decodes it."""
    import gguf

    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    heads = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }
    tensors = {}
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        values = values.reshape(tensor.shape.tolist()[::-1]).astype(np.float32)
        part = tensor.name.split(".")[-2]
        if part in heads:
            values = rows_as_trained(values, heads[part])
        tensors[hf_name(tensor.name)] = (tensor.tensor_type.name, values)
    return tensors


def some_tokens():
    """Two rows of token ids for the models of `make_llama`."""
    return torch.randint(320, (2, 24), generator=torch.Generator().manual_seed(1))


def read_folder(folder):
    """Every tensor of a Hugging Face folder."""
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def broken(folder, change):
    """A copy of an exported folder after change(tensors, config)."""
    copy = folder.parent / "broken"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    tensors, config = read_folder(copy), json.loads((copy / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, copy / "model.safetensors")
    (copy / "config.json").write_text(json.dumps(config))
    return copy
