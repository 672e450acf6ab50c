"""A tiny Gemma 4 with experts, its stacks and their layers in Compressed-Tensors folders."""

import json

from families import make_family

import libqat

TARGET = "compressed-tensors"
STACKS = r".*experts\.(gate_up|down)_proj"
LAYERS = (r".*self_attn\.[qkvo]_proj", r".*mlp\..*_proj")
DOWN, GATE_UP = "model.layers.{}.experts.down_proj", "model.layers.{}.experts.gate_up_proj"
EXPERTS, DEPTH = 4, 4


def prepared(rules, **settings):
    return libqat.prepare(
        make_family("26b", **settings), {"rules": [{"match": match, "weight": grid} for match, grid in rules]}
    )


def packed(grid="int4_g32", **settings):
    """Everything but router, norms and embedding on one grid."""
    rules = [(match, grid) for match in (STACKS, *LAYERS)]
    return libqat.freeze(prepared(rules, **settings), tokenizer="none")


def config_of(path):
    return json.loads((path / "config.json").read_text())["quantization_config"]


def targets_of(path):
    """Bits -> what the group names."""
    groups = config_of(path)["config_groups"].values()
    return {group["weights"]["num_bits"]: group["targets"] for group in groups}


def parts_of(weights):
    """Layer of one expert -> its matrix, cut from the stacks as transformers' forward cuts them."""
    found = {}
    for key, stack in weights.items():
        parent, _, name = key.rpartition(".")
        if not parent.endswith(".experts"):
            continue
        for expert, matrix in enumerate(stack):
            if name == "gate_up_proj":
                gate, up = matrix.chunk(2)
                found |= {f"{parent}.{expert}.gate_proj": gate, f"{parent}.{expert}.up_proj": up}
            else:
                found[f"{parent}.{expert}.{name}"] = matrix
    return found
