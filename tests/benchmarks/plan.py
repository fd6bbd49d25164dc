"""Which runs to make: tasks by optimizers by methods by rates by seeds, and grids as wide as they must be."""

from collections.abc import Sequence
from dataclasses import dataclass

from tests.benchmarks import tasks, tuners
from tests.benchmarks.results import Losses, Results, Run, select

OTHER_RATES = "auto-from"
"""On the command line, the rule under test from other rates than the usual one. Its runs count as the rule's own."""
LOWEST, HIGHEST = -16, 6
"""Where extending a grid ends, by the index of the rate: 1e-8 and 1e3."""


@dataclass(frozen=True)
class Settings:
    """What the command line asks for."""

    tasks: Sequence[str]
    optimizers: Sequence[str]
    methods: Sequence[str]
    seeds: int = 3
    quick: bool = False
    rule: str = tuners.RULE
    length: int | None = None  # of all runs; None: the tasks' own

    def steps(self, task: str) -> int:
        if self.length is not None:
            return self.length
        return tasks.TASKS[task].steps // (2 if self.quick else 1)


def plan(settings: Settings, results: Results) -> list[Run]:
    """All runs, finished ones included; what is finished decides how far the grids reach."""
    every_run: dict[Run, None] = {}
    for task in settings.tasks:
        for optimizer in [name for name in settings.optimizers if name in tasks.TASKS[task].optimizers]:
            for method in settings.methods:
                every_run |= dict.fromkeys(runs_of(settings, results, task, optimizer, method))
    return list(every_run)


def runs_of(settings: Settings, results: Results, task: str, optimizer: str, method: str) -> list[Run]:
    """The runs of one method on one task with one optimizer; none where it is not for that optimizer."""

    def runs(method: str, rates: Sequence[float], seeds: int = settings.seeds) -> list[Run]:
        steps = settings.steps(task)
        return [Run(task, optimizer, method, rate, seed, steps) for rate in rates for seed in range(seeds)]

    if method == OTHER_RATES:
        return runs(settings.rule, tuners.OTHER_RATES, seeds=1)
    fixed = tuners.methods(settings.rule)[method].rates
    if fixed is not None:
        return runs(method, fixed.get(optimizer, ()))

    def searched(indices: range, seeds: int) -> tuple[list[Run], int | None]:
        """A grid as wide as it must be, and the index of its best rate once all is there."""
        while True:
            rates = {tuners.grid_rate(index): index for index in indices}
            wanted = runs(method, list(rates), seeds)
            made = select(results, wanted)
            if len(made) < len(wanted):
                return wanted, None
            best, _ = Losses(made, "train_loss").best(task, optimizer, method)
            wider = extended(indices, down=rates[best] == indices[0], up=rates[best] == indices[-1])
            if wider == indices:
                return wanted, rates[best]
            indices = wider

    step = 2 if settings.quick else 1
    first, best = searched(range(*tuners.GRID[optimizer], step), seeds=1)
    if best is None or settings.seeds == 1:
        return first
    # The first seed has found where the best rate is; the others look there.
    near, _ = searched(range(max(best - step, LOWEST), best + step + 1, step), settings.seeds)
    return list(dict.fromkeys([*first, *near]))


def extended(indices: range, down: bool, up: bool) -> range:
    """The grid with one more rate, at the edge where its best is."""
    start, stop, step = indices.start, indices.stop, indices.step
    if down and indices[0] - step >= LOWEST:
        return range(start - step, stop, step)
    if up and indices[-1] + step <= HIGHEST:
        return range(start, indices[-1] + step + 1, step)
    return indices
