"""`libqat quantize`: round a model to a policy's grids without training."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

import libqat
from libqat import finetune, generation, ptq, teacher

from . import console

NAME = "quantize"
HELP = """Round a model to the numbers of a policy's grids, without training.

Methods (docs/ptq.md): rtn takes the consumers' own scales, the baseline that fine-tuning has to beat; search
takes the scales of least error; weighted counts that error by how large each input is; awq rescales the input
channels first; gptq lets the weights still to come make up for each error; guided is gptq in which a token
counts as much as the model's answer depends on it, and goes over codes and scales again. The last four read
--text. lattice is for float checkpoints that were trained on a grid ("-qat-q4_0-unquantized"): it finds the
codes and scales that their weights already have. All files have the same size.

Example: [bold]libqat quantize ./SmolLM2-135M --policy gguf-q4_0 --out rtn.qat.safetensors[/bold]

Example: [bold]libqat quantize ./SmolLM2-135M --method guided --text book.txt --out it.qat.safetensors[/bold]
"""


class Method(StrEnum):
    """How weights are rounded."""

    RTN = "rtn"
    SEARCH = "search"
    WEIGHTED = "weighted"
    GPTQ = "gptq"
    AWQ = "awq"
    GUIDED = "guided"
    LATTICE = "lattice"


CALIBRATED = {
    Method.WEIGHTED: libqat.weighted_search,
    Method.GPTQ: libqat.gptq,
    Method.AWQ: libqat.awq,
    Method.GUIDED: libqat.guided,
}
"""Methods that look at the inputs of the layers."""


def run(
    model: Annotated[Path, typer.Argument(help="Hugging Face folder or GGUF file.")],
    policy: Annotated[
        str, typer.Option(help="Preset name or JSON file.", autocompletion=console.complete_policy)
    ] = "gguf-q4_0",
    method: Annotated[Method | None, typer.Option(help="See above. Default: the policy's scales.")] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="UTF-8 text file to calibrate on; may be given several times."),
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=1, help="At most this many tokens of the text, spread over it.")
    ] = ptq.TOKENS,
    window: Annotated[int, typer.Option(min=1, help="Tokens per sequence.")] = ptq.WINDOW,
    generated: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=0.9,
            help="Share of the tokens that the float model writes itself (docs/ptq.md).",
            show_default="0.5 for guided, 0 for the others",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Checkpoint to write. Default: METHOD.qat.safetensors.")
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Print each tensor's grid, bits, error and bytes.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """See HELP."""
    if (method in CALIBRATED) != bool(text):
        wanted = "--text FILE" if method in CALIBRATED else "no --text"
        raise typer.BadParameter(f"expected {wanted} for method {method or 'of the policy'}")
    if generated and method not in CALIBRATED:
        raise typer.BadParameter(f"expected no --generated for method {method or 'of the policy'}")
    loaded = libqat.load_model(model)
    chosen = libqat.Policy.load(policy)
    if method is not None:
        scale = {Method.RTN: "reference", Method.SEARCH: "search"}.get(method, "learned")
        chosen = chosen.with_scale(scale)
    if generated is None:  # the others fit no text closely enough to need a second kind
        generated = libqat.recommended(chosen).start_generated if method is Method.GUIDED else 0.0
    # Before the model is prepared, which changes what it computes.
    writer = teacher.float_copy(loaded) if generated else None
    prepared = libqat.prepare(loaded.decoder, chosen)
    found: dict[str, Any] = {}
    if method in CALIBRATED:
        ids = finetune.tokenize_files(model, text or [], window)
        windows = ptq.calibration_windows(ids, max(1, round(tokens * (1 - generated))), window)
        if writer is not None:
            windows = _with_generated(loaded, model, windows, generated, writer)
            del writer
        found = _calibrate(method, prepared, windows)
    if method is Method.LATTICE:
        found = _lattice(prepared)
    out = out or Path(f"{method or Method.RTN}.qat.safetensors")
    rows = prepared.report()
    if report and not json:
        console.out.print(rows)
    libqat.save(libqat.freeze(prepared, loaded.config, loaded.tokenizer), out)
    console.say(f"wrote {out}")
    if json:
        console.print_json(_outcome(out, rows) | found)


@contextmanager
def _progress(title: str) -> Iterator[ptq.Progress]:
    """Of a stage before anything is written; Ctrl-C ends the command and says so."""
    try:
        with console.progress(title) as update:
            yield update
    except KeyboardInterrupt:
        console.say("interrupted; nothing was written")
        raise typer.Exit(130) from None


def _lattice(prepared: libqat.PreparedDecoder) -> dict[str, Any]:
    """Takes the scales that the weights lie on; what the JSON says of them."""
    with _progress("lattice") as update:
        rows = libqat.lattice(prepared, progress=update)
    there = [row.lattice for row in rows if row.lattice.rule != "none"]
    blocks, exact = sum(one.blocks for one in there), sum(one.exact for one in there)
    console.say(f"{len(there)} of {len(rows)} tensors lie on their grid")
    if blocks:
        console.say(f"{exact:,} of their {blocks:,} blocks exactly ({exact / blocks:.3%})")
    return {
        "method": str(Method.LATTICE),
        "lattices": [
            {
                "name": row.name,
                "grid": row.grid,
                "rule": row.lattice.rule,
                "blocks": row.lattice.blocks,
                "exact": row.lattice.exact,
                "worst": row.lattice.worst,
            }
            for row in rows
        ],
    }


def _with_generated(
    loaded: libqat.LoadedModel, model: Path, text: Tensor, share: float, writer: libqat.Decoder
) -> Tensor:
    """The text's windows with as many by the float model as make up its share."""
    with _progress("writing text") as update:
        written = generation.of_model(loaded, model, text, share, writer, progress=update)
    return generation.mixed([text, written])


