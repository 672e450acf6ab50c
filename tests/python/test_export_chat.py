"""Chat templates, ends of generation and sampling defaults on their way into a GGUF and llama.cpp."""

import json

import gguf
import pytest
from conftest import make_llama
from exporting import VOCAB_SIZE, checkpoint_of, make_kind

import libqat
from libqat import llama_cpp

TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
TOOLS = "tools: {{ messages[0]['content'] }}"
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Héllo {{ 1 }} ‘world’"},
]
needs_llama_cpp = pytest.mark.skipif(
    not llama_cpp.available(), reason="needs xllamacpp: pip install xllamacpp"
)


def tokenizer_of(template):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=make_kind("smollm", VOCAB_SIZE),
        bos_token="<|start|>",
        eos_token="<|end|>",
        chat_template=template,
    )


def exported(folder, generation_config=None):
    """The metadata of a GGUF made with the tokenizer in `folder`."""
    if generation_config is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation_config))
    checkpoint = checkpoint_of(make_llama(vocab_size=VOCAB_SIZE), tokenizer=folder)
    libqat.export(checkpoint, folder / "a.gguf")
    return {name: field.contents() for name, field in gguf.GGUFReader(folder / "a.gguf").fields.items()}


@pytest.mark.parametrize(
    "template", [TEMPLATE, {"default": TEMPLATE, "tool_use": TOOLS}], ids=["one", "named"]
)
def test_templates_as_transformers_writes_them(tmp_path, template):
    tokenizer_of(template).save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").exists()
    fields = exported(tmp_path)
    assert fields["tokenizer.chat_template"] == TEMPLATE
    if isinstance(template, dict):
        assert (tmp_path / "additional_chat_templates" / "tool_use.jinja").exists()
        assert fields["tokenizer.chat_template.tool_use"] == TOOLS
        assert fields["tokenizer.chat_templates"] == ["tool_use"]


def test_templates_in_older_tokenizer_configs(tmp_path):
    tokenizer_of(None).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    assert exported(tmp_path)["tokenizer.chat_template"] == TEMPLATE
    named = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": TOOLS}]
    path.write_text(json.dumps(config | {"chat_template": named}))
    fields = exported(tmp_path)
    assert fields["tokenizer.chat_template"] == TEMPLATE
    assert fields["tokenizer.chat_template.tool_use"] == TOOLS


def test_generation_config_as_transformers_writes_it(tmp_path):
    from transformers import GenerationConfig

    tokenizer_of(TEMPLATE).save_pretrained(tmp_path)
    settings = {"temperature": 0.6, "top_p": 0.9, "top_k": 40, "do_sample": True}
    GenerationConfig(bos_token_id=0, eos_token_id=[1, 5, 9], pad_token_id=2, **settings).save_pretrained(
        tmp_path
    )
    fields = exported(tmp_path)
    ids = {
        name: fields.get(f"tokenizer.ggml.{name}_token_id")
        for name in ("bos", "eos", "eot", "eom", "padding")
    }
    assert ids == {"bos": 0, "eos": 1, "eot": 5, "eom": 9, "padding": 2}
    sampling = {name: fields[f"general.sampling.{name}"] for name in ("temp", "top_p", "top_k")}
    assert sampling == pytest.approx({"temp": 0.6, "top_p": 0.9, "top_k": 40})


