"""The memory map: what the decoder keeps, what a run holds at most, what fits where."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_llama
from decoder_shapes import SHAPES, make, tokens_for
from libqat.devices import parse_devices
from libqat.memory import PHASES, Settings

import libqat
from libqat import memory

HERE = Path(__file__).parent
SOME = {"rules": [{"match": ".*mlp.*", "weight": "q4_0"}]}


def kept_bytes(decoder, tokens, autocast):
    """Bytes that autograd keeps in the decoder's forward beside the parameters, and what the head reads."""
    owned = {value.untyped_storage().data_ptr() for value in decoder.parameters().values()}
    kept = {}

    def pack(value):
        storage = value.untyped_storage()
        if storage.data_ptr() not in owned and storage.nbytes() > 0:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        storage = decoder.hidden(tokens).untyped_storage()
    kept[storage.data_ptr()] = storage.nbytes()
    return sum(kept.values())


STATIC = {"input": "int8_tensor_static", "output": "int8_tensor_static"}
MOBILE = {
    "rules": [
        {"match": r".*\.router\..*", "weight": "f32", "optional": True},
        {"match": r".*\.experts\..*", "weight": "mobile8", "optional": True},
        {"match": ".*embed_tokens", "weight": "mobile8"} | STATIC,
        {"match": ".*", "kind": "linear", "weight": "mobile8"} | STATIC,
    ],
    "kv_cache": "int8_tensor_static",
    "activation_scales": {"rule": "observed", "batches": 0},
}


def by_name(plan):
    return {item.name: item.bytes for item in plan.items}


@pytest.mark.parametrize("policy", [SOME, MOBILE], ids=["weights", "activations"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SHAPES)
def test_activations_are_those_that_autograd_keeps(name, dtype, policy, tmp_path):
    """The difference of two batches: what does not grow with the tokens drops out, nothing else."""
    model = make(name)
    model.save_pretrained(tmp_path)
    decoder = libqat.prepare(libqat.load_model(tmp_path).decoder, policy).decoder
    measured, counted = [], []
    for batch in (2, 4):
        measured.append(kept_bytes(decoder, tokens_for(model, batch, 32), dtype == "bfloat16"))
        settings = Settings(batch, 32, compute_dtype=dtype)
        counted.append(by_name(memory.plan(tmp_path, policy, devices="cpu:64GB", settings=settings)))
    assert counted[1]["activations"] - counted[0]["activations"] == measured[1] - measured[0]


Q4 = {
    "rules": [
        {"match": r".*\.router\..*", "weight": "f32", "optional": True},
        {"match": ".*embed_tokens(_per_layer)?", "weight": "q8_0"},
        {"match": ".*", "kind": "linear", "weight": "q4_0"},
    ]
}
LEARNED = Q4 | {"estimator": {"kind": "lsq"}}
FROZEN = (r"model\.embed_tokens(_per_layer)?",)
PLAIN = {"teacher": "none", "compute_dtype": "float32"}


def llama():
    return make_llama(
        hidden_size=512, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=4096,
    )  # fmt: skip


def e2b():
    return make(
        "gemma4 E2B", hidden_size=512, intermediate_size=1536, head_dim=64, global_head_dim=128,
        num_attention_heads=8, sliding_window=64, vocab_size=4096, vocab_size_per_layer_input=4096,
        hidden_size_per_layer_input=64,
    )  # fmt: skip


def experts():
    return make(
        "gemma4 26B", hidden_size=256, intermediate_size=512, vocab_size=4096, moe_intermediate_size=256,
        num_experts=32, top_k_experts=4,
    )  # fmt: skip


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="reads a process's peak from Linux's /proc"
)
@pytest.mark.parametrize(
    ("make_model", "policy", "settings"),
    [
        # States dominate; then activations; then a teacher, a table per layer and bfloat16; then experts.
        (llama, LEARNED, Settings(1, 64, accumulate=2, ema=True, frozen=(), **PLAIN)),
        (llama, LEARNED, Settings(8, 128, frozen=FROZEN, **PLAIN)),
        (e2b, Q4, Settings(4, 128, frozen=FROZEN)),
        (experts, Q4, Settings(4, 128, frozen=(), **PLAIN)),
        (e2b, MOBILE, Settings(8, 128, frozen=FROZEN)),
    ],
    ids=["states", "activations", "teacher", "experts", "rounded activations"],
)
def test_a_process_holds_what_was_planned(make_model, policy, settings, tmp_path):
    """At most, beyond what a tiny run before it left. Observed: the plan is 0.4 to 4.8 % below."""
    make_model().save_pretrained(tmp_path / "model")
    make_llama().save_pretrained(tmp_path / "tiny")
    divergence = 1.0 if settings.teacher == "live" else 0.0
    options = {
        "steps": 2,  # the second has the optimizer's state from the start
        "objective": {"kl": divergence, "ce": 1 - divergence},
        "ema": 0.9 if settings.ema else 0.0,
        "frozen": list(settings.frozen),
    }
    options |= {
        key: getattr(settings, key)
        for key in ("batch_size", "sequence_length", "accumulate", "compute_dtype")
    }
    told = {"model": str(tmp_path / "model"), "warm_up": str(tmp_path / "tiny"), "policy": policy}
    told |= {"options": options, "teacher": settings.teacher, "tokens": 5000, "vocabulary": 97, "threads": 2}
    # What is freed goes back to the system at once, so that the peak is that of what is held.
    allocator = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0"}
    done = subprocess.run(
        [sys.executable, str(HERE / "memory_run.py"), json.dumps(told)],
        capture_output=True,
        text=True,
        env={**os.environ, **allocator, "PYTHONPATH": str(Path(libqat.__file__).parents[1])},
    )
    assert done.returncode == 0, done.stderr
    plan = memory.plan(tmp_path / "model", policy, devices="cpu:64GB", settings=settings)
    assert plan.peak == pytest.approx(int(done.stdout), rel=0.1)