def _calibrate(method: Method, prepared: libqat.PreparedDecoder, windows: Any) -> dict[str, Any]:
    """Rounds by a method that looks at the inputs; what the JSON says of it."""
    with _progress(f"{method}: {windows.numel():,} tokens") as update:
        results = CALIBRATED[method](prepared, windows, progress=update)
    said: dict[str, Any] = {"method": str(method), "calibration_tokens": windows.numel()}
    if method is Method.AWQ:
        folds = [
            {"producers": f.producers, "weights": f.weights, "alpha": f.alpha, "error": f.error}
            for f in results
        ]
        used = [fold for fold in folds if fold["alpha"] > 0]
        console.say(f"scaled the inputs of {len(used)} of {len(folds)} groups of layers")
        return said | {"folds": folds}
    errors = {one.name: one.output_error for one in results}
    mean = (sum(error**2 for error in errors.values()) / max(1, len(errors))) ** 0.5
    console.say(f"layers err by {mean:.1%} of their outputs on the calibration text (RMS)")
    said |= {"output_errors": errors}
    costs = {one.name: one.expected_kl for one in results if one.expected_kl is not None}
    if costs:
        said |= {"expected_kl": costs}
        console.say(_most_expected(costs))
    return said


def _most_expected(costs: dict[str, float]) -> str:
    """The sum of what the matrices are expected to cost, and those that cost most."""
    total = sum(costs.values())
    most = sorted(costs, key=costs.__getitem__, reverse=True)[:3]
    named = ", ".join(
        f"{name.removesuffix('.weight')} {costs[name] / max(total, 1e-300):.1%}" for name in most
    )
    return f"expected KL to the float model {total:.4f} nats, most of it from {named}"


def _outcome(out: Path, rows: libqat.Report) -> dict[str, Any]:
    return {
        "checkpoint": str(out),
        "bytes": out.stat().st_size,
        "bits_per_weight": rows.bits_per_weight,
        "tensors": [
            {
                "name": row.name,
                "shape": list(row.shape),
                "grid": row.grid,
                "bits_per_weight": row.bits_per_weight,
                "bytes": row.bytes,
                "relative_error": row.relative_error,
            }
            for row in rows
        ],
    }
