"""The tables: every method's loss as a ratio to that of the best rate of a grid."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import geometric_mean

from tests.benchmarks.quadratic import best_constant
from tests.benchmarks.results import MEASURES, Losses, Measure, Results
from tests.benchmarks.tuners import PAPER_RATES, RULE_RATE

PAPER_RULES = ("additive", "multiplicative")
MIDDLE_RATE = PAPER_RATES[1]

OTHERS = {
    "Prodigy": "prodigy",
    "Prodigy+cos / cos": "prodigy+cosine",
    "Prodigy-plus": "prodigy-plus",
    "Mechanic": "mechanic",
    "Mechanic+cos / cos": "mechanic+cosine",
    "D-Adapt.": "d-adaptation",
    "D-Adapt.+cos / cos": "d-adaptation+cosine",
    "DoG": "dog",
    "Sched.-Free": "schedule-free",
    "Sched.-Free, tuned": "schedule-free tuned",
    "GreedyLR": "greedy",
    "OSGM": "osgm",
    "GALA": "gala",
}
"""The tuners of others: their columns, and their names as methods."""

VANISHING = "digits-"
"""How the names of tasks begin whose training loss goes to 0."""


@dataclass(frozen=True)
class Row:
    """One task with one optimizer.

    Args:
        constant: The best constant rate and its loss.
        cosine: The same under cosine annealing.
        ratios: By column.
    """

    task: str
    optimizer: str
    constant: tuple[float, float]
    cosine: tuple[float, float]
    ratios: dict[str, float]


def rows(results: Results, measure: Measure, rule: str) -> list[Row]:
    """A row for every task and optimizer that has runs."""
    losses = Losses(results, measure)
    settings = dict.fromkeys((run.task, run.optimizer) for run in results)
    return [
        make_row(losses, task, optimizer, rule, losses.best(task, optimizer, "constant"))
        for task, optimizer in settings
    ]


def make_row(losses: Losses, task: str, optimizer: str, rule: str, constant: tuple[float, float]) -> Row:
    """The losses over the one of ``constant`` or, where the column says so, over the best of cosine annealing."""

    def only(method: str) -> float:
        return losses.best(task, optimizer, method)[1]

    def paper(name: str) -> list[float]:
        return [losses.at(task, optimizer, name, rate) for rate in PAPER_RATES]

    cosine = losses.best(task, optimizer, "cosine")
    own = losses.at(task, optimizer, rule, RULE_RATE)
    middle = PAPER_RATES.index(MIDDLE_RATE)
    better = min(map(paper, PAPER_RULES), key=lambda found: math.inf if math.isnan(found[middle]) else found[middle])
    ratios = {
        f"{rule} / const": ratio(own, constant[1]),
        f"{rule} / cos": ratio(own, cosine[1]),
        f"{rule}+cooldown / const": ratio(only(f"{rule}+cooldown"), constant[1]),
        f"{rule}+cooldown / cos": ratio(only(f"{rule}+cooldown"), cosine[1]),
        f"{rule}+cos / cos": ratio(only(f"{rule}+cosine"), cosine[1]),
        "spread const": losses.spread(task, optimizer, "constant", constant[0]),
        f"spread {rule}": losses.spread(task, optimizer, rule, RULE_RATE),
        "paper": ratio(better[middle], constant[1]),
        "paper, worst": ratio(max((loss for loss in better if not math.isnan(loss)), default=math.nan), constant[1]),
        **{
            column: ratio(only(method), (cosine if column.endswith("/ cos") else constant)[1])
            for column, method in OTHERS.items()
        },
    }
    return Row(task, optimizer, constant, cosine, ratios)


def closed_form_row(results: Results, rule: str) -> Row | None:
    """The quadratic's row for plain SGD with the rate that is known to be best in the place of the grid's."""
    runs = [run for run in results if (run.task, run.optimizer) == ("quadratic", "SGD")]
    if not runs:
        return None
    best = best_constant(sorted({run.seed for run in runs}), runs[0].steps)
    row = make_row(Losses(results, "train_loss"), "quadratic", "SGD", rule, best)
    return replace(row, optimizer="SGD, closed form")


def ratio(loss: float, reference: float) -> float:
    """Not a number over a loss of 0, which nothing can be compared with."""
    return loss / reference if reference else math.nan


def mean_ratio(ratios: Sequence[float]) -> tuple[float, int]:
    """Geometric mean of the ratios, and how many were left out because one of the two losses is infinite."""
    kept = [ratio for ratio in ratios if 0 < ratio < math.inf]
    left_out = [ratio for ratio in ratios if ratio in (0, math.inf)]
    return geometric_mean(kept) if kept else math.nan, len(left_out)


def duels(results: Results, rule: str, measure: Measure = "train_loss") -> dict[str, tuple[float, int]]:
    """The rule against other tuners of Adam, one against one: geometric means over the tasks."""
    losses = Losses(results, measure)
    tasks = dict.fromkeys(run.task for run in results)
    return {
        f"{mine} / {its}": mean_ratio(
            [ratio(losses.at(task, "Adam", mine, RULE_RATE), losses.best(task, "Adam", its)[1]) for task in tasks]
        )
        for mine in (rule, f"{rule}+cooldown", f"{rule}+cosine")
        for its in OTHERS.values()
    }


def sensitive(results: Results, rule: str) -> tuple[int, int]:
    """How many of the rule's runs from another configured rate have another loss, and of how many."""
    pairs = [
        (outcome.train_loss, results[usual].train_loss)
        for run, outcome in results.items()
        if run.method == rule and run.rate != RULE_RATE and (usual := replace(run, rate=RULE_RATE)) in results
    ]
    return sum(loss != usual for loss, usual in pairs), len(pairs)


