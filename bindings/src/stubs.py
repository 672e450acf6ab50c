"""Writes bindings/libqat/_core.pyi, the types of the compiled module, or says that it is stale.

    python bindings/src/stubs.py [--check]

pybind11-stubgen reads them from the extension itself, so run it after a build (`make stubs` does).
"""

import ast
import difflib
import inspect
import subprocess
import sys
import tempfile
from pathlib import Path

from libqat import _core

STUB = Path(__file__).parents[1] / "libqat" / "_core.pyi"
INTEGER = "typing.SupportsInt | typing.SupportsIndex"
NUMBER = "typing.SupportsFloat | typing.SupportsIndex"


def exception_classes() -> list[ast.stmt]:
    """The exceptions are made in the extension under the package's name, so their stubs are made here."""
    classes = [c for _, c in inspect.getmembers(_core, inspect.isclass) if c.__module__ == "libqat"]
    classes.sort(key=lambda c: (len(c.__mro__), c.__name__))
    lines = []
    for kind in classes:
        bases = ", ".join(base.__name__ for base in kind.__bases__)
        lines += [f"class {kind.__name__}({bases}):", f'    """{inspect.getdoc(kind)}"""']
    return ast.parse("\n".join(lines)).body


class Precise(ast.NodeTransformer):
    """Where pybind11 says more or less than is true."""

    def __init__(self) -> None:
        self._exact = {INTEGER: "typing.SupportsIndex", NUMBER: "float"}  # no float passes for an integer

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        exact = self._exact.get(ast.unparse(node))
        return ast.parse(exact, mode="eval").body if exact else node

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        """What a callback receives are plain numbers."""
        if ast.unparse(node.value) != "collections.abc.Callable":
            self.generic_visit(node)
            return node
        outer, self._exact = self._exact, {INTEGER: "int", NUMBER: "float"}
        self.generic_visit(node)
        self._exact = outer
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        every = node.args.posonlyargs + node.args.args
        defaults = [None] * (len(every) - len(node.args.defaults)) + list(node.args.defaults)
        pairs = [*zip(every, defaults, strict=True)]
        pairs += zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
        for argument, default in pairs:
            if default is not None and ast.unparse(default) == "None":
                self._allow_none(argument)
        if node.name in {"__eq__", "__ne__"}:
            every[1].annotation = ast.Name("object")
        return node

    @staticmethod
    def _allow_none(argument: ast.arg) -> None:
        text = ast.unparse(argument.annotation) if argument.annotation else "typing.Any"
        if text != "typing.Any" and not text.endswith("None"):
            argument.annotation = ast.parse(f"{text} | None", mode="eval").body


def generate() -> str:
    """The stub's text, in the project's format."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pybind11_stubgen", "libqat._core", "-o", folder, "--exit-code"]
        subprocess.run(command, check=True)
        tree = ast.parse(Path(folder, "libqat", "_core.pyi").read_text(encoding="utf-8"))
    body = [s for s in tree.body if not (isinstance(s, ast.ImportFrom) and s.module == "libqat")]
    first = next(i for i, s in enumerate(body) if isinstance(s, ast.ClassDef | ast.FunctionDef))
    tree.body = body[:first] + exception_classes() + body[first:]
    text = ast.unparse(Precise().visit(tree))
    for rule in (["check", "--select", "I", "--fix"], ["format"]):
        command = [sys.executable, "-m", "ruff", *rule, "--quiet", "--stdin-filename", str(STUB), "-"]
        text = subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout
    return text


def main() -> int:
    new, old = generate(), STUB.read_text(encoding="utf-8") if STUB.exists() else ""
    if sys.argv[1:] != ["--check"]:
        STUB.write_text(new, encoding="utf-8")
    elif new != old:
        lines = old.splitlines(True), new.splitlines(True)
        sys.stdout.writelines(difflib.unified_diff(*lines, "committed", "compiled", n=1))
        print("bindings/libqat/_core.pyi is stale: run `make stubs` and commit it")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
