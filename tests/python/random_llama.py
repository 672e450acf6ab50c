"""Random llamas of transformers, and a folder of one."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

# Two float32 implementations of the same sums in another order: observed differences are below 1e-5 for
# logits of size 1 to 10. The bound leaves a factor of ten.
LOGITS = {"atol": 1e-4, "rtol": 1e-4}


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
    """Takes keys out of config.json and puts others in."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in drop}))
