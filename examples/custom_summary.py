"""The last step of `make custom`: vision.json and encoder.json as one summary.json, and both tables again."""

import argparse
import json
import sys
from pathlib import Path

import custom_encoder
import custom_vision
from libqat.cli import console

from libqat import run_folder

TABLES = {"vision": custom_vision.print_table, "encoder": custom_encoder.print_table}


def main() -> None:
    """Reads the folder's two results, writes the summary and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/custom"))
    out = parser.parse_args().out
    summary = {}
    for name in TABLES:
        path = out / f"{name}.json"
        try:
            summary[name] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            sys.exit(f"error: {path}: expected the figures of examples/custom_{name}.py, got {error}")
    run_folder.write_json(out / "summary.json", summary)
    for name, print_table in TABLES.items():
        print_table(summary[name])
    console.out.print(f"figures: {out / 'summary.json'}", highlight=False)


if __name__ == "__main__":
    main()
