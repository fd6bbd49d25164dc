"""How good the constant rate is that a tuned run suggests, beside what Lightning's rate finder suggests.

    pip install -e ".[bench]"
    python tests/benchmarks/suggestion.py            # about 15 minutes on two cores

For each task and optimizer of ``learning_quality.py``: the training loss (mean over the last eighth of the steps) at
the rate of ``HypergradientLR.suggestion`` and at that of ``Tuner.lr_find``, over the loss at the best constant rate of
a grid a factor of √10 apart, and each rate over that best one. The suggestion costs a run of full length, which is
trained too. The finder costs 100 steps, at its defaults. Finished runs are kept in ``DIR/runs.csv``; started again,
only those that are missing are made.
"""

import argparse
import functools
import logging
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.tuner.tuning import Tuner
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for those who run the file by its path

from lightning_hd import HypergradientLR
from tests.benchmarks import fashion, tasks, training, tuners
from tests.benchmarks.learning_quality import complete, execute, start_pool, submit
from tests.benchmarks.plan import Settings
from tests.benchmarks.problems import Problem
from tests.benchmarks.results import Losses, Outcome, Results, Run, append
from tests.benchmarks.table import VANISHING, mean_ratio, ratio

FINDER, SUGGESTION = "lr-find", "suggestion"
_FINDER_STEPS = 100


class Module(LightningModule):
    """A task as the finder wants it."""

    def __init__(self, problem: Problem, base: str, decay: float) -> None:
        super().__init__()
        self.problem, self.base, self.decay = problem, base, decay
        self.network = problem.network
        self.lr = tuners.RULE_RATE

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.problem.train_loss()

    def on_train_batch_end(self, *_: Any) -> None:
        self.problem.project()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return tuners.plain(self.network, self.base, self.lr, self.decay)


def find(problem: Problem, base: str, decay: float) -> float:
    """What the finder suggests; not a number where it suggests nothing."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", max_steps=2 * _FINDER_STEPS, enable_model_summary=False, **quiet)
    loader: DataLoader[Any] = DataLoader(range(2 * _FINDER_STEPS))  # type: ignore[arg-type]
    found = Tuner(trainer).lr_find(Module(problem, base, decay), loader, num_training=_FINDER_STEPS, update_attr=False)
    suggested = found.suggestion() if found is not None else None
    return math.nan if suggested is None else float(suggested)


def suggest(problem: Problem, base: str, decay: float, steps: int) -> float:
    """What a run with the default rule suggests."""
    optimizer = tuners.plain(problem.network, base, tuners.RULE_RATE, decay)
    hd = HypergradientLR(optimizer, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = problem.train_loss()
        loss.backward()  # type: ignore[no-untyped-call]
        hd.observe(loss)
        optimizer.step()
        problem.project()
    suggested = hd.suggestion()
    assert isinstance(suggested, float)
    return suggested


def work(run: Run, data: Path) -> Outcome:
    """Find a rate, then train at it from the beginning."""
    decay = tasks.TASKS[run.task].decay
    problem = tasks.build(run.task, run.seed, data)
    finds = run.method == FINDER
    rate = find(problem, run.optimizer, decay) if finds else suggest(problem, run.optimizer, decay, run.steps)
    if math.isnan(rate):
        return Outcome(math.inf, math.nan, rate, 0.0)
    method = tuners.methods(tuners.RULE)["constant"]
    return training.train(tasks.build(run.task, run.seed, data), method, run.optimizer, rate, decay, run.steps)


def table(results: Results) -> str:
    """A row for each task and optimizer, and geometric means."""
    losses = Losses(results, "train_loss")
    rates = Losses(results, "final_lr")
    lines = [["task", "optimizer", "suggestion", "its rate", "lr_find", "its rate"]]
    ratios: dict[tuple[str, str], dict[str, float]] = {}
    for task, optimizer in dict.fromkeys((run.task, run.optimizer) for run in sorted(results)):
        best_rate, best = losses.best(task, optimizer, "constant")
        found = {method: ratio(losses.best(task, optimizer, method)[1], best) for method in (SUGGESTION, FINDER)}
        ratios[task, optimizer] = found
        cells = [
            f"{x:.3g}" for m, value in found.items() for x in (value, rates.best(task, optimizer, m)[1] / best_rate)
        ]
        lines.append([tasks.TASKS[task].title, optimizer, *cells])
    for name, kept in (
        ("geometric mean", ratios),
        (f"… without {VANISHING}…", {key: value for key, value in ratios.items() if not key[0].startswith(VANISHING)}),
    ):
        means = [mean_ratio([found[method] for found in kept.values()]) for method in (SUGGESTION, FINDER)]
        cells = [f"{value:.3g}" + (f" ({failed} failed)" if failed else "") for value, failed in means]
        lines.append([name, "", cells[0], "", cells[1], ""])
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Make the runs that are missing, and the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds (default: %(default)s)")
    parser.add_argument("--tasks", default=",".join(tasks.TASKS), metavar="A,B", help="default: %(default)s")
    parser.add_argument(
        "--out", type=Path, default=Path("runs") / "suggestion", metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="default: %(default)s")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "runs.csv"
    chosen = [name for name in args.tasks.split(",") if not tasks.TASKS[name].missing(fashion.FASHION)]
    settings = Settings(chosen, list(tuners.BASES), ["constant"], args.seeds)
    with start_pool(args.jobs) as pool:
        constant = functools.partial(execute, rule=settings.rule, data=fashion.FASHION)
        results, failed = complete(settings, path, pool, args.jobs, constant)
        todo = [
            run
            for task in chosen
            for optimizer in tasks.TASKS[task].optimizers
            for method in (SUGGESTION, FINDER)
            for seed in range(args.seeds)
            if (run := Run(task, optimizer, method, tuners.RULE_RATE, seed, settings.steps(task))) not in results
        ]
        searching = functools.partial(work, data=fashion.FASHION)
        for run, future in tqdm(submit(pool, args.jobs, searching, todo), total=len(todo), unit="run", smoothing=0.0):
            results[run] = future.result()
            append(path, run, results[run])
    text = table(results)
    (args.out / "suggestion.md").write_text(text + "\n")
    print(f"\n{text}\n\nwritten to {args.out}: runs.csv, suggestion.md")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
