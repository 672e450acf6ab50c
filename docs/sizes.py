"""The tables of docs/sizes.md, from shapes alone: python docs/sizes.py [--write].

Without --write they are printed. A test holds the page to them, and the figures to those that were published.
"""

import argparse
import re
from collections.abc import Iterable
from pathlib import Path

import libqat
from libqat import memory, sizes

PAGE = Path(__file__).with_name("sizes.md")
GEMMA4 = ("gemma-4-e2b", "gemma-4-e4b", "gemma-4-12b", "gemma-4-26b-a4b", "gemma-4-31b")
GEMMA3 = ("gemma-3-270m", "gemma-3-1b", "gemma-3-4b", "gemma-3-12b", "gemma-3-27b")
OTHERS = ("qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b", "qwen3-14b", "qwen3-32b", "smollm2-135m",
          "smollm2-360m", "smollm2-1.7b", "llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b")  # fmt: skip

TABLES = r"model\.embed_tokens(_per_layer)?"
PROJECTION = r"model\.per_layer_model_projection"
MATRICES = r"model\.(layers\..*|per_layer_model_projection)"


def gguf(tables: str, projection: str = "q4_0") -> dict:
    """Every matrix q4_0 but the tables and the projection of inputs per layer; routers stay float."""
    return {
        "rules": [
            {"match": TABLES, "weight": tables},
            {"match": "lm_head", "weight": tables, "optional": True},
            {"match": PROJECTION, "weight": projection, "optional": True},
            {"match": r".*\.router\.proj", "weight": "f32", "optional": True},
            {"match": MATRICES, "weight": "q4_0"},
        ]
    }


Q6K_TOKENS = {"rules": [{"match": r"model\.embed_tokens", "weight": "q6_k"}, *gguf("q4_0")["rules"]]}
Q6K_TOKENS["rules"][1]["optional"] = True

MOBILE_IN_GGUF = {
    name: {
        "rules": [
            {"match": r"model\.embed_tokens", "weight": "tq2_0"},
            {"match": r"model\.embed_tokens_per_layer", "weight": table},
            {"match": PROJECTION, "weight": "bf16"},
            {"match": r".*\.per_layer_(input_gate|projection)", "weight": "q8_0"},
            {"match": wide, "weight": "tq2_0", "optional": True},
            {"match": MATRICES, "weight": "q4_0"},
        ]
    }
    for name, table, wide in (
        ("gemma-4-e2b", "q4_0", r"model\.layers\.(1[5-9]|2\d|3[0-4])\.mlp\..*"),
        ("gemma-4-e4b", "tq2_0", "none"),
    )
}
"""Google's mobile recipe on ggml's types: codes of 2 bits as TQ2_0, of 4 as Q4_0, of 8 as Q8_0."""

RECIPES = {
    "bf16": (None, None),
    "all Q4_0": (gguf("q4_0"), "gguf"),
    "Q6_K token table": (Q6K_TOKENS, "gguf"),
    "gemma4-q4_0": ("gemma4-q4_0", "gguf"),
    "Q8_0 tables": (gguf("q8_0"), "gguf"),
    "bf16 tables": (gguf("bf16", "bf16"), "gguf"),
}
"""Title -> (policy, file format)."""


def gigabytes(model: str, recipe: str) -> float:
    """1e9 bytes of a recipe's tensors."""
    policy, target = RECIPES[recipe]
    return sizes.size(model, policy, format=target).bytes / 1e9


def parameters() -> list[list[str]]:
    """Millions of weights by group."""
    groups = ("embedding", "layer_embedding", "layer_model_projection", "layer_gates", "attention", "mlp",
              "experts", "router", "norms")  # fmt: skip
    rows = [["millions of weights", "embedding", "per-layer table", "per-layer projection", "per-layer gates",
             "attention", "MLP", "experts", "router", "norms", "all"]]  # fmt: skip
    for model in GEMMA4:
        found = sizes.size(model)
        by_group = {group.group: f"{group.weights / 1e6:,.2f}" for group in found.groups()}
        rows.append([model, *(by_group.get(group, "") for group in groups), f"{found.weights / 1e6:,.1f}"])
    return rows


def recipes() -> list[list[str]]:
    """GB of each Gemma 4 by each recipe."""
    rows = [["GB", *RECIPES]]
    return rows + [[model, *(f"{gigabytes(model, recipe):.3f}" for recipe in RECIPES)] for model in GEMMA4]


