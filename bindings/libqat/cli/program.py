"""What programs around the library share: finished parts that are kept, and how a program ends."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import libqat
from libqat import run_folder

from . import console


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What `make` returns, or what it returned when an earlier run wrote it to `path` as JSON."""
    if path.exists():
        return console.read_json(path)
    found = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    run_folder.write_json(path, found)
    return found


def run(
    main: Callable[[], int | None], interrupted: str = "interrupted; the same command continues"
) -> NoReturn:
    """Ends the process with main's exit code, 1 after one of libqat's errors, 130 after Ctrl-C.

    interrupted: what Ctrl-C makes it say.
    """
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        console.say(interrupted)
        sys.exit(130)
    except libqat.Error as error:
        console.say(f"error: {error}")
        sys.exit(1)
