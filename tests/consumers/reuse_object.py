#!/usr/bin/env python3
"""A compiler launcher that copies an object instead of compiling it again.

    REUSE_FROM=compile_commands.json reuse_object.py compiler arguments...

When the build in REUSE_FROM has compiled the same source by the same command, its object is taken; anything
else is compiled. The library as a subfolder then costs seconds, and is compiled where a flag differs.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

OUTPUTS = {"-o", "-MT", "-MF"}  # options that name what is written, with their value


def essence(command: list[str]) -> list[str]:
    """The command without the names of what it writes."""
    kept, skip = [], False
    for word in command:
        if not skip and word not in OUTPUTS and word != "-MD":
            kept.append(word)
        skip = word in OUTPUTS
    return kept


def value(command: list[str], option: str) -> str | None:
    """What follows `option`."""
    return command[command.index(option) + 1] if option in command[:-1] else None


def compiled_object(commands: Path, command: list[str]) -> Path | None:
    """The object that the build under test made by this command."""
    for entry in json.loads(commands.read_text(encoding="utf-8")):
        other = shlex.split(entry["command"])
        if entry["file"] == command[-1] and essence(other) == essence(command):
            found = Path(entry["directory"], entry["output"])
            return found if found.exists() else None
    return None


def main() -> int:
    commands, command = Path(os.environ["REUSE_FROM"]), sys.argv[1:]
    output, dependencies = value(command, "-o"), value(command, "-MF")
    found = compiled_object(commands, command) if output else None
    if found is None:
        return subprocess.call(command)
    shutil.copyfile(found, output)
    if dependencies:
        Path(dependencies).write_text(f"{output}: {command[-1]}\n", encoding="utf-8")
    return 0


sys.exit(main())
