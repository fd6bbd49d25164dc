"""Reports: one line when training starts, a short table and remarks on what seems wrong when it ends."""

import math
from collections.abc import Iterator, Sequence
from statistics import fmean, linear_regression, median
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_hd.reporting.recorder import Course, Recorder
from lightning_hd.rules import Auto, Rule

_SHORT = 100
"""In fewer steps, a tuned rate is better, because much of the run is the climb to the useful range."""

_SAMPLE = 100
"""Fewer steps or cosines show nothing."""

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

_HEAD = ("group", "configured", "first", "median", "highest", "last", "backoffs", "not finite", "tuning s", "tuning %")


def say_what_is_missing(trainer: Trainer, recorders: Sequence[Recorder], restored: dict[str, Any] | None) -> None:
    """Report if there is no optimizer, no logger, or no state of the callback in the checkpoint."""
    if not recorders:
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


def check_tuned(recorders: Sequence[Recorder]) -> None:
    """Warn of optimizers without a tuned step."""
    for recorder in recorders:
        if not (recorder.engine.step_count or recorder.engine.paused):
            rank_zero_warn(
                f"HypergradientDescent: no step of {recorder.name} was tuned. Its `step` was replaced or not called, "
                "or there was no gradient. If the parameters have moved, it was at the configured learning rate."
            )


def announce(recorders: Sequence[Recorder], rule: Rule | str, max_lr: float | None) -> None:
    """Report what is tuned, by which rule, and how much of each model is looked at. Call it after a first step."""
    parts = []
    for recorder in recorders:
        seen, count = recorder.engine.stats.coordinates
        part = f"{seen:,} of {count:,}" if seen < count else f"all {count:,}"
        parts.append(f"{recorder.name} (looks at {part} numbers)" if recorder.steps else recorder.name)
    rank_zero_info(f"HypergradientDescent tunes {', '.join(parts)} with the rule {rule!r}.")
    if len(recorders) > 1 and max_lr is None and _is_auto(rule):
        rank_zero_info(
            "HypergradientDescent: if these optimizers train against each other, as in a GAN, neither gradients nor "
            "losses show that a rate is too high. Then set max_lr= to a rate that is known to work, such as 3e-3 for "
            "Adam."
        )


def _is_auto(rule: Rule | str) -> bool:
    return rule == "auto" or isinstance(rule, Auto)


def summarize(recorders: Sequence[Recorder], rule: Rule | str, seconds: float) -> None:
    """Show the table and the remarks, on the first process.

    Args:
        recorders: The recorders of the optimizers.
        rule: The rule.
        seconds: The time that training took.
    """
    if body := rows(recorders, seconds):
        rank_zero_info("\n".join([_table(body), *remarks(recorders, rule)]))


def rows(recorders: Sequence[Recorder], seconds: float) -> list[tuple[str, ...]]:
    """For each parameter group its rates, the numbers of back-offs and of steps that were not finite, and the time."""
    found = []
    for recorder in recorders:
        stats = recorder.engine.stats
        percent = f"{100 * stats.seconds / seconds:.1f}" if seconds else ""
        for i, (name, lrs) in enumerate(recorder.history()):
            if lrs:
                rates = (recorder.configured(i), lrs[0], median(lrs), max(lrs), lrs[-1])
                counts = (stats.backoffs[recorder.scope_of(i)], stats.nonfinite_steps)
                numbers = ["" if math.isnan(lr) else f"{lr:.2g}" for lr in rates] + [f"{count}" for count in counts]
                found.append((name, *numbers, f"{stats.seconds:.1f}", percent))
    return found


def remarks(recorders: Sequence[Recorder], rule: Rule | str) -> list[str]:
    """A sentence for each thing that seems wrong."""
    found = [recorder for recorder in recorders if recorder.steps]
    own = [remark for recorder in found if _is_auto(rule) for remark in _remarks_on_auto(recorder)]
    return own + [remark for recorder in found for remark in _remarks(recorder)]


