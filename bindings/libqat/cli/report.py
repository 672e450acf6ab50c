"""`libqat report`: a run as one HTML page."""

from pathlib import Path
from typing import Annotated

import typer

from libqat import html_report

from . import console

NAME = "report"
HELP = """Write a run's report: one HTML file with everything inside, to read, forward or print.

What rounding cost and what training won back, the training curves, and each tensor's size, error and codes.
The scores come from [bold]libqat eval RUN[/bold]; without them the report says so.

Example: [bold]libqat report out/run[/bold]
"""


def run(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder of a finished fine-tuning.")],
    out: Annotated[Path | None, typer.Option(help="File to write. Default: report.html in the run.")] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="The float model that the run began with. Default: where the run says it was."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print what the report shows as JSON.")] = False,
) -> None:
    """See HELP."""
    with console.progress("measuring tensors") as update:
        data = html_report.gather_run(folder, model, progress=update)
    path = html_report.save_page(html_report.render(data), out or folder / html_report.REPORT)
    if json:
        console.print_json({"report": str(path), "bytes": path.stat().st_size, **data.as_json()})
    console.say(f"wrote {path}")
