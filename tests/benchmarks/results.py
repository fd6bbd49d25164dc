"""The runs of a benchmark on disk: one line of a CSV file each, written as soon as the run is done."""

import csv
import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Literal

Measure = Literal["train_loss", "val_loss", "final_lr"]

MEASURES: dict[Measure, str] = {"train_loss": "training", "val_loss": "validation"}
"""The losses, and what tables call them."""


@dataclass(frozen=True, order=True)
class Run:
    """What determines a run."""

    task: str
    optimizer: str
    method: str
    rate: float
    seed: int
    steps: int


@dataclass(frozen=True)
class Outcome:
    """What is measured of a run."""

    train_loss: float  # mean over the last eighth of the steps; infinite where the run diverged
    val_loss: float  # after the last step; not a number where the task has none
    final_lr: float  # effective rate of the last step
    seconds: float


Results = dict[Run, Outcome]

COLUMNS = [field.name for field in (*fields(Run), *fields(Outcome))]


def load(path: Path) -> Results:
    """The finished runs; what a kill has cut off is removed from the file, so that lines can be appended."""
    text = path.read_text() if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return {
        Run(row["task"], row["optimizer"], row["method"], float(row["rate"]), int(row["seed"]), int(row["steps"])): (
            Outcome(*(float(row[field.name]) for field in fields(Outcome)))
        )
        for row in csv.DictReader(whole.splitlines())
    }


def append(path: Path, run: Run, outcome: Outcome) -> None:
    """Add a run, and the head of the table if it is the first."""
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if file.tell() == 0:
            writer.writerow(COLUMNS)
        writer.writerow([*astuple(run), *astuple(outcome)])


class Losses:
    """Medians over the seeds, for one measure."""

    def __init__(self, results: Results, measure: Measure) -> None:
        by_setting: dict[tuple[str, str, str], dict[float, list[float]]] = {}
        for run, outcome in sorted(results.items(), key=lambda item: item[0]):
            by_rate = by_setting.setdefault((run.task, run.optimizer, run.method), {})
            by_rate.setdefault(run.rate, []).append(getattr(outcome, measure))
        self._spreads = {
            (*setting, rate): max(losses) / min(losses) if min(losses) > 0 else math.nan
            for setting, by_rate in by_setting.items()
            for rate, losses in by_rate.items()
        }
        self._counts = {
            (*setting, rate): len(losses) for setting, by_rate in by_setting.items() for rate, losses in by_rate.items()
        }
        self._medians = {
            setting: {rate: median(losses) for rate, losses in by_rate.items()}
            for setting, by_rate in by_setting.items()
        }

    def curve(self, task: str, optimizer: str, method: str) -> dict[float, float]:
        """Rate to loss, in ascending order of the rates."""
        return self._medians.get((task, optimizer, method), {})

    def best(self, task: str, optimizer: str, method: str) -> tuple[float, float]:
        """The rate with the lowest loss, and that loss; not numbers where there are no runs.

        Rates that fewer seeds have tried than others do not count.
        """
        counts = {rate: self._counts[task, optimizer, method, rate] for rate in self.curve(task, optimizer, method)}
        tried = {
            rate: loss
            for rate, loss in self.curve(task, optimizer, method).items()
            if counts[rate] == max(counts.values())
        }
        return min(tried.items(), key=lambda item: item[1], default=(math.nan, math.nan))

    def spread(self, task: str, optimizer: str, method: str, rate: float) -> float:
        """The highest over the lowest loss of the seeds at one rate; not a number where there are no runs."""
        return self._spreads.get((task, optimizer, method, rate), math.nan)

    def at(self, task: str, optimizer: str, method: str, rate: float) -> float:
        """The loss at one rate; not a number where there are no runs."""
        return self.curve(task, optimizer, method).get(rate, math.nan)


def select(results: Results, runs: Iterable[Run]) -> Results:
    """The results of these runs, as far as they are finished."""
    return {run: results[run] for run in runs if run in results}
