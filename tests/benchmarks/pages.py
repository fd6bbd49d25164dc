"""Write the tables of README.md and docs/benchmarks.md from one file of results, docs/results.csv.

    python tests/benchmarks/pages.py                                    # from the results that are there
    python tests/benchmarks/pages.py runs/learning_quality/runs.csv     # takes the results from these runs first

Methods that were not run keep the results that they have. The results are medians over the seeds, at the best rate of
each grid. A table stands between two comments of the page, ``<!-- table: NAME -->`` and ``<!-- end of table -->``.
"""

import argparse
import csv
import itertools
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for those who run the file by its path

from tests.benchmarks import tasks, tuners
from tests.benchmarks.results import MEASURES, Losses, Measure, Results, load
from tests.benchmarks.table import VANISHING, mean_ratio, ratio

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results.csv"
PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")

TUNED = "auto+cooldown"
"""The method that stands for the callback in a Trainer."""

KINDS = {
    "images: Fashion-MNIST, MLP and CNN, noisy and changed labels": (
        "fashion-mlp fashion-cnn fashion-large noisy-labels changed-labels long-mlp"
    ),
    "source code: transformers, word vectors": "text post-norm words",
    "functions: regression, a picture, a differential equation": "tanh picture equation",
    "auto-encoder, variational auto-encoder, diffusion": "compress annealed diffusion",
    "a table with embeddings, a graph": "table graph",
    "adapters and fine-tuning": "adapters adapters-dropout fine-tuning",
    "strong weight decay, weights that are clipped or normalized": "decay-0.3 decay-1 clipped unit-rows",
    "logistic regression, noisy quadratic": "logistic long-logistic quadratic",
    "two networks against each other": "gan",
    "digits, where the loss goes to 0 and ratios are very large or very small": "digits-16 digits-128 digits-full",
}
"""Kinds of tasks, and the names of their tasks."""


@dataclass(frozen=True)
class Figure:
    """The loss of a method at its best rate, and how many seeds its median is over."""

    task: str
    optimizer: str
    method: str
    measure: Measure
    rate: float
    loss: float
    seeds: int


def figures(results: Results) -> list[Figure]:
    """The figures of all methods, for training and validation."""
    settings = sorted({(run.task, run.optimizer, run.method) for run in results})
    counts = Counter((run.task, run.optimizer, run.method, run.rate) for run in results)
    losses = {measure: Losses(results, measure) for measure in MEASURES}
    found = []
    for setting, measure in itertools.product(settings, MEASURES):
        rate, loss = losses[measure].best(*setting)
        run = (*setting, rate)
        if loss == loss:  # tasks without validation data have none
            found.append(Figure(*setting, measure, rate, float(f"{loss:.5g}"), counts[run]))
    return found