def test_everything_goes_on_from_gguf_to_gguf_and_to_a_folder(tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = tokenizer_of({"default": TEMPLATE, "tool_use": TOOLS})
    tokenizer.save_pretrained(tmp_path)
    settings = {"temperature": 0.6, "top_k": 40, "do_sample": True, "eos_token_id": [1, 5]}
    fields = exported(tmp_path, settings)
    source = tmp_path / "a.gguf"
    checkpoint = checkpoint_of(make_llama(vocab_size=VOCAB_SIZE), tokenizer=source)
    libqat.export(checkpoint, tmp_path / "b.gguf")
    again = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "b.gguf").fields.items()}
    copied = [name for name in fields if name.startswith(("tokenizer.", "general.sampling."))]
    assert len(copied) >= 13
    assert {name: again[name] for name in copied} == {name: fields[name] for name in copied}

    folder = tmp_path / "hf"
    libqat.export(checkpoint, folder, target="hf")
    read = AutoTokenizer.from_pretrained(folder)
    for text in ("Hello  world 123\n", "<|start|>user\n<tool>é 日本<|end|>"):
        assert read(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert read.decode(read(text)["input_ids"]) == text
    assert (read.bos_token, read.eos_token, read.model_max_length) == ("<|start|>", "<|end|>", 128)
    for name in ("default", "tool_use"):
        prompts = [
            each.apply_chat_template(MESSAGES, chat_template=name, tokenize=False)
            for each in (read, tokenizer)
        ]
        assert prompts[0] == prompts[1]
    generation = GenerationConfig.from_pretrained(folder)
    assert (generation.temperature, generation.top_k, generation.eos_token_id) == (0.6, 40, [1, 5])


def test_a_beginning_token_is_kept_on_the_way_to_a_folder(tmp_path):
    from transformers import AutoTokenizer

    tokenizer_of(None).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"add_bos_token": True}))
    assert exported(tmp_path)["tokenizer.ggml.add_bos_token"] is True
    checkpoint = checkpoint_of(make_llama(vocab_size=VOCAB_SIZE), tokenizer=tmp_path / "a.gguf")
    libqat.export(checkpoint, tmp_path / "hf", target="hf")
    read = AutoTokenizer.from_pretrained(tmp_path / "hf")
    plain = libqat.load_tokenizer(tmp_path / "a.gguf").encode("Hello").ids
    assert read("Hello")["input_ids"] == [read.bos_token_id, *plain]
    assert read("Hello", "Hello")["input_ids"] == [read.bos_token_id, *plain] * 2


@needs_llama_cpp
def test_llama_cpp_applies_the_template_and_stops_at_each_end(tmp_path):
    tokenizer = tokenizer_of(TEMPLATE)
    tokenizer.save_pretrained(tmp_path)
    ends = [tokenizer.eos_token_id, 5]
    exported(tmp_path, {"eos_token_id": ends})
    expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert expected.startswith("<|start|>system\nBe brief.<|end|>\n")
    with llama_cpp.LlamaCpp(tmp_path / "a.gguf") as llama:
        assert llama.chat_prompt(MESSAGES) == expected
        assert llama.tokenize(expected) == tokenizer(expected)["input_ids"]
        assert llama.chat(MESSAGES, 4) == llama.generate(expected, 4)


# ---- the real model


def test_smollm2_in_a_folder_and_in_llama_cpp(tmp_path, smollm2):
    """The GGUF's model at Q4_0 as a folder that transformers runs, and as a GGUF that chats."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = libqat.load_model(smollm2)
    prepared = libqat.prepare(loaded.decoder, "gguf-q4_0")
    checkpoint = libqat.freeze(prepared, loaded.config, loaded.tokenizer)
    libqat.export(checkpoint, tmp_path / "hf", target="hf")
    assert libqat.verify(tmp_path / "hf", checkpoint) == []
    manifest = json.loads((tmp_path / "hf" / "libqat.json").read_text())
    # Rounding to nearest by ggml's own rules: every q4_0 block has its code -8, every q8_0 block its 127.
    assert (manifest["dtype"], manifest["exact"], manifest["requantizes_exactly"]) == ("float32", True, True)

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = 'Les élèves écrivent 日本語 — in 1984, 2 + 2 = 4.\n\tif (x) { return "ok"; }<|im_end|>'
    ids = tokenizer(text)["input_ids"]
    with torch.no_grad():
        tokens = torch.tensor([ids])
        # Logits reach 30, where float32 numbers are 2e-6 apart, and the sums run through 30 layers.
        torch.testing.assert_close(model(tokens).logits, loaded.decoder(tokens), atol=2e-4, rtol=1e-4)
    if not llama_cpp.available():
        return
    libqat.export(checkpoint, tmp_path / "a.gguf")
    messages = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    with llama_cpp.LlamaCpp(tmp_path / "a.gguf") as llama:
        assert llama.tokenize(text) == ids
        assert llama.chat_prompt(messages) == prompt
        answer = llama.chat(messages, 12)
        assert answer == llama.generate(prompt, 12).removesuffix("<|im_end|>")
    assert "Paris" in answer
