"""What is said when training starts and ends: one line, then a short table and what seems wrong."""

import io
import math
from collections.abc import Sequence
from statistics import fmean, linear_regression, median
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_hd.hypergradient import HypergradientLR
from lightning_hd.tracker import Tracker

_SHORT = 100
"""In fewer steps, the climb to the useful range may not come to its end."""

_PINNED = 0.5
"""A rate is held by a clamp where this part of the steps, or more, is taken at it."""

_RISING = 0.3
"""The mean cosine of the last steps above which the rate is still too small."""

_ONE_SIGN = 0.95
"""Cosines of one sign in this part of the steps say that the rate never came near the useful range."""

_VARIED = 4.0
"""A schedule by whose range, highest over lowest, it can be seen whether the scale undoes it."""

_UNDONE = 0.7
"""By which power of the schedule the scale falls where it rises, and the other way round, if it undoes it."""

_UNSEEN = 0.05
"""A GradScaler skips a few steps; more than this part of them is worth a word."""

_BRAKED = 0.1
"""Brakes come in series where there are more of them than this part of the steps."""

_HEAD = ("optimizer", "configured", "first lr", "median", "highest", "last", "brakes", "skipped", "seconds", "share")


def say_what_is_missing(trainer: Trainer, engines: Sequence[HypergradientLR], restored: dict[str, Any] | None) -> None:
    """Say so where there is no optimizer, no logger, or a checkpoint without a state of the callback."""
    if not engines:
        rank_zero_warn("HypergradientDescent: the Trainer has no optimizer, so there is no learning rate to tune.")
        return
    if trainer.ckpt_path and trainer.global_step and restored is None:
        rank_zero_warn(
            "HypergradientDescent: the checkpoint was written without it, so tuning the learning rate starts from "
            "the beginning."
        )
    if not trainer.loggers:
        rank_zero_info(
            "HypergradientDescent: the Trainer has no logger, so the learning rates are tuned but not logged; after "
            "training they are in the callback's `lrs`."
        )


def check_tuned(trackers: Sequence[Tracker]) -> None:
    """Warn of optimizers of which no step was tuned."""
    for tracker in trackers:
        if not (tracker.engine.step_count or tracker.engine.paused):
            rank_zero_warn(
                f"HypergradientDescent: no step of {tracker.name} was tuned: its `step` was not called, or replaced, "
                "or there was no gradient. The parameters have moved, if at all, at the configured learning rate."
            )


def announce(trackers: Sequence[Tracker], rule: str) -> None:
    """Say what is tuned, by which rule, and how much of each model is looked at: after the first steps."""
    parts = []
    for tracker in trackers:
        seen, count = tracker.engine.probe
        parts.append(
            f"{tracker.name} (looks at {f'{seen:,} of {count:,}' if seen < count else f'all {count:,}'} numbers)"
        )
    rank_zero_info(f"HypergradientDescent tunes {', '.join(parts)} with the rule {rule}.")


def summarize(trackers: Sequence[Tracker], seconds: float) -> None:
    """Show the table and the remarks, on the first process.

    Args:
        trackers: Those of the optimizers.
        seconds: How long training took.
    """
    body = rows(trackers, seconds)
    if body:
        rank_zero_info("\n".join([_table(body), *remarks(trackers)]))


def rows(trackers: Sequence[Tracker], seconds: float) -> list[tuple[str, ...]]:
    """For each parameter group its rates, how often its rule braked, which steps were not finite, and what it took."""
    found = []
    for tracker in trackers:
        engine = tracker.engine
        for i, (name, lrs) in enumerate(tracker.history()):
            if lrs:
                rates = (tracker.configured(i), lrs[0], median(lrs), max(lrs), lrs[-1])
                counts = (engine.brakes[i if engine.scope == "group" else 0], engine.nonfinite_steps)
                share = f"{engine.seconds / seconds:.1%}" if seconds else ""
                numbers = [f"{lr:.2g}" for lr in rates] + [f"{count}" for count in counts]
                found.append((name, *numbers, f"{engine.seconds:.1f}", share))
    return found


def remarks(trackers: Sequence[Tracker]) -> list[str]:
    """A sentence for each thing that seems wrong."""
    found = []
    for tracker in trackers:
        engine, history = tracker.engine, tracker.history()
        count = len(history[0][1]) if history else 0
        if 0 < count < _SHORT:
            found.append(f"{tracker.name}: {count} steps may be too few for the rate to reach its range.")
        if not count >= _SHORT:
            continue
        for name, lrs in history:
            for argument, bound in zip(("min_lr", "max_lr"), engine.limits, strict=True):
                if bound and lrs.count(bound) >= _PINNED * len(lrs):
                    found.append(f"{name}: the rate was held by {argument}={bound:g} in most steps.")
        for name, scales, cosines, schedule in tracker.scopes():
            positive = sum(cosine > 0 for cosine in cosines) / (len(cosines) or math.nan)
            if positive > _ONE_SIGN or positive < 1 - _ONE_SIGN:
                sign, size = ("positive", "small") if positive > _ONE_SIGN else ("negative", "large")
                part = max(positive, 1 - positive)
                found.append(
                    f"{name}: the cosine was {sign} in {part:.0%} of the steps, so the rate was too {size} throughout."
                )
            elif cosines and fmean(cosines[-_SHORT:]) > _RISING:
                found.append(f"{name}: the rate was still too small at the end, so the run is short for it.")
            if _fights(scales, schedule):
                found.append(
                    f"{name}: the learned scale undid most of what the scheduler did. Leave the scheduler out, or keep "
                    "the scale after some steps with stop_after=."
                )
        if sum(engine.brakes) > _BRAKED * count:
            found.append(f"{tracker.name}: the rule braked {sum(engine.brakes)} times; is the loss very noisy?")
        if tracker.untuned > _UNSEEN * count:
            found.append(f"{tracker.name}: {tracker.untuned} steps of the optimizer were not tuned.")
        if engine.nonfinite_steps:
            found.append(f"{tracker.name}: in {engine.nonfinite_steps} steps, numbers were not finite.")
    return found


def _fights(scales: Sequence[float], schedule: Sequence[float]) -> bool:
    """Whether, in the second half, the scale has undone most of what the schedule did."""
    pairs = [(math.log(a), math.log(b)) for a, b in zip(scales, schedule, strict=False) if a > 0 < b]
    ours, theirs = (list(numbers)[len(pairs) // 2 :] for numbers in zip(*pairs, strict=True)) if pairs else ([], [])
    if not theirs or max(theirs) - min(theirs) < math.log(_VARIED):
        return False
    return linear_regression(theirs, ours).slope < -_UNDONE


def _table(body: Sequence[tuple[str, ...]]) -> str:
    """With ``rich``, where it is installed."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError:
        return "\n".join("  ".join(cell.rjust(10) for cell in line) for line in (_HEAD, *body))
    table = Table(title="Learning rates, by HypergradientDescent")
    for i, name in enumerate(_HEAD):
        table.add_column(name, justify="right" if i else "left")
    for line in body:
        table.add_row(*line)
    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    written: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n" + written.rstrip()
