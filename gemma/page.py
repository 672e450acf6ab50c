"""The tables of docs/models.md."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]
LOGITS, GRADIENTS = 1e-4, 1e-4
"""Two float32 implementations of the same sums in another order differ by less."""


def tables(rows: Rows, sizes: Rows, found: dict[str, Any] | None) -> dict[str, str]:
    """Name of a place in the page -> what belongs there."""
    made = {"shapes": shapes_table(rows), "published-sizes": sizes_table(sizes)}
    return made | ({"gemma-3-270m": real_table(found)} if found else {})


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def shapes_table(rows: Rows) -> str:
    """Parity once a shape, then its exports."""
    lines, last = [], ""
    for row in rows:
        name = f"{row['family']} {row['shape']}"
        same = [f"{row['parity_max_abs']:.1e}", f"{row['grad_parity']:.1e}"] if name != last else ["", ""]
        lines.append(
            [
                name if name != last else "",
                *same,
                f"{row['export']} ({', '.join(row['grids'])})",
                f"{row['qat_loss_first']:.4f} → {row['qat_loss_last']:.4f}",
                row["consumer"],
                f"{row['differing_values']:,} of {row['weights']:,}",
                f"{'equal' if row['top1_equal'] else '**differs**'} at {row['top1_positions']}",
            ]
        )
        last = name
    columns = [
        "shape",
        "logits",
        "gradients",
        "export",
        "QAT loss",
        "consumer",
        "differing numbers",
        "likeliest token",
    ]
    return _table(columns, lines)


def sizes_table(rows: Rows) -> str:
    """What was counted beside what was published."""
    lines = []
    for row in rows:
        what = f"{row['format']}, without the per-layer table" if row["resident"] else row["format"]
        known = row["published_bytes"]
        published = f"{known / 1e9:.3f} GB ({row['published']})" if known else ""
        lines.append([row["model"], f"`{row['policy']}`", what, f"{row['bytes'] / 1e9:.3f} GB", published])
    return _table(["model", "policy", "as", "libqat's count", "published"], lines)


ROWS = {
    "float": "float",
    "ptq": "Q4_0, rounded to nearest",
    "gptq": "Q4_0, GPTQ",
    "qat": "Q4_0, QAT from GPTQ",
}
TITLES = {"wiki": "held-out Wikipedia", "other": "Python reference"}


def real_table(found: dict[str, Any]) -> str:
    """Gemma 3 270M: perplexities, then a sentence of figures."""
    lines = []
    for row, title in ROWS.items():
        texts = [found["texts"][name][row] for name in TITLES]
        cells = [f"{text['ppl']:.2f} | {text['kl']:.4f} | {text['top1']:.1%}" for text in texts]
        lines.append([title, *cells])
    columns = ["model", *(f"{title}: perplexity | KL to float | top-1" for title in TITLES.values())]
    header = _table([part for column in columns for part in column.split(" | ")], lines)
    judged = found["llama_cpp"]
    said = [
        f"{found['steps']} steps of {found['tokens'] // found['steps']} tokens, learning rate "
        f"{found['learning_rate']:g}; the file takes {found['bytes'] / 1e6:.1f} MB, and "
        f"{found['differences']} of its tensors differ from the checkpoint.",
        f"llama.cpp ({judged['version']}) on {judged['tokens']} tokens: perplexity {judged['ppl']:.2f}; "
        f"libqat's decoder on the same: {judged['ppl_ours_same_tokens']:.2f}.",
        f"Peak memory: {found['train_peak_bytes'] / 1e9:.1f} GB up to the end of training, "
        f"{found['peak_bytes'] / 1e9:.1f} GB with four models side by side.",
    ]
    return header + "\n\n" + "\n".join(said)


def write(path: Path, made: Mapping[str, str]) -> None:
    """Puts each table between its markers, `<!-- gemma: NAME -->` and `<!-- end -->`."""
    text = path.read_text(encoding="utf-8")
    for name, table in made.items():
        place = re.compile(rf"(<!-- gemma: {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not place.search(text):
            raise ValueError(f"{path}: expected the markers of the table {name}, got none")
        text = place.sub(lambda found, table=table: f"{found[1]}{table}\n{found[2]}", text)
    path.write_text(text, encoding="utf-8")


def wrong(rows: Rows, sizes: Rows, found: dict[str, Any] | None) -> list[str]:
    """What is not as it should be."""
    said = []
    for row in rows:
        name = f"{row['family']} {row['shape']} as {row['export']}"
        if row["parity_max_abs"] > LOGITS or row["grad_parity"] > GRADIENTS:
            said.append(f"{name}: the decoder differs from transformers")
        if row["qat_loss_last"] >= row["qat_loss_first"]:
            said.append(f"{name}: the loss did not fall")
        if row["differing_values"] or not row["top1_equal"]:
            said.append(f"{name}: {row['consumer']} reads another model")
    said += [f"{row['model']} {row['policy']}: another size" for row in sizes if not row["agrees"]]
    if found and found["differences"]:
        said.append("Gemma 3 270M: the file differs from the checkpoint")
    return said
