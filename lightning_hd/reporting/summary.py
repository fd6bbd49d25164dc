"""Reports: one line when training starts, a short table and remarks on what seems wrong when it ends."""

import io
import math
from collections.abc import Sequence
from statistics import fmean, linear_regression, median
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_hd.engine.tuner import HypergradientLR
from lightning_hd.reporting.recorder import Tracker

_SHORT = 100
"""In fewer steps, the climb to the useful range may not end."""

_PINNED = 0.5
"""A clamp holds the rate if at least this part of the steps is taken at it."""

_RISING = 0.3
"""If the mean cosine of the last steps is above this, the rate is still too small."""

_ONE_SIGN = 0.95
"""If more than this part of the cosines has one sign, the rate never came near the useful range."""

_VARIED = 4.0
"""If the highest scheduled rate is this many times the lowest, it shows whether the scale undoes the schedule."""

_UNDONE = 0.7
"""The scale undoes a schedule if it follows a power of the schedule whose exponent is below minus this number."""

_UNSEEN = 0.05
"""A GradScaler skips a few steps. A larger part of them than this is reported."""

_BACKED_OFF = 0.1
"""If the rule backs off in more than this part of the steps, back-offs come in series."""

_HEAD = ("optimizer", "configured", "first lr", "median", "highest", "last", "backoffs", "skipped", "seconds", "share")


def say_what_is_missing(trainer: Trainer, engines: Sequence[HypergradientLR], restored: dict[str, Any] | None) -> None:
    """Report if there is no optimizer, no logger, or no state of the callback in the checkpoint."""
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
            "HypergradientDescent: the Trainer has no logger, so the learning rates are tuned but not logged. After "
            "training they are in the callback's `lrs`."
        )


def check_tuned(trackers: Sequence[Tracker]) -> None:
    """Warn of optimizers without a tuned step."""
    for tracker in trackers:
        if not (tracker.engine.step_count or tracker.engine.paused):
            rank_zero_warn(
                f"HypergradientDescent: no step of {tracker.name} was tuned. Its `step` was replaced or not called, or "
                "there was no gradient. If the parameters have moved, it was at the configured learning rate."
            )


def announce(trackers: Sequence[Tracker], rule: str, max_lr: float | None) -> None:
    """Report what is tuned, by which rule, and how much of each model is looked at. Call it after a first step."""
    parts = []
    for tracker in trackers:
        seen, count = tracker.engine.probe
        parts.append(
            f"{tracker.name} (looks at {f'{seen:,} of {count:,}' if seen < count else f'all {count:,}'} numbers)"
        )
    rank_zero_info(f"HypergradientDescent tunes {', '.join(parts)} with the rule {rule}.")
    if len(trackers) > 1 and max_lr is None and rule.strip("'").lower().startswith("auto"):
        rank_zero_info(
            "HypergradientDescent: if these optimizers train against each other, as in a GAN, neither gradients nor "
            "losses show that a rate is too high. Then set max_lr= to a rate that is known to work, such as 3e-3 for "
            "Adam."
        )


def summarize(trackers: Sequence[Tracker], seconds: float) -> None:
    """Show the table and the remarks, on the first process.

    Args:
        trackers: The trackers of the optimizers.
        seconds: The time that training took.
    """
    body = rows(trackers, seconds)
    if body:
        rank_zero_info("\n".join([_table(body), *remarks(trackers)]))


def rows(trackers: Sequence[Tracker], seconds: float) -> list[tuple[str, ...]]:
    """For each parameter group its rates, the numbers of back-offs and of steps that were not finite, and the time."""
    found = []
    for tracker in trackers:
        engine = tracker.engine
        for i, (name, lrs) in enumerate(tracker.history()):
            if lrs:
                rates = (tracker.configured(i), lrs[0], median(lrs), max(lrs), lrs[-1])
                counts = (engine.backoffs[tracker.scope_of(i)], engine.nonfinite_steps)
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
        held = False
        for name, lrs in history:
            for argument, bound in zip(("min_lr", "max_lr"), engine.limits, strict=True):
                if bound and lrs.count(bound) >= _PINNED * len(lrs):
                    held = True
                    found.append(f"{name}: the rate was held by {argument}={bound:g} in most steps.")
        for name, scales, cosines, schedule in tracker.scopes():
            many = len(cosines) >= _SHORT
            positive = sum(cosine > 0 for cosine in cosines) / (len(cosines) or math.nan)
            if many and not 1 - _ONE_SIGN <= positive <= _ONE_SIGN:
                sign, size = ("positive", "small") if positive > _ONE_SIGN else ("negative", "large")
                part = max(positive, 1 - positive)
                found.append(
                    f"{name}: the cosine was {sign} in {part:.0%} of the steps, so the rate was always too {size}."
                )
            elif many and fmean(cosines[-_SHORT:]) > _RISING:
                found.append(f"{name}: the rate was still too small at the end, so the run was too short.")
            if not held and _fights(scales, schedule):
                found.append(
                    f"{name}: the learned scale undid most of what the scheduler did. Leave the scheduler out, or pass "
                    "stop_after= to keep the scale after some steps."
                )
        if sum(engine.backoffs) > _BACKED_OFF * count:
            found.append(f"{tracker.name}: the rule braked {sum(engine.backoffs)} times. Is the loss very noisy?")
        if tracker.untuned > _UNSEEN * count:
            found.append(f"{tracker.name}: {tracker.untuned} steps of the optimizer were not tuned.")
        if engine.nonfinite_steps:
            found.append(f"{tracker.name}: numbers were not finite in {engine.nonfinite_steps} steps.")
    return found


def _fights(scales: Sequence[float], schedule: Sequence[float]) -> bool:
    """Whether the scale has undone most of what the schedule did in the second half of the run."""
    pairs = [(math.log(a), math.log(b)) for a, b in zip(scales, schedule, strict=False) if a > 0 < b]
    ours, theirs = (list(numbers)[len(pairs) // 2 :] for numbers in zip(*pairs, strict=True)) if pairs else ([], [])
    if not theirs or max(theirs) - min(theirs) < math.log(_VARIED):
        return False
    return linear_regression(theirs, ours).slope < -_UNDONE


def _table(body: Sequence[tuple[str, ...]]) -> str:
    """The table as text, drawn by ``rich`` if that is installed."""
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
