"""libqat's decoder of every shape trains on its grids, rounds by calibration, and ships what it trained."""

import copy
import json
import math

import pytest
import torch
from families import POLICY, SHAPES, VOCABULARY, make_family

import libqat
from libqat import _core, ptq

RULES = {"rules": [{"match": r".*router\.proj", "weight": "f32", "optional": True}, *POLICY["rules"]]}
TABLES = r"model\.embed_tokens(_per_layer)?"
FOUR_BITS = {
    "rules": [
        {"match": r".*router\.proj", "weight": "f32", "optional": True},
        {"match": TABLES, "weight": "q8_0"},
        {"match": ".*", "weight": "q4_0"},
    ]
}
OPTIONS = {"batch_size": 2, "sequence_length": 24, "telemetry_every": 0, "save_every": 0, "frozen": [TABLES]}


@pytest.fixture(params=SHAPES)
def loaded(request, tmp_path):
    make_family(request.param).save_pretrained(tmp_path / "hf")
    return libqat.load_model(tmp_path / "hf")


def text(count=400):
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(1))


def losses(prepared, teacher, **options):
    data = _core.TokenData.from_tensor(text(), VOCABULARY)
    trainer = _core.Trainer(prepared, teacher, data, "", **(OPTIONS | options))
    seen = []
    trainer.run(progress=lambda report: seen.append(report.loss) or True)
    return seen


def test_training_lowers_the_loss_and_ships_what_it_trained(loaded, tmp_path):
    decoder = loaded.decoder
    teacher = decoder.frozen_copy(torch.float32)
    prepared = libqat.prepare(decoder, RULES)
    before = {name: tensor.detach().clone() for name, tensor in decoder.parameters().items()}
    scalars = copy.deepcopy(decoder.buffers())
    # The same 16 windows three times: what is learned shows within a few steps.
    found = losses(prepared, teacher, steps=24, learning_rate=2e-3, compute_dtype="float32")
    assert sum(found[-8:]) < 0.9 * sum(found[:8])
    for name, tensor in decoder.parameters().items():
        frozen = name in ("model.embed_tokens.weight", "model.embed_tokens_per_layer.weight")
        assert torch.equal(tensor, before[name]) == frozen, name
    for name, tensor in decoder.buffers().items():
        assert torch.equal(tensor, scalars[name])
    checkpoint = prepared.freeze(loaded.config, "none")
    libqat.export(checkpoint, tmp_path / "a.gguf")
    assert libqat.verify(tmp_path / "a.gguf", checkpoint) == []


def test_a_step_in_bfloat16_is_finite(loaded):
    teacher = loaded.decoder.frozen_copy(torch.bfloat16)
    for name, tensor in teacher.parameters().items():  # a choice among experts is not continuous
        exact = tensor.dim() == 1 or "router" in name
        assert tensor.dtype == (torch.float32 if exact else torch.bfloat16), name
    prepared = libqat.prepare(loaded.decoder, RULES)
    found = losses(prepared, teacher, steps=2, learning_rate=1e-4, compute_dtype="bfloat16")
    assert all(math.isfinite(loss) for loss in found)


def test_guided_rounding_is_nearer_to_the_float_model_than_nearest_levels(loaded):
    """Every layer but tables and routers is rounded: experts, and the projections of layers' inputs, too."""
    decoder = loaded.decoder
    windows = text(4096).view(64, 64)
    float_model = decoder.frozen_copy(torch.float32)
    prepared = libqat.prepare(decoder, libqat.Policy.from_json(json.dumps(FOUR_BITS)).with_scale("learned"))
    held_out = torch.randint(VOCABULARY, (8, 64), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = float_model(held_out)
        nearest = (decoder(held_out) - expected).square().mean()
        names = {layer.name for layer in ptq.guided(prepared, windows, compute_dtype="float32")}
        guided = (decoder(held_out) - expected).square().mean()
    assert guided < nearest
    assert names == {line.name for line in prepared.report() if line.grid == "q4_0"}


@pytest.mark.parametrize("method", [ptq.gptq, ptq.guided, ptq.awq])
def test_a_start_leaves_float_types_in_a_policy_alone(method, tmp_path):
    """As in the preset gemma4-q4_0, where one projection ships as bf16."""
    make_family("e2b").save_pretrained(tmp_path)
    decoder = libqat.load_model(tmp_path).decoder
    name = "model.per_layer_model_projection.weight"
    rules = [{"match": ".*per_layer_model_projection", "weight": "bf16"}, *FOUR_BITS["rules"]]
    policy = libqat.Policy.from_json(json.dumps({"rules": rules})).with_scale("learned")
    prepared = libqat.prepare(decoder, policy)
    before = decoder.parameters()[name].detach().clone()
    assert method(prepared, text(512).view(16, 32))
    assert torch.equal(decoder.parameters()[name], before)
    assert {line.name: line.grid for line in prepared.report()}[name] == "bf16"
