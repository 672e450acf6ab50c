"""Tiny random models of the Gemma and Qwen families for the tests of grids and files."""

import shapes

VOCABULARY = 400
SETTINGS = {
    name: shapes.resized(
        shapes.BY_KEY[key],
        vocab_size=VOCABULARY,
        vocab_size_per_layer_input=VOCABULARY,
        intermediate_size=256,  # a block of tq2_0
    )
    for name, key in {
        "qwen3": "qwen3-0.6b",
        "gemma3": "gemma3-270m",
        "e2b": "gemma4-e2b",
        "e4b": "gemma4-e4b",
        "12b": "gemma4-12b",
        "26b": "gemma4-26b-a4b",
        "31b": "gemma4-31b",
    }.items()
}
SHAPES = tuple(SETTINGS)
GEMMA4_SHAPES = ("e2b", "e4b", "12b", "26b", "31b")


def config_of(shape, **changes):
    return shapes.config_of(SETTINGS[shape], **changes)


def make_family(shape, seed=0, **changes):
    """A model in float32 with random norms and scalars, in eval mode."""
    return shapes.make(SETTINGS[shape], seed, **changes)


POLICY = {
    "rules": [
        {"match": ".*embed_tokens", "weight": "q8_0"},
        {"match": ".*embed_tokens_per_layer", "weight": "q4_0", "optional": True},
        {"match": r".*self_attn\..*_proj", "weight": "q4_0"},
        {"match": r".*layers\.0\.mlp\.down_proj", "weight": "tq2_0"},
        {"match": r".*mlp\..*_proj", "weight": "q4_0"},
        {"match": r".*experts\.gate_up_proj", "weight": "q4_0", "optional": True},
        {"match": r".*experts\.down_proj", "weight": "q8_0", "optional": True},
        {"match": r".*per_layer_(input_gate|projection)", "weight": "q8_0", "optional": True},
        {"match": r".*per_layer_model_projection", "weight": "bf16", "optional": True},
    ]
}
"""Every matrix but the router, on grids that the package `gguf` decodes; norms and scalars stay float."""


def with_two_bits():
    """The same with ggml's newest 2-bit type, which that package does not know, in the MLPs."""
    rules = [rule | ({"weight": "q2_0"} if "mlp" in rule["match"] else {}) for rule in POLICY["rules"]]
    return {"rules": rules}
