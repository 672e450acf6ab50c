"""Experts in Compressed-Tensors folders: a layer per expert and matrix, llm-compressor's form for vLLM.

The package `compressed-tensors` unpacks the trained weights; transformers joins them where it has a rule.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from exporting import read_folder
from families import make_family
from mixtures import (
    DEPTH,
    DOWN,
    EXPERTS,
    GATE_UP,
    LAYERS,
    STACKS,
    TARGET,
    config_of,
    parts_of,
    prepared,
    targets_of,
)

import libqat
from libqat import _core


def test_the_package_unpacks_the_trained_experts(mixture, mixture_folder):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_name

    config, stored = QuantizationConfig.model_validate(config_of(mixture_folder)), read_folder(mixture_folder)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    parts = parts_of(_core.dequantize(mixture))
    assert len(parts) == DEPTH * EXPERTS * 3
    assert {name for name in stored if ".experts." in name} == {
        f"{part}.weight_{what}" for part in parts for what in ("packed", "scale", "shape")
    }
    for part, weight in parts.items():
        groups = config.config_groups.values()
        [scheme] = [g for g in groups if any(match_name(part, target) for target in g.targets)]
        local = {name: stored[f"{part}.{name}"] for name in compressor.compression_param_names(scheme)}
        assert torch.equal(compressor.decompress(local, scheme)["weight"], weight), part


def test_the_folder_is_taken_up_again(mixture, mixture_folder, tmp_path):
    assert libqat.verify(mixture_folder, mixture) == []
    again = libqat.import_checkpoint(mixture_folder)
    assert again.grids == mixture.grids
    weights, expected = _core.dequantize(again), _core.dequantize(mixture)
    assert all(torch.equal(weights[key], weight) for key, weight in expected.items())
    with pytest.warns(UserWarning, match="experts"):
        libqat.export(again, tmp_path / "again", target=TARGET)
    for name in ("model.safetensors", "libqat.json"):
        assert (tmp_path / "again" / name).read_bytes() == (mixture_folder / name).read_bytes(), name
    rules = [{"match": match, "weight": "int4_g32"} for match in (STACKS, *LAYERS)]
    policy = {"rules": rules, "estimator": {"kind": "ste", "scale": "learned"}}
    model = libqat.prepare(make_family("26b", seed=1), policy)
    libqat.take_up(model, again)
    weights = _core.dequantize(libqat.freeze(model, tokenizer="none"))
    assert all(torch.equal(weights[key], expected[key]) for key in mixture.quantized)


def test_the_decoder_writes_the_same_bytes(tmp_path, mixture_folder):
    """Its stacks have other rows, those of single experts, and may have a scale for each."""
    make_family("26b").save_pretrained(tmp_path / "float")
    loaded = libqat.load_model(tmp_path / "float")
    for grid in ("int4_g32", "int8_channel"):
        rules = [{"match": match, "weight": grid} for match in (STACKS, *LAYERS)]
        model = libqat.load_model(tmp_path / "float").decoder
        checkpoint = libqat.freeze(libqat.prepare(model, {"rules": rules}), loaded.config, "none")
        with pytest.warns(UserWarning, match="experts"):
            libqat.export(checkpoint, tmp_path / grid, target=TARGET)
        assert libqat.verify(tmp_path / grid, checkpoint) == []
        assert libqat.import_checkpoint(tmp_path / grid).grids == checkpoint.grids
    ours, theirs = (read_folder(path) for path in (tmp_path / "int4_g32", mixture_folder))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---- consumers


@pytest.fixture
def no_rules():
    """transformers as it is when a program starts, here and afterwards."""
    from transformers import conversion_mapping

    def forget():
        conversion_mapping._checkpoint_conversion_mapping_cache = None
        conversion_mapping.USER_REGISTERED_MAPPINGS.discard("gemma4_text")

    forget()
    yield
    forget()


@pytest.fixture
def joining_rule(no_rules):
    """What the page of the format tells to load in."""
    page = Path(__file__).resolve().parents[2] / "docs" / "formats" / "compressed-tensors.md"
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    [block] = [block for block in blocks if "register_checkpoint_conversion_mapping" in block]
    namespace = {}
    exec(compile(block, page.name, "exec"), namespace)
    return namespace["joined_experts"]


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)


def assert_same(model, checkpoint, twin):
    """Weights and logits, bit for bit."""
    weights = _core.dequantize(checkpoint)
    twin.load_state_dict(weights, strict=False)  # a tied head has no weight of its own
    tokens = torch.arange(30)[None] * 7 % 400
    with torch.no_grad():
        logits = model.eval()(tokens).logits
        assert torch.equal(logits, twin.eval()(tokens).logits)
    state = model.state_dict()
    assert [key for key, weight in weights.items() if not torch.equal(state[key], weight)] == []


def test_transformers_joins_them_by_a_rule(mixture, mixture_folder, joining_rule):
    with joining_rule():
        model, info = load(mixture_folder)
    assert not any(info.values()), info
    assert_same(model, mixture, make_family("26b", seed=1))


def test_without_it_the_caution_holds(mixture, mixture_folder, no_rules):
    """When this fails, transformers has learned the rule."""
    _, info = load(mixture_folder)
    stacks = {stack.format(layer) for stack in (DOWN, GATE_UP) for layer in range(DEPTH)}
    assert set(info["missing_keys"]) == stacks
    [caution] = libqat.cautions(mixture, TARGET)
    assert (caution.tensor, caution.grid) == (DOWN.format(0), "int4_g32")
    assert libqat.cautions(mixture, "gguf") == []


def make_qwen():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 400, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, **experts, initializer_range=0.1)).eval()


def test_names_of_other_mixtures_are_not_known():
    stack = [(DOWN.format(0), torch.randn(4, 64, 32))]
    config = json.dumps({"model_type": "mixtral"})
    other = _core.freeze_tensors(
        stack, {DOWN.format(0): "int4_g32"}, config=config, tokenizer="none", policy=""
    )
    [caution] = libqat.cautions(other, TARGET)
    assert "names for a mixtral is not known" in caution.reason


def test_qwen3_needs_no_rule(tmp_path, no_rules):
    rules = [{"match": match, "weight": "int4_g32"} for match in (STACKS, LAYERS[0])]
    checkpoint = libqat.freeze(libqat.prepare(make_qwen(), {"rules": rules}), tokenizer="none")
    assert libqat.cautions(checkpoint, TARGET) == []
    libqat.export(checkpoint, tmp_path / "out", target=TARGET)
    model, info = load(tmp_path / "out")
    assert not any(info.values()), info
    assert_same(model, checkpoint, make_qwen())
    assert libqat.verify(tmp_path / "out", libqat.import_checkpoint(tmp_path / "out")) == []


VLLM_NAMES = ("model.layers.2.experts.0.{}", "model.layers.2.moe.experts.0.{}")
"""Which vLLM looks for in the configuration: 0.32, and releases of April 2026."""


@pytest.mark.parametrize("part", ["gate_proj", "up_proj", "down_proj"])
def test_vllm_finds_the_group(mixture_folder, part):
    targets = [target.removeprefix("re:") for target in targets_of(mixture_folder)[4]]
    for name in VLLM_NAMES:
        assert [t for t in targets if re.match(t, name.format(part))]
    assert not [t for t in targets if re.match(t, "model.layers.2.router.proj")]
    assert config_of(mixture_folder)["ignore"] == [
        f"model.layers.{layer}.router.proj" for layer in range(DEPTH)
    ]


def test_vllm_finds_the_text_part_of_a_model_that_sees(mixture, tmp_path):
    """It calls `model.language_model` `language_model.model`, but not inside regular expressions."""
    floats = {key: value for key, value in _core.dequantize(mixture).items() if key != "lm_head.weight"}
    renamed = [(key.replace("model.", "model.language_model.", 1), value) for key, value in floats.items()]
    chosen = {key: "int4_g32" for key, value in renamed if value.dim() == 3 or key.endswith("_proj.weight")}
    config = json.loads(mixture.config)
    outer = {"model_type": "gemma4", "text_config": config, "tie_word_embeddings": True}
    other = _core.freeze_tensors(renamed, chosen, config=json.dumps(outer), tokenizer="none", policy="")
    with pytest.warns(UserWarning, match="experts"):
        libqat.export(other, tmp_path / "out", target=TARGET)
    targets = [target.removeprefix("re:") for target in targets_of(tmp_path / "out")[4]]
    for parent in ("model.language_model", "language_model.model"):
        for name in ("self_attn.q_proj", "experts.3.up_proj", "mlp.down_proj"):
            assert [t for t in targets if re.match(t, f"{parent}.layers.1.{name}")], name
    assert libqat.verify(tmp_path / "out", other) == []
    assert libqat.import_checkpoint(tmp_path / "out").grids == other.grids


# ---- Gemma's mobile folders


def test_mobile_folders_keep_experts_float(mixture):
    reasons = {row.tensor: row.reason for row in libqat.can_export(mixture, "gemma-mobile")}
    assert "unquantized experts" in reasons[DOWN.format(0)]
    model = libqat.freeze(prepared([(LAYERS[0], "mobile4")]), tokenizer="none")
    assert libqat.can_export(model, "gemma-mobile") == []
    [caution] = libqat.cautions(model, "gemma-mobile")
    experts = DEPTH * EXPERTS * 3 * 64 * 64
    weights = {key: value for key, value in _core.dequantize(model).items() if key != "lm_head.weight"}
    everything = sum(value.numel() for value in weights.values())
    assert caution.tensor == DOWN.format(0)
    assert f"8 stacks of them, {experts} of {everything} weights, stay float" in caution.reason
