"""out/interop/summary.json and docs/fidelity.md."""

from __future__ import annotations

from pathlib import Path

from libqat import run_folder

HEAD = """# Fidelity: what is trained is what is served

Every row: random and adversarial weights (zeros, one huge weight, subnormals, ties, constants) on a grid,
exported to the consumer's file, and read back **by the consumer's own code**. Counted is what differs from
the checkpoint: codes, scales, and decoded weights, bit for bit. For ggml's types the first two compare with
the blocks that ggml's own quantizer makes of the same weights. Left out: rows below 2^-120 on `mxfp4`, where
ggml's exponent wraps, rows beyond 2,688 on `nvfp4`, which cannot hold them, and for `hf` rows whose fp16
scale underflows. `make interop` regenerates this page.

"""
TRAINED = """
## Trained, exported, scored

SmolLM2-135M, trained for {steps} steps of 512 tokens (a short run: the figures show the way, not the goal),
exported and scored by the consumer on {tokens} tokens of held-out Wikipedia. "Largest difference" is that of
one token's log-probability, in nats, between the consumer and libqat's decoder in float32. It comes from
arithmetic, not from weights: llama.cpp rounds activations to 8 bits, bfloat16 models compute in bfloat16.

| policy | consumer's file | bits per weight | float | rounded | trained | trained, in the consumer | \
largest difference | differing numbers |
|---|---|---|---|---|---|---|---|---|
"""


def write(fidelity: list[dict], trained: list[dict], summary: Path, page: Path | None) -> None:
    """The figures of all comparisons, as JSON and, if asked for, as the page."""
    summary.parent.mkdir(parents=True, exist_ok=True)
    run_folder.write_json(summary, fidelity)
    if trained:
        run_folder.write_json(summary.with_name("trained.json"), trained)
    if page is not None:
        page.write_text(markdown(fidelity, trained))


def markdown(fidelity: list[dict], trained: list[dict]) -> str:
    columns = [
        "grid",
        "consumer",
        "target",
        "blocks",
        "differing_codes",
        "differing_scales",
        "differing_values",
    ]
    lines = [
        "| " + " | ".join(name.replace("_", " ") for name in [*columns, "read by"]) + " |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in fidelity:
        cells = [
            f"`{row['grid']}`",
            row["consumer"],
            row["target"],
            *(f"{row[name]:,}" for name in columns[3:]),
        ]
        lines.append("| " + " | ".join([*cells, row["consumer_version"]]) + " |")
    text = HEAD + "\n".join(lines) + "\n"
    if not trained:
        return text
    text += TRAINED.format(steps=trained[0]["steps"], tokens=trained[0]["tokens"])
    for row in trained:
        figures = [f"{row[f'ppl_{name}']:,.2f}" for name in ("float", "ptq", "qat", "consumer")]
        cells = [f"`{row['policy']}`", row["target"], f"{row['bits_per_weight']:.2f}", *figures]
        cells += [f"{row['largest_difference']:.3f}", str(row["differences"])]
        text += "| " + " | ".join(cells) + " |\n"
    return text
