"""How well the rule "auto" sets the learning rate, against grids of rates and against other tuners.

    pip install -e ".[bench]"
    python tests/benchmarks/learning_quality.py            # about four hours on two cores
    python tests/benchmarks/learning_quality.py --quick    # about two

It trains networks on 31 tasks with up to three optimizers, three seeds each: at a grid of constant rates a factor of
√10 apart (extended until the best is not at its edge; the first seed finds the best rate, the others try it and its
neighbours), at the same grid under 5 % of warm-up and cosine annealing or the callback's cooldown, with the rules of
lightning_hd, with Prodigy, Prodigy + Schedule-Free, Mechanic, D-Adaptation, DoG, Schedule-Free and GreedyLR as their
authors recommend, and with OSGM (``osgm.py``: heavy ball in the place of Nesterov's momentum) and GALA (``gala.py``),
which take two gradients per step. A finished run is kept in ``DIR/runs.csv``; started again, only those that are
missing are made.

The tables (``DIR/table.md``) have a row for each task and optimizer. The first holds the training loss, averaged over
the last eighth of the steps, the second the validation loss after the last step. All are medians over the seeds.

============================ ===========================================================================================
constant (rate)              loss at the best rate of the grid, and that rate
cosine (rate)                the same under warm-up and cosine annealing
auto / const, auto / cos     loss of the rule over the best constant rate's, over the best cosine annealing's
auto+cooldown / const, / cos  loss of the rule with its cooldown at the end, which knows the length of the run
auto+cos / cos               loss of the rule under cosine annealing over that of the best cosine annealing
paper, paper, worst          the better of the paper's two rules over constant: from 1e-3, from its worst of three rates
Prodigy, Mechanic, ...       loss of that tuner over the best constant rate's; with "+cos / cos", both under annealing
============================ ===========================================================================================

Below 1 is better than the grid. "spread" is the highest over the lowest loss of the seeds. A run whose loss is not
finite has diverged: ∞. The noisy quadratic's best constant rate for SGD is known in closed form; the row that uses it
does not count in the geometric means.

The figure (``DIR/learning_quality.png``) shows the training loss against the configured rate.
"""

import argparse
import functools
import itertools
import multiprocessing
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for those who run the file by its path

from tests.benchmarks import fashion, figure, table, tasks, training, tuners
from tests.benchmarks.plan import OTHER_RATES, Settings, plan
from tests.benchmarks.results import Outcome, Results, Run, append, load, select

QUICK_TASKS = ("digits-16", "text", "quadratic")
QUICK_METHODS = ("constant", "cosine", OTHER_RATES, "multiplicative", "prodigy", "mechanic")
"""Beside the rule under test."""


def complete(
    settings: Settings, path: Path, pool: Executor, jobs: int, work: Callable[[Run], Outcome]
) -> tuple[Results, list[Run]]:
    """Make all runs that are missing; returns what is there then, and the runs that an error has ended."""
    results, failed = load(path), list[Run]()
    while todo := [run for run in plan(settings, results) if run not in results and run not in failed]:
        random.Random(0).shuffle(todo)  # quick and slow runs mixed, for an honest forecast of the time left
        todo.sort(key=lambda run: run.seed)
        for run, future in tqdm(submit(pool, jobs, work, todo), total=len(todo), unit="run", smoothing=0.0):
            try:
                results[run] = future.result()
            except BrokenExecutor:
                raise
            except Exception as error:
                tqdm.write(f"failed: {run}: {error!r}", file=sys.stderr)
                failed.append(run)
            else:
                append(path, run, results[run])
    return results, failed


def submit(
    pool: Executor, jobs: int, work: Callable[[Run], Outcome], todo: Iterable[Run]
) -> Iterator[tuple[Run, Future[Outcome]]]:
    """Runs as they finish. No more than ``jobs`` are handed out at a time, so that an interruption need not wait."""
    remaining, running = iter(todo), dict[Future[Outcome], Run]()
    while True:
        running.update({pool.submit(work, run): run for run in itertools.islice(remaining, jobs - len(running))})
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            yield running.pop(future), future


def execute(run: Run, rule: str, data: Path) -> Outcome:
    """Make one run, in a worker."""
    make = functools.partial(tasks.build, run.task, run.seed, data)
    method = tuners.methods(rule, make)[run.method]
    return training.train(make(), method, run.optimizer, run.rate, tasks.TASKS[run.task].decay, run.steps)


