"""How good the rule "auto" is in short and in long runs.

    pip install -e ".[bench]"
    python tests/benchmarks/length.py            # about 90 minutes on two cores; 25 without the longest

For each length of the run, from 300 to 30,000 steps, the training loss (mean over the last eighth of the steps) of the
rule over that of the best constant rate of a grid for that length, a factor of √10 apart. Below 1 is better than the
grid. Finished runs are kept in ``DIR/runs.csv``; started again, only those that are missing are made. The curves are
drawn into ``DIR/length.png`` and written to ``DIR/length.md``.
"""

import argparse
import functools
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for those who run the file by its path

from tests.benchmarks import fashion, tasks, tuners
from tests.benchmarks.figure import PLAIN
from tests.benchmarks.learning_quality import complete, execute, start_pool
from tests.benchmarks.plan import Settings, plan
from tests.benchmarks.results import Losses, Results, select

LENGTHS = (300, 1_000, 3_000, 10_000, 30_000)
TASKS = ("digits-16", "tanh", "quadratic")
Curves = dict[tuple[str, str], dict[int, float]]


def curves(results: Results, settings: Settings) -> Curves:
    """For each task and optimizer, length to ratio."""
    found: Curves = {}
    for length in sorted({run.steps for run in results}):
        losses = Losses(select(results, plan(replace(settings, length=length), results)), "train_loss")
        for task in settings.tasks:
            for optimizer in settings.optimizers:
                _, best = losses.best(task, optimizer, "constant")
                own = losses.at(task, optimizer, settings.rule, tuners.RULE_RATE)
                if not math.isnan(own / best):
                    found.setdefault((task, optimizer), {})[length] = own / best
    return found


def draw(found: Curves, path: Path) -> None:
    """A line for each task and optimizer."""
    colors = dict(zip(tuners.BASES, ("#000000", "#56B4E9", "#D55E00"), strict=True))
    markers = dict(zip(TASKS, "osD", strict=True))
    with mpl.rc_context(PLAIN):
        figure = Figure(figsize=(6.5, 3.4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for (task, optimizer), ratios in found.items():
            label = f"{tasks.TASKS[task].title}, {optimizer}"
            style = {"color": colors[optimizer], "marker": markers.get(task, "o")}
            axes.loglog(list(ratios), list(ratios.values()), label=label, **style)
        axes.axhline(1, color="#999999", linewidth=0.8)
        axes.set(xlabel="steps of the run", ylabel="training loss over that of the\nbest constant rate for that length")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        figure.savefig(path, dpi=160)


def table(found: Curves) -> str:
    """The same as text."""
    lengths = sorted({length for ratios in found.values() for length in ratios})
    lines = ["| task | optimizer | " + " | ".join(map(str, lengths)) + " |", "|---" * (2 + len(lengths)) + "|"]
    for (task, optimizer), ratios in found.items():
        cells = [f"{ratios[length]:.3g}" if length in ratios else "" for length in lengths]
        lines.append(f"| {task} | {optimizer} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Make the runs that are missing, shortest first, and the report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds (default: %(default)s)")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)), metavar="A,B", help="default: %(default)s")
    parser.add_argument("--tasks", default=",".join(TASKS), metavar="A,B", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("runs") / "length", metavar="DIR", help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="default: %(default)s")
    args = parser.parse_args(argv)
    settings = Settings(args.tasks.split(","), list(tuners.BASES), ["constant", tuners.RULE], args.seeds)
    args.out.mkdir(parents=True, exist_ok=True)
    work = functools.partial(execute, rule=settings.rule, data=fashion.FASHION)
    results: Results = {}
    failed = []
    try:
        with start_pool(args.jobs) as pool:
            for length in sorted(map(int, args.lengths.split(","))):
                of_length = replace(settings, length=length)
                results, errors = complete(of_length, args.out / "runs.csv", pool, args.jobs, work)
                failed += errors
    except KeyboardInterrupt:
        print(f"\ninterrupted: the same command goes on from {args.out / 'runs.csv'}", file=sys.stderr)
        return 130
    found = curves(results, settings)
    draw(found, args.out / "length.png")
    (args.out / "length.md").write_text(table(found) + "\n")
    print(f"\n{table(found)}\n\nwritten to {args.out}: runs.csv, length.md, length.png")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