def test_states_are_counted_by_weight():
    whole = memory.plan("gemma-4-31b", devices="H200", settings=Settings(frozen=()))
    weights = 30_697_345_280
    items = by_name(whole)
    assert whole.weights == whole.trained == weights
    assert (items["latents"], items["gradients"], items["optimizer state"]) == (
        4 * weights,
        4 * weights,
        8 * weights,
    )
    assert whole.peak > 16 * weights
    assert not whole.fits
    default = memory.plan("gemma-4-31b", devices="H200")
    assert default.trained == weights - 262144 * 5376  # the table of tokens is frozen
    for optimizer, size in (("lion", 4), ("sgd", 0), ("adamw-8bit", 2 + 1 / 32)):
        changed = memory.plan(
            "gemma-4-31b", devices="H200", settings=Settings(frozen=(), optimizer=optimizer)
        )
        assert by_name(changed).get("optimizer state", 0) == math.ceil(size * weights)


def test_sharding_divides_the_states_and_adds_what_is_gathered():
    one, copies, shards = (
        memory.plan("gemma-4-12b", "gemma4-q4_0", devices=devices, strategy=strategy)
        for devices, strategy in (("B200", "single"), ("8xB200", "ddp"), ("8xB200", "fsdp"))
    )
    parts = by_name(shards)
    for name in ("latents", "gradients", "optimizer state", "teacher"):
        assert by_name(copies)[name] == by_name(one)[name]
        assert parts[name] == math.ceil(by_name(one)[name] / 8)
    for name in ("activations", "logits, a piece at a time"):
        assert parts[name] == by_name(copies)[name] == by_name(one)[name]
    assert "gathered layers" not in by_name(copies)
    assert parts["gathered layers"] >= 4 * 262144 * 3840  # the table of tokens is the largest
    assert shards.peak < copies.peak / 3


