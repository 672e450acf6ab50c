"""Builds the API reference: C++ with Doxygen, Python with pdoc.

    python docs/reference.py [--out out/docs] [cpp] [python]

Fails when a public C++ name has no comment, a comment does not fit its declaration, or a public Python name
has no docstring: a reference with holes is worse than none. Both builders come with requirements.txt.
"""

import argparse
import inspect
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEADERS = ROOT / "libqat" / "include"

# Names that say what they are (fields, accessors, constructors, operators), codecs (the head of their file
# tells the format, and grid.hpp the functions that all of them have) and their steps (the same of steps.hpp).
NEED_NO_COMMENT = re.compile(
    r"\((variable|enumvalue)\) of|"
    r"\(\) (const )?noexcept \(function\)|"
    r"Member operator|"
    r"Member (?P<name>\w+)\(.* of (class|struct) [\w:]+::(?P=name) |"
    r"(Compound|of struct|of class) qat::grid::"
    r"(T?Q\d_\w+|(Signed|Offset)Block|BF16|F16|F32|Int\w+|Mlx\w+|Mxfp4|Nvfp4|"
    r"\w*KQuant(< .* >)?|\w+ScaleRule(< .* >)?|\w*Steps(< .* >)?|\w+Levels(< .* >)?) "
)


def with_file_comment(header: str) -> str:
    """The comment at the head of a file, which is written for readers of the source, as Doxygen's."""
    match = re.match(r"#pragma once\n\n((?://.*\n)+)", header)
    if not match:
        return header
    comment = re.sub(r"^//", "///", match[1], flags=re.M)
    return f"#pragma once\n/// \\file\n{comment}{header[match.end() :]}"


def build_cpp(out: Path) -> list[str]:
    """Doxygen's complaints, and out/index.html."""
    # The environment's own first: a virtual environment need not be activated.
    doxygen = shutil.which(
        "doxygen", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    )
    if doxygen is None:
        return ["doxygen: expected it beside this Python or in PATH, found none: run `make setup`"]
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        for path in sorted(HEADERS.rglob("*.hpp")):
            copy = Path(folder, path.relative_to(HEADERS))
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(with_file_comment(path.read_text(encoding="utf-8")), encoding="utf-8")
        settings = (ROOT / "docs" / "Doxyfile").read_text(encoding="utf-8")
        settings += f'INPUT = "{folder}" "{ROOT / "docs" / "namespaces.dox"}"\nSTRIP_FROM_PATH = "{folder}"\n'
        settings += f'STRIP_FROM_INC_PATH = "{folder}"\nOUTPUT_DIRECTORY = "{out}"\nHTML_OUTPUT = .\n'
        done = subprocess.run([doxygen, "-"], input=settings, capture_output=True, text=True, cwd=ROOT)
        warnings = [line.replace(folder, "libqat/include") for line in done.stderr.splitlines()]
    if done.returncode != 0 and not warnings:
        warnings = [f"doxygen: exit code {done.returncode}"]
    return [line for line in warnings if line and not NEED_NO_COMMENT.search(line)]


def undocumented_python() -> list[str]:
    """Public names of libqat, and public methods of its classes, without a docstring."""
    import libqat

    missing = []
    for name in libqat.__all__:
        value = getattr(libqat, name)
        if not (inspect.isclass(value) or inspect.isroutine(value) or inspect.ismodule(value)):
            continue
        members = vars(value).items() if inspect.isclass(value) else []
        named = [(name, value), *((f"{name}.{key}", member) for key, member in members if key[0] != "_")]
        missing += [key for key, member in named if _is_api(member) and not inspect.getdoc(member)]
    return [f"libqat.{name}: has no docstring" for name in missing]


def _is_api(value: object) -> bool:
    return inspect.isroutine(value) or inspect.isclass(value) or isinstance(value, property)


def build_python(out: Path) -> list[str]:
    """What pdoc and `undocumented_python` complain of, and out/index.html."""
    shutil.rmtree(out, ignore_errors=True)
    command = [
        sys.executable,
        "-m",
        "pdoc",
        "libqat",
        "-o",
        str(out),
        "--docformat",
        "google",
        "--no-show-source",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    complaints = done.stderr.splitlines() if done.returncode else re.findall(r"^Warn.*", done.stderr, re.M)
    return complaints + undocumented_python()


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the API reference.")
    parser.add_argument("parts", nargs="*", choices=["cpp", "python", []], help="by default both")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "docs")
    arguments = parser.parse_args()
    problems = []
    for name, build in (("cpp", build_cpp), ("python", build_python)):
        if name in (arguments.parts or ["cpp", "python"]):
            problems += build(arguments.out.resolve() / name)
            print(arguments.out / name / "index.html")
    print("\n".join(problems), file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
