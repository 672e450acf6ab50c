"""Tiny random models and tokenizers, made here so that no test needs the network."""

import os
from pathlib import Path

import pytest
import torch

import libqat
from libqat import data, ptq

pytest.register_assert_rewrite(
    "command_line", "gguf_families", "random_llama"
)  # helpers that assert or hold fixtures
VOCABULARY = 320


@pytest.fixture(autouse=True)
def two_threads_and_a_seed():
    """The machine that runs the tests may be shared; more threads than that make tiny models slower."""
    torch.set_num_threads(2)
    torch.manual_seed(0)  # what a test draws without a generator of its own depends on no other test


def make_tiny(kind, tied: bool = True, seed: int = 0, **changes):
    """A two-layer {kind}ForCausalLM in float32 whose widths every grid of the presets divides."""
    import transformers

    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**(settings | changes))
    return getattr(transformers, f"{kind}ForCausalLM")(config).float()


def make_llama(tied: bool = True, seed: int = 0, **changes):
    """A tiny LlamaForCausalLM."""
    return make_tiny("Llama", tied, seed, **changes)


def make_tokenizer():
    """A byte-level BPE of SmolLM2's kind with VOCABULARY tokens, trained on Python's own documentation."""
    import shapes

    return shapes.make_tokenizer(shapes.topics()[:5], VOCABULARY)


def logits(model, tokens):
    """Without a graph."""
    with torch.no_grad():
        return model(tokens)


@pytest.fixture
def llama():
    """A tied two-layer Llama."""
    return make_llama()


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory):
    """A Hugging Face folder: config.json, model.safetensors, tokenizer.json. Tests must not write into it."""
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("hf") / "tiny-llama"
    make_llama().save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer(), eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """Some English text."""
    import shapes

    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(shapes.topics()[5:8]), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def ckpt(hf_folder, tmp_path_factory):
    """A checkpoint of the tiny model, rounded without training. Tests must not write into its folder."""
    path = tmp_path_factory.mktemp("ckpt") / "rtn.qat.safetensors"
    loaded = libqat.load_model(hf_folder)
    prepared = libqat.prepare(loaded.decoder, "gguf-q4_0")
    libqat.save(libqat.freeze(prepared, loaded.config, loaded.tokenizer), path)
    return path


@pytest.fixture(scope="session")
def gguf(ckpt):
    """The checkpoint as a file for llama.cpp."""
    path = ckpt.with_name("rtn.gguf")
    libqat.export(libqat.load(ckpt), path)
    return path


@pytest.fixture
def loaded(hf_folder):
    """The tiny model in libqat's decoder."""
    return libqat.load_model(hf_folder)


@pytest.fixture
def windows(hf_folder, text_file):
    """int64 [16, 64] of the text, to calibrate on."""
    ids = data.tokenize(libqat.load_tokenizer(hf_folder), data.read_texts([text_file]))
    return ptq.calibration_windows(ids, 1024, 64)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A folder with a tokenizer of SmolLM2's kind for models with VOCAB_SIZE tokens."""
    from exporting import VOCAB_SIZE, make_kind

    folder = tmp_path_factory.mktemp("tokenizer")
    make_kind("smollm", VOCAB_SIZE).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def smollm2():
    """The real model's file."""
    default = Path(__file__).resolve().parents[2] / "out/cache/smollm2-135m-instruct-q4_1.gguf"
    path = Path(os.environ.get("LIBQAT_SMOLLM2_GGUF", default))
    if not path.is_file():
        pytest.skip(f"needs SmolLM2 at {path} (make quickstart fetches it), or LIBQAT_SMOLLM2_GGUF")
    return path


@pytest.fixture(scope="session")
def mixture():
    """A checkpoint of a Gemma 4 with packed experts."""
    from mixtures import packed  # transformers takes seconds, which other tests need not wait for

    return packed()


@pytest.fixture(scope="session")
def mixture_folder(mixture, tmp_path_factory):
    """It as Compressed Tensors."""
    path = tmp_path_factory.mktemp("experts") / "out"
    with pytest.warns(UserWarning, match=r"layers\.0\.experts.*transformers.*leaves these 8 stacks"):
        libqat.export(mixture, path, target="compressed-tensors")
    return path