def _remarks_on_auto(recorder: Recorder) -> Iterator[str]:
    taken = recorder.engine.step_count  # with those of former fits, for a warm start
    if taken < _SHORT:
        yield (
            f"{recorder.name}: {taken} steps may be too few for the rate to reach its range. Below {_SHORT}, tune it "
            "by hand. For many short fits, pass warm_start=True, so that each begins with what the last one has "
            "learned."
        )
    elif recorder.engine.stats.loss is None:
        yield (
            f"{recorder.name}: no loss was reported. The rule is better if it knows it: in manual optimization, call "
            "observe(loss) of the optimizer's engine, callback.engines[0] for example."
        )


def _remarks(recorder: Recorder) -> Iterator[str]:
    name, steps, stats = recorder.name, recorder.steps, recorder.engine.stats
    taken = recorder.engine.step_count
    if steps >= _SAMPLE:
        held = list(_held(recorder))
        yield from held
        for course, backoffs in zip(recorder.courses(), stats.backoffs, strict=False):
            yield from _cosines(course)
            if not held and _fights(course.scales, course.schedule):
                yield (
                    f"{course.name}: the learned scale undid most of what the scheduler did. Leave the scheduler out, "
                    "or pass stop_after= to keep the scale after some steps."
                )
            if backoffs > _BACKED_OFF * taken:
                yield (
                    f"{course.name}: the rule backed off in {backoffs} of {taken} steps. Look for unusual batches, or "
                    "pass a max_lr= below the highest rate."
                )
        if recorder.untuned > _UNSEEN * steps:
            yield f"{name}: {recorder.untuned} steps of the optimizer were not tuned."
    if stats.writes > 1:
        yield (
            f"{name}: rates were written {stats.writes} times, and each replaced the learned one. If they "
            "are a schedule, pass HypergradientDescent(scheduled=True)."
        )
    if stats.nonfinite_steps:
        yield f"{name}: numbers were not finite in {stats.nonfinite_steps} of {taken} steps."


def _held(recorder: Recorder) -> Iterator[str]:
    """What is to be said of groups whose rates were at a clamp."""
    for name, lrs in recorder.history():
        for argument, bound in zip(("min_lr", "max_lr"), recorder.engine.stats.limits, strict=True):
            if bound and lrs.count(bound) >= _PINNED * len(lrs):
                yield f"{name}: the rate was held by {argument}={bound:g} in most steps."


def _cosines(course: Course) -> Iterator[str]:
    """What is to be said of the cosines of a scope."""
    if len(course.cosines) < _SAMPLE:
        return
    positive = fmean(cosine > 0 for cosine in course.cosines)
    if not 1 - _ONE_SIGN <= positive <= _ONE_SIGN:
        sign, size = ("positive", "small") if positive > _ONE_SIGN else ("negative", "large")
        part = max(positive, 1 - positive)
        yield f"{course.name}: the cosine was {sign} in {part:.0%} of the steps, so the rate was always too {size}."
    elif fmean(course.cosines[-_SAMPLE:]) > _RISING:
        yield f"{course.name}: the rate was still too small at the end, so the run was too short."


def _fights(scales: Sequence[float], schedule: Sequence[float]) -> bool:
    """Whether the scale has undone most of what the schedule did in the second half of the run.

    A scale of exactly 1 has not: SWALR's rates are used as they are.
    """
    pairs = [(math.log(a), math.log(b)) for a, b in zip(schedule, scales, strict=False) if a > 0 < b and b != 1]
    late = pairs[len(pairs) // 2 :]
    if not late:
        return False
    theirs, ours = zip(*late, strict=True)
    return max(theirs) - min(theirs) >= math.log(_VARIED) and linear_regression(theirs, ours).slope < -_UNDONE


def _table(body: Sequence[tuple[str, ...]]) -> str:
    """The table as text."""
    widths = [max(map(len, column)) for column in zip(_HEAD, *body, strict=True)]
    lines = ["  ".join(map(str.rjust, line, widths)) for line in (_HEAD, *body)]
    return "\n".join(["HypergradientDescent: the learning rates of this training", *lines])
