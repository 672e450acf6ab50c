"""`libqat eval`: models side by side on the same text."""

from pathlib import Path
from typing import Annotated

import typer

import libqat
from libqat import finetune

from . import console

NAME = "eval"
HELP = """Compare models on a text: perplexity, and KL and top-1 agreement with a reference.

Models are Hugging Face folders, GGUF files or checkpoints; all see the same tokens in the same pass, computed
in float32. KL to the float model is the figure to trust: perplexity also falls when a model merely learns the
text.

Example: [bold]libqat eval rtn.qat.safetensors out/run/model.qat.safetensors --reference ./SmolLM2-135M
--text other.txt[/bold]
"""


def run(
    models: Annotated[list[Path], typer.Argument(help="Models and checkpoints to score.")],
    text: Annotated[list[Path], typer.Option(help="UTF-8 text file; may be given several times.")],
    reference: Annotated[Path, typer.Option(help="The model to compare with, as a rule the float one.")],
    tokens: Annotated[int, typer.Option(min=2, help="At most this many tokens of the text.")] = 65536,
    window: Annotated[int, typer.Option(min=2, help="Tokens that are predicted together.")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="Windows per forward pass.")] = 4,
    json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
) -> None:
    """See HELP."""
    ids = finetune.tokenize_files(reference, text)[:tokens]
    paths = [reference, *models]
    decoders = [open_decoder(path) for path in paths]
    with console.progress("scoring") as update:
        scores = libqat.compare(
            decoders[0], decoders[1:], ids, window=window, batch=batch, progress=lambda *done: update(*done)
        )
    rows = [
        {
            "model": str(path),
            "tokens": s.tokens,
            "ppl": s.perplexity,
            "nll": s.nll,
            "kl": s.kl,
            "top1": s.top1,
        }
        for path, s in zip(paths, scores, strict=True)
    ]
    if json:
        console.print_json(rows)
        return
    table = console.table(f"{scores[0].tokens:,} predicted tokens", "model", ">ppl", ">KL", ">top-1")
    for row in rows:
        table.add_row(row["model"], f"{row['ppl']:.3f}", f"{row['kl']:.4f}", f"{row['top1']:.2%}")
    console.out.print(table)


def open_decoder(path: Path) -> libqat.Decoder:
    """A checkpoint (*.safetensors file) or a model (folder, GGUF) as a decoder without gradients."""
    is_checkpoint = path.suffix == ".safetensors"
    decoder = (libqat.load_checkpoint if is_checkpoint else libqat.load_model)(path).decoder
    decoder.set_trainable(False)
    return decoder
