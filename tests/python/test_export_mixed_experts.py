"""Compressed-Tensors folders whose experts differ, are broken, or are no stacks."""

import json

import pytest
import torch
from exporting import broken
from mixtures import DOWN, GATE_UP, TARGET, config_of, parts_of, prepared

import libqat
from libqat import _core


@pytest.fixture(scope="module")
def mixed():
    """Layer 0 in 4 bits, 1 in 8, 2 with float experts, 3 with stacks on different grids."""
    rules = [
        (r".*layers\.0\.experts\..*", "int4_g32"),
        (r".*layers\.1\.experts\..*", "int8_g32"),
        (r".*layers\.2\.experts\..*", "f32"),
        (r".*layers\.3\.experts\.down_proj", "int8_g64"),
        (r".*layers\.3\.experts\.gate_up_proj", "int4_g32"),
    ]
    return libqat.freeze(prepared(rules), tokenizer="none")


def test_layers_may_differ(mixed, tmp_path):
    with pytest.warns(UserWarning, match="these 6 stacks"):
        libqat.export(mixed, tmp_path / "out", target=TARGET)
    assert libqat.verify(tmp_path / "out", mixed) == []
    assert libqat.import_checkpoint(tmp_path / "out").grids == mixed.grids
    groups = config_of(tmp_path / "out")["config_groups"].values()
    named = {(g["weights"]["num_bits"], g["weights"]["group_size"]): g["targets"] for g in groups}
    expert = r"(?:moe\.)?experts\.\d+"
    assert named == {
        (4, 32): [
            rf"re:model\.layers\.0\.{expert}\.down_proj$",
            rf"re:model\.layers\.0\.{expert}\.gate_proj$",
            rf"re:model\.layers\.3\.{expert}\.gate_proj$",
            rf"re:model\.layers\.0\.{expert}\.up_proj$",
            rf"re:model\.layers\.3\.{expert}\.up_proj$",
        ],
        (8, 32): [rf"re:model\.layers\.1\.{expert}\.{part}_proj$" for part in ("down", "gate", "up")],
        (8, 64): [rf"re:model\.layers\.3\.{expert}\.down_proj$"],
    }
    notes = json.loads((tmp_path / "out" / "libqat.json").read_text())["notes"]
    [note] = [note for note in notes if "experts" in note]
    assert GATE_UP.format(3) in note
    assert DOWN.format(3) in note


def test_scales_must_lie_in_rows():
    """One scale for all experts, or one for a whole expert, has no place in their layers."""
    stack = [(DOWN.format(0), torch.randn(4, 64, 32))]
    for grid in ("int4_tensor", "int4_channel"):
        checkpoint = _core.freeze_tensors(
            stack, {DOWN.format(0): grid}, config="{}", tokenizer="none", policy=""
        )
        [obstacle] = libqat.can_export(checkpoint, TARGET)
        assert obstacle.tensor == DOWN.format(0)
        assert "a scale per group within a row" in obstacle.reason


def test_experts_that_are_modules_stay_modules(tmp_path):
    """Of a model of one's own. Without libqat.json they are taken for what transformers 5 loads."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"gate_proj": (32, 64), "up_proj": (32, 64), "down_proj": (64, 32)}
    tensors = [
        (f"block.experts.{expert}.{part}.weight", torch.randn(shape, generator=generator))
        for expert in range(3)
        for part, shape in shapes.items()
    ]
    grids = {key: "int4_g32" for key, _ in tensors}
    checkpoint = _core.freeze_tensors(tensors, grids, config="{}", tokenizer="none", policy="")
    assert libqat.cautions(checkpoint, TARGET) == []
    libqat.export(checkpoint, tmp_path / "out", target=TARGET)
    assert libqat.verify(tmp_path / "out", checkpoint) == []
    assert libqat.import_checkpoint(tmp_path / "out").grids == grids
    (tmp_path / "out" / "libqat.json").unlink()
    stacked = _core.dequantize(libqat.import_checkpoint(tmp_path / "out"))
    weights = _core.dequantize(checkpoint)
    assert set(stacked) == {"block.experts.gate_up_proj", "block.experts.down_proj"}
    for part, weight in parts_of(stacked).items():
        assert torch.equal(weight, weights[f"{part}.weight"]), part


# ---- reading


EXPERT = "model.layers.1.experts.2"


def _rename(old, new):
    def change(tensors, config):
        for name in [name for name in tensors if name.startswith(old)]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def _drop(module):
    def change(tensors, config):
        for part in ("packed", "scale", "shape"):
            del tensors[f"{module}.weight_{part}"]

    return change


def _narrow(tensors, config):
    tensors[f"{EXPERT}.up_proj.weight_packed"] = tensors[f"{EXPERT}.up_proj.weight_packed"][:-1].clone()
    tensors[f"{EXPERT}.up_proj.weight_scale"] = tensors[f"{EXPERT}.up_proj.weight_scale"][:-1].clone()
    tensors[f"{EXPERT}.up_proj.weight_shape"][0] -= 1


def _in_half(tensors, config):
    name = f"{EXPERT}.down_proj.weight_scale"
    tensors[name] = tensors[name].half()


BROKEN = [
    (
        _drop(f"{EXPERT}.up_proj"),
        libqat.FileError,
        "experts.2.up_proj.weight_packed: expected a layer of every",
    ),
    (
        _rename(f"{EXPERT}.", "model.layers.1.experts.9."),
        libqat.FileError,
        "experts.2.*a layer of every expert",
    ),
    (_narrow, libqat.UnsupportedError, "experts.2.up_proj: expected experts of one shape and grid"),
    (_in_half, libqat.UnsupportedError, "experts.2.down_proj: expected experts of one shape and grid"),
]


@pytest.mark.parametrize(("change", "error", "message"), BROKEN)
def test_broken_stacks_are_refused_by_name(mixture_folder, change, error, message):
    with pytest.raises(error, match=message):
        libqat.import_checkpoint(broken(mixture_folder, change))


@pytest.mark.parametrize("sides", [("input",), ("output",), ("input", "output")])
def test_scales_of_activations_that_stacks_lack_are_refused_by_name(mixture_folder, sides):
    def change(tensors, config):
        for group in config["quantization_config"]["config_groups"].values():
            group |= {f"{side}_activations": {"num_bits": 8, "dynamic": False} for side in sides}
        for name in [name for name in tensors if name.endswith(".weight_packed")]:
            module = name.removesuffix(".weight_packed")
            tensors |= {f"{module}.{side}_scale": torch.ones(1) for side in sides}

    first = rf"layers\.0\.experts\.0\.down_proj\.{sides[0]}_scale: expected symmetric"
    with pytest.raises(libqat.UnsupportedError, match=first):
        libqat.import_checkpoint(broken(mixture_folder, change))


def test_verify_tells_what_differs(mixture_folder, mixture):
    def change(tensors, config):
        tensors[f"{EXPERT}.up_proj.weight_packed"][1, 0] ^= 1
        tensors[f"{EXPERT}.down_proj.weight_scale"][0, 0] *= 2

    found = {(d.tensor, d.what): d for d in libqat.verify(broken(mixture_folder, change), mixture)}
    assert found[GATE_UP.format(1), "codes"].count == 1
    # Each of 4 experts has 64 rows of gate before 64 of up.
    assert found[GATE_UP.format(1), "codes"].first.startswith(f"row {2 * 128 + 64 + 1},")
    assert found[DOWN.format(1), "scales"].count == 1
