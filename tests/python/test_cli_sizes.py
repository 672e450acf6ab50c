"""`libqat size` and `libqat plan-memory`."""

import json

import pytest
from command_line import run, works
from libqat.configurations import model_config

from libqat import memory, sizes

NAMED = ("--model-config", "gemma-4-e2b")
MOBILE = ("--policy", "gemma4-e2b-mobile")


def test_size_prints_groups_and_totals():
    said = works("size", *NAMED, "--policy", "gemma4-q4_0", "--format", "gguf")
    for words in ("per-layer embedding table", "q6_k", "3,333,699,724", "without the per-layer table"):
        assert words in said
    assert "blk.0" not in said
    assert "blk.34.ffn_down.weight" in works("size", *NAMED, "--format", "gguf", "--tensors")


def test_size_as_json():
    found = json.loads(works("size", *NAMED, *MOBILE, "--format", "gemma-mobile", "--json"))
    expected = sizes.size("gemma-4-e2b", "gemma4-e2b-mobile", format="gemma-mobile")
    assert found["bytes"] == expected.bytes == sum(row["bytes"] for row in found["tensors"])
    assert found["bytes_without_layer_embedding"] == expected.bytes_without_layer_embedding
    assert found["weights"] == sum(group["weights"] for group in found["groups"])
    assert {group["group"] for group in found["groups"]} >= {"embedding", "attention", "mlp", "norms"}


def test_size_says_what_export_would_refuse():
    code, out, err = run("size", *NAMED, *MOBILE, "--format", "compressed-tensors")
    assert code == 0
    assert "export would refuse model.embed_tokens" in err
    assert "attention" in out


def test_size_of_a_file(tmp_path):
    (tmp_path / "config.json").write_text(model_config("smollm2-135m"), encoding="utf-8")
    for path in (tmp_path, tmp_path / "config.json"):
        assert "134,515,008" in works("size", "--model-config", path)


def test_plan_memory():
    said = works("plan-memory", *NAMED, "--policy", "gemma4-q4_0", "--devices", "8xH200", "--recompute")
    for words in ("each of 8 x H200, fsdp", "optimizer state", "gathered layers", "learned scales", ": fits"):
        assert words in said
    said = works("plan-memory", "--model-config", "gemma-4-31b", "--devices", "H100")
    assert "does not fit" in said
    assert "Nor with --recompute --teacher cache" in said
    said = works("plan-memory", "--model-config", "gemma-4-31b", "--devices", "8xH200", "--strategy", "fsdp")
    assert "With --recompute it would: " in said
    asked = (
        "--devices",
        "2xH100",
        "--strategy",
        "ddp",
        "--batch",
        2,
        "--sequence",
        512,
        "--teacher",
        "cache",
    )
    found = json.loads(works("plan-memory", *NAMED, *asked, "--control", "--frozen", "", "--json"))
    settings = memory.Settings(batch_size=2, sequence_length=512, teacher="cache", frozen=())
    plan = memory.plan("gemma-4-e2b", devices="2xH100", strategy="ddp", settings=settings)
    assert found["peak"] == plan.peak == max(found["phases"].values())
    assert found["trained_weights"] == found["weights"]
    assert found["fits"] is plan.fits


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("size", "--model-config", "gemma-9"), "model_config: expected"),
        (("size", *NAMED, "--format", "zip"), "plan_export: target: expected one of gguf"),
        (("plan-memory", *NAMED, "--devices", "8xTPU"), "plan_memory: devices: expected"),
        (("plan-memory", *NAMED, "--optimizer", "adam"), "plan_memory: optimizer: expected one of"),
    ],
)
def test_refusals(arguments, says):
    code, _, err = run(*arguments)
    assert code == 1
    assert says in err