def save(path: Path, found: Iterable[Figure]) -> None:
    """Write the figures as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in fields(Figure)])
        writer.writerows(map(astuple, found))


def read(path: Path) -> list[Figure]:
    """The figures in a file that ``save`` has written."""
    names: dict[str, Measure] = {name: name for name in MEASURES}
    with path.open(newline="") as file:
        return [
            Figure(task, optimizer, method, names[measure], float(rate), float(loss), int(seeds))
            for task, optimizer, method, measure, rate, loss, seeds in list(csv.reader(file))[1:]
        ]


def updated(before: Iterable[Figure], found: Sequence[Figure]) -> list[Figure]:
    """The figures after some methods were run again."""
    again = {(figure.task, figure.optimizer, figure.method) for figure in found}
    kept = [figure for figure in before if (figure.task, figure.optimizer, figure.method) not in again]
    return sorted([*kept, *found], key=astuple)


class Ratios:
    """What a method's loss is over another's at its best rate."""

    def __init__(self, path: Path) -> None:
        self._losses = {(own.task, own.optimizer, own.method, own.measure): own.loss for own in read(path)}
        present = {(task, optimizer) for task, optimizer, _, _ in self._losses}
        self.cases = [(task, name) for task in tasks.TASKS for name in tuners.BASES if (task, name) in present]

    def one(self, case: tuple[str, str], other: str, measure: Measure = "train_loss", method: str = TUNED) -> float:
        """The ratio of one case; not a number where one of the two was not measured."""
        mine, its = (self._losses.get((*case, name, measure), float("nan")) for name in (method, other))
        return ratio(mine, its)

    def mean(
        self, cases: Sequence[tuple[str, str]], other: str, measure: Measure = "train_loss", method: str = TUNED
    ) -> str:
        """The geometric mean of the cases that were measured, in words."""
        found = [one for case in cases if (one := self.one(case, other, measure, method)) == one]
        return f"{mean_ratio(found)[0]:.2f}" if found else ""

    @property
    def lasting(self) -> list[tuple[str, str]]:
        """The cases whose loss does not go to 0."""
        return [case for case in self.cases if not case[0].startswith(VANISHING)]


def kinds(ratios: Ratios) -> list[list[str]]:
    """The table of the README: a row for each kind of task."""
    others = {
        "constant": "over the best constant rate",
        "cooldown": "over the best rate with the same cooldown",
        "cosine": "over the best warm-up and cosine",
    }
    rows = [["kind of task", "cases", *others.values()]]

    def add(name: str, cases: Sequence[tuple[str, str]], measure: Measure = "train_loss") -> None:
        means = [ratios.mean(cases, other, measure) for other in others]
        if any(means):
            measured = [one for case in cases if (one := ratios.one(case, "constant", measure)) == one]
            rows.append([name, str(len(measured)), *means])

    add("**all but the digits**", ratios.lasting)
    add("the same, validation loss", ratios.lasting, "val_loss")
    for name, members in KINDS.items():
        add(name, [case for case in ratios.cases if case[0] in members.split()])
    return rows


def quality(ratios: Ratios) -> list[list[str]]:
    """A row for each task, a column for each optimizer: over the best constant rate / over the best cosine."""

    def cell(task: str, optimizer: str) -> str:
        pair = [ratios.one((task, optimizer), other) for other in ("constant", "cosine")]
        return " / ".join("<0.01" if one < 0.01 else f"{one:.2f}" for one in pair) if pair[0] == pair[0] else ""

    rows = [["task", *tuners.BASES]]
    for task in dict.fromkeys(task for task, _ in ratios.cases):
        rows.append([f"{tasks.TASKS[task].title}", *(cell(task, optimizer) for optimizer in tuners.BASES)])
    return rows


def variants(ratios: Ratios) -> list[list[str]]:
    """The means of the rule by what it knows of the run."""
    rows = [["what is known", "loss", "over the best constant rate", "over the best warm-up and cosine"]]
    names = {
        TUNED: "loss and length, as in a Trainer",
        "auto": "the loss alone",
        "auto+cosine": "a cosine schedule",
        "auto+untold": "neither, as in a plain loop that reports nothing",
    }
    for method, name in names.items():
        for measure, word in MEASURES.items():
            means = [ratios.mean(ratios.lasting, other, measure, method) for other in ("constant", "cosine")]
            rows.append([name, word, *means])
    return rows


def behind(ratios: Ratios) -> list[list[str]]:
    """The cases in which a tuned rate is more than 10 % better, the digits aside."""
    rows = [["task", "optimizer", "over the best constant rate", "over the best warm-up and cosine"]]
    for task, optimizer in ratios.lasting:
        pair = [ratios.one((task, optimizer), other) for other in ("constant", "cosine")]
        if max(pair) > 1.1:
            rows.append([tasks.TASKS[task].title, optimizer, *(f"{one:.2f}" for one in pair)])
    return rows


TABLES: dict[str, Callable[[Ratios], list[list[str]]]] = {
    "kinds": kinds,
    "quality": quality,
    "variants": variants,
    "behind": behind,
}


def filled(text: str, ratios: Ratios) -> str:
    """The page with its tables as they follow from the results."""

    def table(match: re.Match[str]) -> str:
        head, *body = TABLES[match[1]](ratios)
        lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *body)]
        return "\n".join([f"<!-- table: {match[1]} -->", *lines, "<!-- end of table -->"])

    return re.sub(r"<!-- table: (\w+) -->.*?<!-- end of table -->", table, text, flags=re.DOTALL)


def main(argv: Sequence[str] | None = None) -> None:
    """Take the results from runs, if they are named, and write the tables."""
    parser = argparse.ArgumentParser(description="Write the tables of the pages from docs/results.csv.")
    parser.add_argument("runs", nargs="*", type=Path, help="files of runs, from which the results are taken first")
    runs: list[Path] = parser.parse_args(argv).runs
    if runs:
        found = figures({run: outcome for path in runs for run, outcome in load(path).items()})
        save(RESULTS, updated(read(RESULTS), found))
    ratios = Ratios(RESULTS)
    for page in PAGES:
        page.write_text(filled(page.read_text("utf8"), ratios), "utf8")


if __name__ == "__main__":
    main()