def test_what_changes_the_map():
    base = Settings(batch_size=4, sequence_length=2048)

    def items(**changes):
        return by_name(
            memory.plan(
                "gemma-4-e2b", "gemma4-q4_0", devices="H100", settings=Settings(**(vars(base) | changes))
            )
        )

    plain = items()
    assert items(recompute=True)["activations"] < plain["activations"] / 10
    assert items(batch_size=8)["activations"] == pytest.approx(2 * plain["activations"], rel=0.01)
    assert "teacher" not in items(teacher="cache")
    assert items(ema=True)["average of the weights"] == plain["gradients"]
    assert "telemetry" not in items(telemetry=False)
    assert items(compute_dtype="float32")["teacher"] == pytest.approx(2 * plain["teacher"], rel=0.01)
    trained = memory.plan("gemma-4-e2b", "gemma4-q4_0", devices="H100", settings=Settings(frozen=()))
    assert by_name(trained)["gradient of the head"] == 4 * 262144 * 1536
    assert set(item for each in trained.items for item in each.phases) == set(PHASES)
    mobile = by_name(
        memory.plan("gemma-4-e2b", "gemma4-e2b-mobile", devices="H100", settings=Settings(**vars(base)))
    )
    # student, teacher, slope of the cap; products, codes, gradient
    assert (
        mobile["rounding of logits"]
        == mobile["logits, a piece at a time"]
        == plain["logits, a piece at a time"]
    )
    assert "rounding of logits" not in plain
    learned = json.loads(libqat.Policy.preset("gemma4-e2b-mobile").to_json())
    learned["activation_scales"] = {"rule": "learned"}
    taught = by_name(memory.plan("gemma-4-e2b", learned, devices="H100", settings=Settings(**vars(base))))
    assert taught["rounding of logits"] == 3.5 * mobile["rounding of logits"]
    learned = libqat.recommended(libqat.Policy.preset("gguf-q4_0")).policy
    assert "learned scales" in by_name(memory.plan("qwen3-0.6b", learned, devices="H100"))


@pytest.mark.parametrize(
    ("text", "count", "gigabytes", "fused"),
    [
        ("8xH200", 8, 141, False),
        ("h100", 1, 80, False),
        ("2x48GB", 2, 48, False),
        ("0.5 GB", 1, 0.5, False),
        ("cpu:64GB", 1, 64, True),
        ("4xcpu:8GB", 4, 8, True),
    ],
)
def test_devices(text, count, gigabytes, fused):
    devices = parse_devices(text)
    assert (devices.count, devices.bytes, devices.fused) == (count, gigabytes * 10**9, fused)


def test_this_machine():
    devices = parse_devices("cpu")
    assert devices.bytes == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(
    "text", ["", "8x", "xH200", "0xH200", "-1xH200", "H300", "8 x H200", "0GB", "cpu:", "cpu:H200"]
)
def test_no_devices(text):
    with pytest.raises(libqat.ArgumentError, match="plan_memory: devices: expected"):
        parse_devices(text)


@pytest.mark.parametrize(
    ("changes", "strategy", "says"),
    [
        ({"optimizer": "adam"}, None, "optimizer: expected one of adamw, "),
        ({"teacher": "dead"}, None, "teacher: expected one of live, "),
        ({"compute_dtype": "float16"}, None, "compute_dtype: expected one of float32, bfloat16"),
        ({"batch_size": 0}, None, "batch_size: expected at least 1, got 0"),
        ({}, "tensor", "strategy: expected one of single, ddp, fsdp"),
        ({}, "single", "strategy: expected ddp or fsdp for 8 devices"),
    ],
)
def test_refusals(changes, strategy, says):
    with pytest.raises(libqat.ArgumentError, match=f"plan_memory: {says}"):
        memory.plan("qwen3-0.6b", devices="8xH200", strategy=strategy, settings=Settings(**changes))
