"""Sizes from configurations: the published figures, and files that hold what was planned."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import make_llama
from decoder_shapes import SHAPES, config_of
from exporting import checkpoint_of
from families import GEMMA4_SHAPES, POLICY, make_family
from libqat.cli.inspect import describe
from libqat.configurations import model_config, model_config_names

import libqat
from libqat import _core, sizes

PAGE = Path(__file__).resolve().parents[2] / "docs" / "sizes.py"


@pytest.fixture(scope="module")
def tables():
    """docs/sizes.py as a module."""
    spec = importlib.util.spec_from_file_location("sizes_page", PAGE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Millions of weights of the published models, counted from their files by hand.
MILLIONS = {
    "gemma-4-e2b": [402.65, 2348.81, 13.76, 27.53, 278.40, 1557.14, None, None, 0.29, 4628.6],
    "gemma-4-e4b": [671.09, 2818.57, 27.53, 55.05, 587.20, 3303.01, None, None, 0.56, 7463.0],
    "gemma-4-12b": [1006.63, None, None, None, 2406.48, 8493.47, None, None, 0.77, 11907.4],
    "gemma-4-26b-a4b": [738.20, None, None, None, 1110.18, 535.27, 22837.99, 10.81, 0.70, 25233.1],
    "gemma-4-31b": [1409.29, None, None, None, 8477.74, 20808.99, None, None, 1.33, 30697.3],
}
GIGABYTES = {
    "gemma-4-e2b": [9.257, 2.605, 2.708, 3.334, 3.980, 6.58],
    "gemma-4-e4b": [14.926, 4.200, 4.373, 5.139, 5.945, 9.26],
    "gemma-4-12b": [23.815, 6.701, 6.960, 6.960, 7.204, 8.15],
    "gemma-4-26b-a4b": [50.466, 14.233, 14.424, 14.424, 14.602, 15.29],
    "gemma-4-31b": [61.395, 17.272, 17.635, 17.635, 17.977, 19.30],
}
OTHERS = {  # billions of weights, bf16 GB
    "qwen3-0.6b": (0.596, 1.19),
    "qwen3-1.7b": (1.721, 3.44),
    "qwen3-4b": (4.022, 8.05),
    "qwen3-8b": (8.191, 16.4),
    "qwen3-14b": (14.77, 29.5),
    "qwen3-32b": (32.76, 65.5),
    "gemma-3-270m": (0.268, 0.536),
    "gemma-3-1b": (1.000, 2.000),
    "gemma-3-4b": (3.880, 7.760),
    "gemma-3-12b": (11.77, 23.53),
    "gemma-3-27b": (27.01, 54.02),
    "smollm2-135m": (0.1345, 0.269),
    "llama-3.2-1b": (1.236, 2.472),
    "llama-3.1-8b": (8.030, 16.06),
}


def places(figure):
    """Half a unit of the last place that a figure shows."""
    return 0.5 * 10 ** -len(str(figure).partition(".")[2]) * 1.0001


@pytest.mark.parametrize("model", MILLIONS)
def test_weights_by_group(model):
    groups = {group.group: group.weights / 1e6 for group in sizes.size(model).groups()}
    names = [group for group in sizes.GROUPS if group not in ("head", "other")]
    for name, expected in zip(names, MILLIONS[model], strict=False):
        assert (expected is None) == (name not in groups), name
        # The router's scales are counted with it here, with the norms there: 0.09 M.
        slack = 0.1 if "26b" in model and name in ("router", "norms") else places(expected or 0.01)
        assert abs(groups.get(name, 0) - (expected or 0)) <= slack, name
    assert abs(sum(groups.values()) - MILLIONS[model][-1]) <= places(MILLIONS[model][-1])


@pytest.mark.parametrize("model", GIGABYTES)
def test_published_sizes(model, tables):
    for recipe, expected in zip(tables.RECIPES, GIGABYTES[model], strict=True):
        # Beyond the rounding, 0.05 MB: scalars, which the published count puts in another type.
        assert abs(tables.gigabytes(model, recipe) - expected) <= places(expected) + 5e-5, recipe


def test_published_files_differ_by_header_and_vocabulary(tables):
    for model, policy, target, size, _ in tables.PUBLISHED_FILES:
        rest = size - sizes.size(model, policy, format=target).bytes
        assert 15.80e6 < rest < 15.85e6, model  # 262,144 tokens and their scores and merges


def test_the_mobile_recipe(tables):
    e2b = sizes.size("gemma-4-e2b", "gemma4-e2b-mobile", format="gemma-mobile")
    assert abs(e2b.bytes_without_layer_embedding / 1e6 - 897.5) <= places(897.5)
    assert abs(e2b.bytes_without_layer_embedding / 2**30 - 0.836) <= places(0.836)
    by_group = {group.group: group for group in e2b.groups()}
    assert by_group["head"].bytes == by_group["embedding"].bytes + 8  # a copy, and scales of activations
    # 35 scales of 4 bytes stand beside 35 * 256 codes of 4 bits.
    assert by_group["layer_embedding"].bytes == 262144 * 35 * (128 + 4)
    for model, expected in (("gemma-4-e2b", 2.170), ("gemma-4-e4b", 3.204)):
        found = sizes.size(model, tables.MOBILE_IN_GGUF[model], format="gguf").bytes
        assert abs(found / 1e9 - expected) <= places(expected)


@pytest.mark.parametrize("model", OTHERS)
def test_other_models(model):
    found = sizes.size(model)
    weights, gigabytes = OTHERS[model]
    assert abs(found.weights / 1e9 - weights) <= places(weights)
    assert abs(found.bytes / 1e9 - gigabytes) <= 2 * places(gigabytes)  # published as twice the rounded count


def test_gemma_3_files(tables):
    published = {"gemma-3-1b": 0.997, "gemma-3-4b": 3.149, "gemma-3-12b": 8.068, "gemma-3-27b": 17.224}
    for model, expected in published.items():
        found = sizes.size(model, tables.gguf("f16"), format="gguf").bytes / 1e9
        # Files end the table at the tokenizer's 262,144 tokens, configurations at 262,208: up to 0.7 MB.
        assert abs(found - expected) <= 0.0012, model


def test_the_page_has_these_tables(tables):
    page = tables.PAGE.read_text(encoding="utf-8")
    assert set(tables.TABLES_BY_NAME) == set(tables.re.findall(r"<!-- table: (\w+) -->", page))
    assert tables.filled(page) == page, "run python docs/sizes.py --write"


# ---- the writers' own word


def parts_of(path):
    """name -> bytes of what a file or folder holds."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return {row["name"]: row["bytes"] for file in files for row in describe(file)["tensors"]}