PUBLISHED_FILES = (
    ("gemma-4-e2b", "gemma4-q4_0", "gguf", 3_349_516_256, "Google's `gemma-4-E2B_q4_0-it.gguf`"),
    ("gemma-4-e4b", "gemma4-q4_0", "gguf", 5_154_939_136, "Google's E4B of the same kind"),
    ("gemma-4-26b-a4b", gguf("q8_0"), "gguf", 14_618_145_824, "ggml-org's 26B with a Q8_0 table"),
)
"""(model, policy, format, bytes of the published file, what it is): they differ by header and vocabulary."""


def published() -> list[list[str]]:
    """Tensors beside whole published files."""
    rows = [["file", "its bytes", "libqat's count of its tensors", "left for header and vocabulary"]]
    for model, policy, target, size, title in PUBLISHED_FILES:
        ours = sizes.size(model, policy, format=target).bytes
        rows.append([title, f"{size:,}", f"{ours:,}", f"{size - ours:,}"])
    return rows


def mobile() -> list[list[str]]:
    """The mobile recipes."""
    rows = [
        [
            "MB",
            "all text tensors",
            "without the per-layer table",
            "published",
            "the same codes in a GGUF",
            "published",
        ]
    ]
    known = {"gemma-4-e2b": ("0.84 GiB", "2,190"), "gemma-4-e4b": ("", "3,220")}
    for model, (text, file) in known.items():
        found = sizes.size(model, f"{model.replace('gemma-4', 'gemma4')}-mobile", format="gemma-mobile")
        in_gguf = sizes.size(model, MOBILE_IN_GGUF[model], format="gguf").bytes
        rest = found.bytes_without_layer_embedding
        rows.append([model, f"{found.bytes / 1e6:,.1f}", f"{rest / 1e6:,.1f} ({rest / 2**30:.3f} GiB)", text,
                     f"{in_gguf / 1e6:,.1f}", file])  # fmt: skip
    return rows


def gemma3() -> list[list[str]]:
    """Gemma 3: Google's files keep the table in 16 bits."""
    known = {"gemma-3-1b": "1.0", "gemma-3-4b": "3.16", "gemma-3-12b": "8.07", "gemma-3-27b": "17.2"}
    rows = [["GB", "bf16", "Q4_0, table f16", "published file", "all Q4_0"]]
    for model in GEMMA3:
        plain = sizes.size(model).bytes
        f16, q4 = (sizes.size(model, gguf(table), format="gguf").bytes for table in ("f16", "q4_0"))
        shown = [f"{count / 1e9:.3f}" for count in (plain, f16, q4)]
        rows.append([model, shown[0], shown[1], known.get(model, ""), shown[2]])
    return rows


def others() -> list[list[str]]:
    """The other configurations."""
    rows = [["", "weights", "bf16 GB", "`gguf-q4_0` GB", "bits per weight"]]
    for model in OTHERS:
        found = sizes.size(model, "gguf-q4_0", format="gguf")
        rows.append([model, f"{found.weights / 1e9:.3f} B", f"{sizes.size(model).bytes / 1e9:.3f}",
                     f"{found.bytes / 1e9:.3f}", f"{found.bits_per_weight:.2f}"])  # fmt: skip
    return rows


def training() -> list[list[str]]:
    """GB per device of training each Gemma 4, one sequence of 2048 tokens on each device."""
    placed = (("1xH100", {}), ("8xH100", {}), ("8xH200", {}), ("64xH100", {}))
    rows = [["GB per device (fits)", *(f"{name}" for name, _ in placed)]]
    policy = libqat.recommended(libqat.Policy.preset("gemma4-q4_0")).policy
    settings = memory.Settings(recompute=True)
    for model in GEMMA4:
        plans = [memory.plan(model, policy, devices=name, settings=settings, **more) for name, more in placed]
        rows.append([model, *(f"{plan.peak / 1e9:,.0f} ({'yes' if plan.fits else 'no'})" for plan in plans)])
    return rows


TABLES_BY_NAME = {
    "parameters": parameters,
    "recipes": recipes,
    "published": published,
    "mobile": mobile,
    "gemma3": gemma3,
    "others": others,
    "training": training,
}


def markdown(rows: Iterable[list[str]]) -> str:
    """A table whose first column is text."""
    head, *body = rows
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in body)])


def filled(page: str) -> str:
    """The page with its tables made anew: each stands between a comment with its name and an empty line."""

    def table(match: re.Match) -> str:
        return f"{match[1]}\n{markdown(TABLES_BY_NAME[match[2]]())}\n\n"

    return re.sub(r"(<!-- table: (\w+) -->)\n(?:\|.*\n)*\n", table, page)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="Put them into docs/sizes.md.")
    if parser.parse_args().write:
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        for name, rows in TABLES_BY_NAME.items():
            print(f"{name}\n{markdown(rows())}\n")
