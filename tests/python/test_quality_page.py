"""The program of `make quality`: what its page keeps, and the mixtures of widths that it finds."""

from itertools import product

import ablations
import cases
import goals
import mixture
import published
import pytest
import torch


def row(case, text, kl, method="qat"):
    trained = method == "qat"
    entry = {
        "case": case.name,
        "grid": case.grid,
        "method": method,
        "seed": 0,
        "text": text,
        "eval_tokens": 4080,
    }
    entry |= {"tokens": case.steps * 512 if trained else 0, "ppl_float": 20.0, "kl_removed": 1 - kl / 0.4}
    for figure, rounded, model in (("ppl", 26.0, 21.0), ("kl", 0.4, kl), ("top1", 0.7, 0.9)):
        entry |= {f"{figure}_ptq": rounded, f"{figure}_qat": model if trained else None}
    return entry


def rows(case, kl):
    return [row(case, text, kl, method) for text in ("wiki", "other") for method in ("rtn", "qat")]


def test_a_page_keeps_the_sections_that_a_command_left_out(tmp_path):
    page = tmp_path / "quality.md"
    first, second = cases.named("q4_0"), cases.named("q2_0")
    published.write([*rows(first, 0.1), *rows(second, 0.2)], page, {})
    before = published.sections(page.read_text())
    assert list(before) == [goals.TITLE, first.title, second.title]
    published.write(rows(second, 0.3), page, {mixture.TITLE: f"## {mixture.TITLE}\n\nnew\n"})
    after = published.sections(page.read_text())
    assert list(after) == [*before, mixture.TITLE]
    assert after[first.title] == before[first.title]
    assert "0.3000" in after[second.title]
    assert "0.2000" not in after[second.title]
    assert "| `q4_0` | KL removed | ≥ 62.0 % | 75.0 % | 75.0 % | yes |" in after[goals.TITLE]
    assert "| `q2_0` | nats above float |" in after[goals.TITLE]
    assert page.read_text().startswith(published.HEAD)
    published.write([], page, {})
    assert published.sections(page.read_text()) == after


def test_a_goal_that_was_missed_says_so():
    case = cases.named("q4_0")
    assert goals.section(rows(case, 0.1)).count("**no**") == 0
    # 0.3 of RTN's 0.4 leaves 25 % removed where 62 % and, of the best PTQ, 40 % are asked for.
    assert goals.section(rows(case, 0.3)).count("**no**") == 2


def parts(costs):
    grids = zip((mixture.LOW, mixture.UNIFORM, mixture.HIGH), (2.25, 3.25, 4.25), strict=True)
    return [
        {"name": str(number), "grid": grid, "weights": 100, "bits": bits, "kl": cost[place]}
        for place, (grid, bits) in enumerate(grids)
        for number, cost in enumerate(costs)
    ]


def test_the_best_mixtures_are_the_best_of_all():
    generator = torch.Generator().manual_seed(0)
    costs = [(float(16 * s), float(4 * s), float(s)) for s in torch.rand(8, generator=generator)]
    found = mixture.best(parts(costs))
    assert [mix.bits for mix in found] == pytest.approx([4.25 - 2 * count / 8 for count in range(9)])
    for count, mix in enumerate(found):
        every = [
            sum(cost[0] if low else cost[2] for low, cost in zip(few, costs, strict=True))
            for few in product((False, True), repeat=8)
            if sum(few) == count
        ]
        assert mix.kl == pytest.approx(min(every))
    assert mixture.within(found, 3.25) == found[4]


def test_a_mixture_wins_only_where_parts_differ_enough():
    """Half of the weights at 2 bits and half at 4 have 8.5 times the error of 4 bits, 3 bits 4 times."""
    alike, apart = [(16.0, 4.0, 1.0)] * 4, [(16.0, 4.0, 1.0)] * 2 + [(1.6, 0.4, 0.1)] * 2
    for costs, wins in ((alike, False), (apart, True)):
        uniform = mixture.cost(parts(costs), lambda name: mixture.UNIFORM)
        assert (mixture.within(mixture.best(parts(costs)), uniform.bits).kl < uniform.kl) == wins


def test_what_each_matrix_costs_is_measured_on_every_grid(hf_folder):
    windows = torch.randint(0, 250, (4, 32))
    known, low = mixture.measured(hf_folder, mixture.LOW, windows)
    _, high = mixture.measured(hf_folder, mixture.HIGH, windows, known)
    assert [row["name"] for row in low] == [row["name"] for row in high]
    assert all(few["kl"] > many["kl"] > 0 for few, many in zip(low, high, strict=True))
    assert {(row["bits"], row["grid"]) for row in low + high} == {(2.25, mixture.LOW), (4.25, mixture.HIGH)}


def test_shares_are_of_a_weight_and_in_means():
    """A kind of twice the weights and twice the cost is as dear as the others."""
    found = []
    for kind in mixture.KINDS:
        for layer in range(6):
            factor = 2 if kind == "down_proj" else 1
            entry = {"name": f"model.layers.{layer}.x.{kind}.weight", "grid": mixture.LOW, "bits": 2.25}
            found.append(entry | {"weights": 100 * factor, "kl": factor * (3.0 if layer == 5 else 0.6)})
    text = mixture.shares(found)
    assert text.startswith("| at `int2_g64@fp16`, layers | 0 – 4 | 5 – 9 |")
    assert text.count("| 0.60 | 3.00 |") == len(mixture.KINDS)


def test_every_experiment_has_a_place_on_the_page():
    assert {ablations.title(name) for name in ablations.CHANGES} <= set(published.FURTHER)
