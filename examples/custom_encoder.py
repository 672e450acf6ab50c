"""An encoder of your own at 4 and 2 bits: all-MiniLM-L6-v2, trained to keep its sentence embeddings.

    .venv/bin/python examples/custom_encoder.py

An ordinary Hugging Face model in a loop of its own. No labels are needed: on the same sentence, the rounded
model's token vectors shall be those of the float model. Under each policy six models face each other: float;
rounded to nearest with the grid's own scales (ptq) and with searched ones (search); rounded so that the
sentence embeddings err least (guided); trained from the first with the grid's own scales (ste), and from the
last with learned ones (qat). All but the first are read back from a checkpoint. A table goes to standard
output; the trained checkpoints and encoder.json to the folder `--out`.
"""

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from encoder import qat, sentences
from libqat.cli import console, program
from torch import Tensor, nn

import libqat
from libqat import data, run_folder

MODEL = "all-MiniLM-L6-v2"
BLOCK = r"encoder\.layer\.\d+\."
TITLES = {"movies": "movies", "nyt": "NYT", "amazon": "Amazon"}


class Candidate(NamedTuple):
    """A policy and what it is trained with."""

    name: str
    title: str
    attention: str
    feed_forward: str
    embeddings: str
    ste_rate: float
    """Learning rate of the plain run."""
    learning_rate: float
    scale_rate: float
    """Of learned scales, relative to their size."""

    @property
    def policy(self) -> dict:
        """LayerNorm and biases are no one's match: they stay float."""
        rules = [
            {"match": BLOCK + r"attention\..*", "kind": "linear", "weight": self.attention},
            {"match": BLOCK + r"(intermediate|output)\.dense", "weight": self.feed_forward},
            {"match": r"embeddings\..*", "kind": "embedding", "weight": self.embeddings},
        ]
        return {"rules": rules}


def uniform(grid: str, embeddings: str, *rates: float) -> Candidate:
    """Every linear on one grid."""
    return Candidate(grid, grid, grid, grid, embeddings, *rates)


LEGEND = """\
cosine: to the float model's embedding of the same sentence; same nearest: share of the movie sentences whose
nearest other sentence stays the same; rating: Spearman's correlation with human sentiment ratings, predicted
by a regression fitted on the float model's embeddings, or (own fit) on the model's own"""

CANDIDATES = (
    uniform("q4_0", "q8_0", 1e-4, 2e-4, 1e-3),
    uniform("int4_g32", "int8_channel", 1e-4, 2e-4, 1e-3),
    uniform("int2_g32", "int8_channel", 1e-3, 5e-4, 3e-3),
    Candidate("mixed-e4", "4-bit, FFN 2-bit", "int4_g32", "int2_g32", "int4_g32", 1e-3, 5e-4, 3e-3),
)

ROWS = ("ptq", "search", "guided", "ste", "qat")

Vectors = dict[str, Tensor]
"""Text -> embeddings float32[N, D]; "regression" too."""


def parse() -> argparse.Namespace:
    """The command line; the defaults are the published run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [candidate.name for candidate in CANDIDATES]
    parser.add_argument("--out", type=Path, default=Path("out/custom"))
    parser.add_argument(
        "--policies", nargs="+", choices=names, default=names, metavar="NAME", help=f"of {names}"
    )
    parser.add_argument("--steps", type=int, default=200, help="of each policy")
    parser.add_argument("--batch-size", type=int, default=32, help="sentences")
    parser.add_argument("--judged", type=int, default=500, help="sentences of each text that are scored")
    parser.add_argument(
        "--regression", type=int, default=1000, help="sentences that the sentiment is fitted on"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def load(folder: Path) -> tuple[nn.Module, Any]:
    """The float model (without BERT's pooler, which sentence embeddings do not use) and its tokenizer."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.BertModel.from_pretrained(
        folder, dtype=torch.float32, add_pooling_layer=False, attn_implementation="eager"
    )
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


class Judge:
    """Scores models by their embeddings of the same sentences."""

    def __init__(self, texts: sentences.Texts, tokenizer, teacher: nn.Module):
        self.texts = texts
        self.tokenizer = tokenizer
        self.reference = self.vectors(teacher)
        self.drop_in = sentences.Regression(self.reference["regression"], texts.regression.ratings)

    def vectors(self, model: nn.Module) -> Vectors:
        """Embeddings of everything that is measured, in float32."""
        texts = {**self.texts.judged, "regression": self.texts.regression}
        return {name: sentences.embed(model, self.tokenizer, text.texts) for name, text in texts.items()}

    def metrics(self, models: dict[str, Vectors]) -> list[dict]:
        """Entries as in evaluation.json: each metric's value for each row, with its 95 % interval."""
        metrics = {}
        for text, (_, ratings) in self.texts.judged.items():
            metrics[f"cosine {text}"] = lambda v, t=text: (v[t] * self.reference[t]).sum(1)
            metrics[f"neighbour {text}"] = lambda v, t=text: sentences.same_neighbour(v[t], self.reference[t])
            metrics[f"sentiment {text}, float's regression"] = lambda v, t=text, r=ratings: (
                sentences.rank_products(self.drop_in(v[t]), r)
            )
            metrics[f"sentiment {text}, own regression"] = lambda v, t=text, r=ratings: (
                sentences.rank_products(
                    sentences.Regression(v["regression"], self.texts.regression.ratings)(v[t]), r
                )
            )
        return [libqat.compare_metric(models, metric, name=name) for name, metric in metrics.items()]


