"""`libqat policies`: the policies that ship with libqat."""

import json as json_module
from typing import Annotated

import typer

from libqat import Policy

from . import console

NAME = "policies"
HELP = """List the policies that ship with libqat, or print one as JSON, ready to be saved and changed.

Example: [bold]libqat policies gguf-q4_0 > my-policy.json[/bold]
"""


def _presets() -> list[str]:
    return Policy.presets()


def run(
    name: Annotated[
        str | None, typer.Argument(help="Print this one.", autocompletion=_presets, show_default=False)
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the list as JSON, policies included.")] = False,
) -> None:
    """See HELP."""
    if name is not None:
        print(_text(Policy.preset(name)))
    elif json:
        console.print_json(
            [
                {"name": each, "summary": Policy.preset_summary(each), "policy": _parsed(Policy.preset(each))}
                for each in Policy.presets()
            ]
        )
    else:
        table = console.table("", "policy", "for")
        for each in Policy.presets():
            table.add_row(each, Policy.preset_summary(each))
        console.out.print(table)


def _parsed(policy: Policy) -> dict:
    return json_module.loads(policy.to_json())


def _text(policy: Policy) -> str:
    """One rule a line: that is how a policy is read and changed."""
    parsed = _parsed(policy)
    rules = ",\n    ".join(json_module.dumps(rule) for rule in parsed.pop("rules"))
    rest = "".join(
        f",\n  {json_module.dumps(key)}: {json_module.dumps(value)}" for key, value in parsed.items()
    )
    return f'{{\n  "rules": [\n    {rules}\n  ]{rest}\n}}'
