"""A finished, evaluated run of the tiny model, for the tests of the report."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from libqat import finetune, html_report

STEPS = 24


def document(name: str = "held-out") -> dict:
    """A document in the layout of evaluation.json."""
    values = {"float": (20.0, 3.0, 0.0, 1.0), "ptq": (30.0, 3.4, 0.3, 0.7), "qat": (24.0, 3.18, 0.12, 0.8)}
    fields = ("ppl", "nll", "kl", "top1")

    def text_row(row: str, scores: tuple) -> dict:
        pairs = zip(fields, scores, strict=True)
        found = {"row": row}
        for field, score in pairs:
            found |= {field: score, f"{field}_interval": [0.95 * score, 1.05 * score]}
        return found

    return {
        "format": 1,
        "models": [
            {"row": row, "path": f"/models/{row}", "bytes": 1000, "bits_per_weight": 4.5} for row in values
        ],
        "texts": [
            {
                "name": name,
                "tokens": 4096,
                "window": 256,
                "resamples": 1000,
                "rows": [text_row(row, scores) for row, scores in (values | {"mine": values["qat"]}).items()],
                "kl_removed": 0.6,
                "kl_removed_interval": [0.55, 0.65],
                "nll_removed": 0.55,
                "nll_removed_interval": [0.4, None],
            }
        ],
        "choices": [
            {
                "name": name,
                "questions": 90,
                "rows": [
                    {
                        "row": row, "accuracy": 0.5, "accuracy_interval": [0.4, 0.6], "agreement": 0.9,
                        "agreement_interval": None,
                    }
                    for row in values
                ],
            }
        ],
        "metrics": [
            {"name": name, "rows": [{"row": row, "value": 0.25, "interval": None} for row in values]},
        ],
    }  # fmt: skip


@pytest.fixture(scope="session")
def evaluation():
    """evaluation(name) is a document in the layout of evaluation.json."""
    return document


@pytest.fixture(scope="session")
def finished_run(hf_folder, text_file, tmp_path_factory):
    """A finished run of the tiny model, evaluated. Tests copy it before they change it."""
    folder = tmp_path_factory.mktemp("report") / "run"
    torch.set_num_threads(2)
    tokens = finetune.tokenize_files(hf_folder, [text_file])
    options = {
        "steps": STEPS, "sequence_length": 16, "learning_rate": 3e-4, "telemetry_every": 4,
        "compute_dtype": "float32", "frozen": list(finetune.FROZEN),
    }  # fmt: skip
    finetune.start(hf_folder, tokens, "gguf-q4_0", folder, text=[text_file], **options).train()
    (folder / "evaluation.json").write_text(json.dumps(document()))
    return folder


@pytest.fixture(scope="session")
def report_data(finished_run):
    return html_report.gather_run(finished_run)


@pytest.fixture(scope="session")
def report_page(report_data):
    return html_report.render(report_data)


@pytest.fixture
def run_copy(finished_run, tmp_path):
    return Path(shutil.copytree(finished_run, tmp_path / "run"))