@pytest.mark.parametrize(
    ("target", "grid", "embedding", "dtype"),
    [
        ("gguf", "q4_0", "q6_k", "bfloat16"),
        ("hf", "q4_0", "q8_0", "bfloat16"),
        ("hf", "q4_0", "q8_0", "float32"),
        ("compressed-tensors", "int4_g32@bf16:bf16", "f32", "bfloat16"),
        ("compressed-tensors", "int3_channel", "f32", "float32"),
        ("gemma-mobile", "mobile4", "mobile2", "float32"),
        ("mlx", "mlx4_g32@bf16", "mlx6_g64@bf16", "bfloat16"),
    ],
)
def test_a_file_holds_what_was_planned(target, grid, embedding, dtype, tmp_path):
    """From numbers, and from shapes alone."""
    model = make_llama(hidden_size=256, num_attention_heads=4)
    checkpoint = checkpoint_of(model, grid, embedding)
    path = tmp_path / "out"
    options = {} if target in ("gguf", "mlx") else {"dtype": dtype}
    libqat.export(checkpoint, path, target=target, **options)
    written = parts_of(path)
    tensors = [
        (key, "embedding" if "embed" in key else "linear" if value.dim() == 2 else "other", value.shape)
        for key, value in model.state_dict().items()
        if key != "lm_head.weight"
    ]
    rules = [
        {"match": ".*embed_tokens", "weight": embedding},
        {"match": ".*", "kind": "linear", "weight": grid},
    ]
    policy = libqat.Policy.from_json(json.dumps({"rules": rules}))
    empty = _core.outline(tensors, policy, torch.float32, checkpoint.config)
    for source in (checkpoint, empty):
        planned, refused = _core.plan_export(source, target, dtype)
        assert {part.name: part.bytes for part in planned} == written
        assert not refused