def report(results: Results, rule: str) -> str:
    """All that there is to read, in Markdown."""
    runs = Counter(run.method for run in results)
    diverged = Counter(run.method for run, outcome in results.items() if math.isinf(outcome.train_loss))
    different, pairs = sensitive(results, rule)
    facts = [
        f"{name}, base Adam, {MEASURES[measure]}: {_mean(mean)}"
        for measure in MEASURES
        for name, mean in duels(results, rule, measure).items()
        if not math.isnan(mean[0])
    ]
    if pairs:
        facts.append(f"{rule} configured with another rate than {RULE_RATE:g}: {different} of {pairs} losses differ")
    facts.append("diverged: " + (", ".join(f"{name} {n} of {runs[name]}" for name, n in diverged.items()) or "none"))
    closed_form = closed_form_row(results, rule)
    return "\n\n".join(
        [
            "## Training loss: mean over the last eighth of the steps",
            _table(rows(results, "train_loss", rule), [closed_form] if closed_form else []),
            "\n".join(f"- {fact}" for fact in facts),
            "## Validation loss: after the last step",
            _table(rows(results, "val_loss", rule), []),
        ]
    )


def _table(rows: Sequence[Row], extra: Sequence[Row]) -> str:
    """Rows and the geometric means of their ratios; ``extra`` ones do not count."""
    rows = [row for row in rows if not math.isnan(row.constant[1])]
    if not rows:
        return "(no runs at constant rates)"
    columns = [column for column in rows[0].ratios if not all(math.isnan(row.ratios[column]) for row in rows)]
    head = ["task", "optimizer", "constant (rate)", "cosine (rate)", *columns]
    body = [
        [
            row.task,
            row.optimizer,
            _loss(*row.constant),
            _loss(*row.cosine),
            *(_number(row.ratios[column]) for column in columns),
        ]
        for row in [*rows, *extra]
    ]
    for name, counted in (("geometric mean", rows), (f"… without {VANISHING}…", _without_vanishing(rows))):
        means = [mean_ratio([row.ratios[column] for row in counted]) for column in columns]
        body.append([name, "", "", "", *map(_mean, means)])
    widths = [max(map(len, cells)) for cells in zip(head, *body, strict=True)]
    lines = [head, ["-" * width for width in widths], *body]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def _without_vanishing(rows: Sequence[Row]) -> list[Row]:
    """Those of tasks whose loss does not go to 0, where ratios are large either way."""
    return [row for row in rows if not row.task.startswith(VANISHING)]


def _number(value: float) -> str:
    return "–" if math.isnan(value) else "∞" if math.isinf(value) else f"{value:.3g}"


def _loss(rate: float, loss: float) -> str:
    return "–" if math.isnan(loss) else f"{_number(loss)} ({_number(rate)})"


def _mean(mean: tuple[float, int]) -> str:
    value, left_out = mean
    return _number(value) + (f" ({left_out} diverged left out)" if left_out else "")