class Study(NamedTuple):
    """What all policies share."""

    teacher: nn.Module
    steps: list[qat.Batch]
    targets: list[Tensor]
    judge: Judge
    out: Path

    def run(self, candidate: Candidate) -> dict:
        """Rounds, trains and scores one policy in every way, each as a file holds it."""
        path = self.out / f"encoder-{candidate.name}.qat.safetensors"
        plain = qat.attach(self.teacher, candidate.policy)
        best = qat.attach(self.teacher, candidate.policy, "learned")
        vectors, seconds = {"float": self.judge.reference}, {}

        def score(row: str, prepared: libqat.PreparedModel) -> None:
            vectors[row] = self.judge.vectors(qat.ship(prepared, path))

        def train(row: str, prepared: libqat.PreparedModel, rate: float) -> None:
            begin = time.monotonic()
            with console.progress(f"training {candidate.title}, {row}") as update:
                qat.train(prepared, self.steps, self.targets, rate, candidate.scale_rate, update)
            seconds[row] = round(time.monotonic() - begin, 1)
            score(row, prepared)

        score("ptq", plain)
        score("search", best)
        train("ste", plain, candidate.ste_rate)
        begin = time.monotonic()
        with console.progress(f"rounding {candidate.title}") as update:
            qat.guide(best, self.steps, update)
        seconds["guided"] = round(time.monotonic() - begin, 1)
        score("guided", best)
        train("qat", best, candidate.learning_rate)
        return {
            "name": candidate.name,
            "title": candidate.title,
            "policy": candidate.policy,
            "ste_rate": candidate.ste_rate,
            "learning_rate": candidate.learning_rate,
            "scale_rate": candidate.scale_rate,
            "seconds": seconds,
            "checkpoint": str(path),
            "bytes": path.stat().st_size,
            "bits_per_weight": best.report().bits_per_weight,
            "metrics": self.judge.metrics(vectors),
        }


def figure(entry: dict, metric: str, row: str, form: str = "{:.3f}") -> str:
    """One figure of the table."""
    rows = next(found["rows"] for found in entry["metrics"] if found["name"] == metric)
    return form.format(next(found["value"] for found in rows if found["row"] == row))


def print_table(summary: dict) -> None:
    """Each policy rounded in three ways and trained in two, below the float model."""
    columns = [">bits", ">MB", *(f">cosine\n{title}" for title in TITLES.values()), ">same\nnearest"]
    columns += [">rating\nmovies", ">own fit", ">rating\nAmazon"]
    table = console.table("", "linears", "model", *columns)

    def add(entry: dict, title: str, row: str, bits: float, size: float) -> None:
        cells = [figure(entry, f"cosine {text}", row, "{:.4f}") for text in TITLES]
        cells.append(figure(entry, "neighbour movies", row, "{:.1%}"))
        tasks = ("movies, float's", "movies, own", "amazon, float's")
        cells += [figure(entry, f"sentiment {task} regression", row) for task in tasks]
        table.add_row(title, row, f"{bits:.2f}", f"{size / 1e6:.1f}", *cells)

    add(summary["policies"][0], "float32", "float", 32, summary["float"]["bytes"])
    for entry in summary["policies"]:
        table.add_section()
        for row in ROWS:
            add(entry, entry["title"] if row == "ptq" else "", row, entry["bits_per_weight"], entry["bytes"])
    console.out.print(table)
    console.out.print(LEGEND, highlight=False)


def main() -> None:
    """All stages in order."""
    begin = time.monotonic()
    options = parse()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    texts = sentences.read(options.judged, options.regression, options.seed)
    teacher, tokenizer = load(data.minilm())
    console.say("embedding the sentences with the float model")
    judge = Judge(texts, tokenizer, teacher)
    settings = qat.Training(options.steps, options.batch_size, options.seed)
    steps = qat.batches(tokenizer, texts.training, settings)
    with console.progress("float token vectors to learn from") as update:
        targets = qat.token_vectors(teacher, steps, update)
    study = Study(teacher, steps, targets, judge, options.out)
    chosen = [candidate for candidate in CANDIDATES if candidate.name in options.policies]
    weights = sum(parameter.numel() for parameter in teacher.parameters())
    summary = {
        "model": MODEL,
        "weights": weights,
        "sentences": {
            "judged": options.judged,
            "regression": options.regression,
            "training": len(texts.training),
        },
        "steps": options.steps,
        "batch_size": options.batch_size,
        "seed": options.seed,
        "float": {"bytes": 4 * weights, "bits_per_weight": 32},
        "policies": [study.run(candidate) for candidate in chosen],
    }
    summary["seconds"] = round(time.monotonic() - begin, 1)
    path = options.out / "encoder.json"
    run_folder.write_json(path, summary)
    print_table(summary)
    console.out.print(
        f"{options.judged} sentences of each text; no weight of a file differs from the trained model's\n"
        f"done in {console.clock(summary['seconds'])}; figures with 95 % intervals: {path}",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    program.run(main, interrupted="interrupted")