@pytest.mark.parametrize("shape", GEMMA4_SHAPES)
def test_a_gguf_of_gemma_4_holds_what_was_planned(shape, tmp_path):
    model = make_family(shape)
    prepared = libqat.prepare(model, POLICY)
    libqat.export(libqat.freeze(prepared, tokenizer="none"), tmp_path / "model.gguf")
    config = tmp_path / "config.json"
    config.write_text(model.config.to_json_string(), encoding="utf-8")
    planned = sizes.size(config, POLICY, format="gguf", dtype="f32")
    assert {row.name: row.bytes for row in planned.tensors} == parts_of(tmp_path / "model.gguf")
    assert planned.weights == sum(
        value.numel() for name, value in model.state_dict().items() if name != "lm_head.weight"
    )


@pytest.mark.parametrize("name", SHAPES)
def test_every_tensor_has_a_group_and_is_counted_once(name, tmp_path):
    (tmp_path / "config.json").write_text(config_of(name).to_json_string(), encoding="utf-8")
    found = sizes.size(tmp_path, dtype="f32")
    tensors = _core.parameter_shapes(config_of(name).to_json_string())
    assert found.weights == sum(math.prod(shape) for _, shape, _, _ in tensors)
    assert found.bytes == 4 * found.weights
    assert found.bits_per_weight == 32
    assert {row.name for row in found.tensors} == {name for name, *_ in tensors}
    assert all(row.group != "other" or row.name.endswith("bias") for row in found.tensors)


# ---- names, paths, refusals


def test_configurations_by_name_and_path(tmp_path):
    names = model_config_names()
    assert {"gemma-4-e2b", "gemma-4-31b", "gemma-3-270m", "qwen3-32b", "smollm2-135m"} <= set(names)
    for name in names:
        assert json.loads(model_config(name))["model_type"], name
        assert _core.parameter_shapes(model_config(name)), name
    (tmp_path / "config.json").write_text(model_config("qwen3-0.6b"), encoding="utf-8")
    assert model_config(tmp_path) == model_config(tmp_path / "config.json") == model_config("qwen3-0.6b")
    with pytest.raises(
        libqat.ArgumentError, match=r"model_config: expected .*gemma-4-e2b.*, got \"gemma-5\""
    ):
        model_config("gemma-5")
    with pytest.raises(libqat.FileError, match="expected a readable file"):
        model_config(tmp_path / "none.json")
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(libqat.FileError, match="expected UTF-8 text"):
        model_config(tmp_path)


def test_refusals(tmp_path):
    with pytest.raises(libqat.ArgumentError, match="size: dtype: expected one of bf16, f16, f32"):
        sizes.size("qwen3-0.6b", dtype="fp8")
    with pytest.raises(libqat.ArgumentError, match="plan_export: target: expected one of gguf"):
        sizes.size("qwen3-0.6b", format="onnx")
    found = sizes.size("gemma-4-e2b", "gemma4-e2b-mobile", format="compressed-tensors")
    assert any("embedding" in each.reason for each in found.refused)
    policy = libqat.Policy.from_json('{"rules": []}')
    with pytest.raises(libqat.ArgumentError, match="outline: a: expected each tensor once"):
        _core.outline([("a", "linear", (2, 2))] * 2, policy, torch.float32)