def start_pool(jobs: int) -> ProcessPoolExecutor:
    """Workers of one thread each, which share nothing."""
    os.environ["OMP_NUM_THREADS"] = "1"  # they inherit it
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), start_worker)


def start_worker() -> None:
    """One thread each; an interruption is the parent's to handle, and a parent that was killed leaves no worker."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def write_report(settings: Settings, results: Results, out: Path) -> None:
    """Print the tables, and write them and the figure."""
    planned = plan(settings, results)
    results = select(results, planned)
    if not results:
        print(f"no runs in {out}")
        return
    text = table.report(results, settings.rule)
    if len(results) < len(planned):
        text = f"{len(results)} of {len(planned)} runs.\n\n{text}"
    (out / "table.md").write_text(text + "\n")
    figure.draw(results, settings.rule, out / "learning_quality.png")
    print(f"\n{text}\n\nwritten to {out}: runs.csv, table.md, learning_quality.png")


def arguments(argv: Sequence[str] | None) -> tuple[Settings, argparse.Namespace]:
    """The command line; what cannot be run here is left out with a message."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--quick", action="store_true", help="one seed, three tasks, half the steps, fewer rates")
    parser.add_argument("--seeds", type=int, help="number of seeds (default: 3; 1 with --quick)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="default: runs/learning_quality, with --quick ..._quick"
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), metavar="N", help="processes (default: %(default)s)"
    )
    parser.add_argument("--tasks", metavar="A,B", help=f"of {', '.join(tasks.TASKS)}")
    parser.add_argument("--optimizers", metavar="A,B", help=f"of {', '.join(tuners.BASES)}")
    listed = ", ".join((*tuners.methods(tuners.RULE), OTHER_RATES))
    parser.add_argument("--methods", metavar="A,B", help=f"of {listed}")
    parser.add_argument("--rule", default=tuners.RULE, help="the rule under test (default: %(default)s)")
    parser.add_argument(
        "--data", type=Path, default=fashion.FASHION, metavar="DIR", help="of Fashion-MNIST's IDX files"
    )
    parser.add_argument("--report-only", action="store_true", help="make no runs")
    args = parser.parse_args(argv)

    try:
        tuners.check_rule(args.rule)
    except ValueError as error:
        parser.error(f"--rule: {error}")

    def choose(option: str, known: Sequence[str], default: Sequence[str]) -> list[str]:
        value: str | None = getattr(args, option)
        chosen = value.split(",") if value else default
        for name in chosen:
            if name not in known:
                parser.error(f"--{option}: {name!r} is none of {', '.join(known)}")
        return list(chosen)

    known = tuners.methods(args.rule)
    every_method = [*known, OTHER_RATES]
    quick_methods = [name for name in every_method if name in (*QUICK_METHODS, args.rule, f"{args.rule}+cosine")]
    settings = Settings(
        tasks=[
            name
            for name in choose("tasks", list(tasks.TASKS), QUICK_TASKS if args.quick else list(tasks.TASKS))
            if _present(name, tasks.TASKS[name].missing(args.data))
        ],
        optimizers=choose("optimizers", list(tuners.BASES), list(tuners.BASES)),
        methods=[
            name
            for name in choose("methods", every_method, quick_methods if args.quick else every_method)
            if name not in known or _present(name, known[name].missing())
        ],
        seeds=args.seeds or (1 if args.quick else 3),
        quick=args.quick,
        rule=args.rule,
    )
    args.out = args.out or Path("runs") / ("learning_quality_quick" if args.quick else "learning_quality")
    return settings, args


def _present(name: str, missing: Sequence[str]) -> bool:
    if missing:
        print(f"left out: {name}, for want of {', '.join(missing)}", file=sys.stderr)
    return not missing


def main(argv: Sequence[str] | None = None) -> int:
    """Make the runs and the report; 130 where it was interrupted."""
    settings, args = arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "runs.csv"
    if args.report_only:
        write_report(settings, load(path), args.out)
        return 0
    work = functools.partial(execute, rule=args.rule, data=args.data)
    try:
        with start_pool(args.jobs) as pool:
            results, failed = complete(settings, path, pool, args.jobs, work)
    except KeyboardInterrupt:
        print(
            f"\ninterrupted: {path} holds the finished runs, and the same command goes on from there", file=sys.stderr
        )
        return 130
    write_report(settings, results, args.out)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
