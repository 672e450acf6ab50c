"""Executes docs/tutorial.ipynb and keeps what it prints and plots in it, for readers who only look.

python docs/execute_tutorial.py

A test executes the notebook too, and compares what it prints with what is kept.
"""

import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parent / "tutorial.ipynb"


def execute(timeout: int = 600) -> nbformat.NotebookNode:
    """The notebook with fresh outputs, run in a temporary folder. An error in a cell is raised.

    timeout: seconds for one cell. What depends on the machine or the hour is left out: standard error and
    the times of the cells.
    """
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=timeout, resources={"metadata": {"path": folder}}).execute()
    notebook.metadata.language_info = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def main() -> None:
    """Writes the outputs into the notebook."""
    nbformat.write(execute(), NOTEBOOK)
    print(f"{NOTEBOOK.name} written")


if __name__ == "__main__":
    main()
