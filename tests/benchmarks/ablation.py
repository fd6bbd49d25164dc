"""What each constant of the rule "auto" is for: the benchmark without it.

    pip install -e ".[bench]"
    python tests/benchmarks/ablation.py                    # an hour on two cores
    python tests/benchmarks/ablation.py no-guard no-brake  # some variants only

Each variant changes one or two constants such that what they do is gone. It trains on all tasks of
``learning_quality.py`` but the long ones, with one seed, and knows the loss and the length, as in a Trainer. The table
shows the geometric mean of its training losses over those of the rule as it is, the digits aside, and the tasks that
change most. Finished runs are kept in ``DIR/runs.csv``.
"""

import argparse
import contextlib
import functools
import importlib
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for those who run the file by its path

from tests.benchmarks import fashion, tasks, tuners
from tests.benchmarks.learning_quality import execute, start_pool, submit
from tests.benchmarks.pages import TUNED
from tests.benchmarks.results import Outcome, Results, Run, append, load
from tests.benchmarks.table import VANISHING, mean_ratio, ratio

BASE = "as it is"
VARIANTS: dict[str, dict[str, float]] = {
    BASE: {},
    "no-reach": {"auto._REACH": 1e9},
    "no-growth": {"auto._GROWTH": 0.0},
    "norm-of-the-step": {"auto._NORMS": 1.0, "auto._NORMS_GROWTH": 0.0},
    "no-smoothing": {"auto._SMOOTHED": 0.0},
    "no-turning": {"auto._TURNING": 10.0, "auto._TURNED": 11.0},
    "no-greedy-bound": {"auto._STRAIGHT": 10.0, "auto._SURE": 1e9},
    "no-optimism": {"auto._OPTIMISM": 0.0},
    "no-fading": {"auto.EARLY": 1e9, "bounds.EARLY": 1e9},
    "no-careful-cap": {"bounds._CAREFUL_CAP": 0.5},
    "no-moves-in-the-cap": {"bounds._LONG": 0.0},
    "no-longest-step": {"bounds._LONGEST": 1e30},
    "no-settling": {"auto._SETTLING": 0.0},
    "no-fast-rise": {"auto._FAST": 0.0},
    "no-brake": {"bounds._SPIKE": 1e9},
    "no-hold": {"bounds._LONGER": 1e9},
    "no-guard": {"guard._SIGMAS": 1e9},
    "no-retreat": {"guard._RETREAT": 1e-9},
}
"""What is set for each variant, by module and name."""


def execute_variant(run: Run, data: Path) -> Outcome:
    """One run of a variant, in a worker."""
    with contextlib.ExitStack() as stack:
        for path, value in VARIANTS[run.method].items():
            module, name = path.split(".")
            stack.enter_context(mock.patch.object(importlib.import_module(f"lightning_hd.rules.{module}"), name, value))
        return execute(Run(run.task, run.optimizer, TUNED, run.rate, run.seed, run.steps), tuners.RULE, data)


def plan(variants: Sequence[str]) -> list[Run]:
    """All runs, with the variant in the place of the method."""
    return [
        Run(name, optimizer, variant, tuners.RULE_RATE, 0, task.steps)
        for variant in variants
        for name, task in tasks.TASKS.items()
        if not name.startswith("long-")
        for optimizer in task.optimizers
    ]


def report(results: Results) -> str:
    """The table in Markdown."""
    losses = {(run.method, run.task, run.optimizer): outcome.train_loss for run, outcome in results.items()}
    lines = ["| variant | mean | tasks that change most |", "| --- | --- | --- |"]
    for variant in dict.fromkeys(run.method for run in results if run.method != BASE):
        ratios = {
            f"{tasks.TASKS[task].title}, {optimizer}": ratio(loss, losses[BASE, task, optimizer])
            for (method, task, optimizer), loss in losses.items()
            if method == variant and not task.startswith(VANISHING)
        }
        mean, diverged = mean_ratio(list(ratios.values()))
        most = sorted(ratios, key=lambda case: abs(math.log(ratios[case])), reverse=True)[:3]
        words = "; ".join(f"{case} {ratios[case]:.2f}" for case in most)
        lines.append(f"| {variant} | {mean:.3f}{f' ({diverged} diverged)' if diverged else ''} | {words} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Make the runs that are missing, and print the table."""
    parser = argparse.ArgumentParser(description="What each constant of the rule auto is for.")
    parser.add_argument("variants", nargs="*", help=f"of {', '.join(VARIANTS)} (default: all)")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), metavar="DIR")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N")
    parser.add_argument("--data", type=Path, default=fashion.FASHION, metavar="DIR", help="of Fashion-MNIST's files")
    args = parser.parse_args(argv)
    if unknown := set(args.variants) - set(VARIANTS):
        parser.error(f"{unknown.pop()!r} is none of {', '.join(VARIANTS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    path, wanted = args.out / "runs.csv", plan(list(dict.fromkeys([BASE, *(args.variants or VARIANTS)])))
    results = load(path)
    with start_pool(args.jobs) as pool:
        missing = [run for run in wanted if run not in results]
        for run, future in submit(pool, args.jobs, functools.partial(execute_variant, data=args.data), missing):
            results[run] = future.result()
            append(path, run, results[run])
    print(report({run: results[run] for run in wanted}))


if __name__ == "__main__":
    main()
