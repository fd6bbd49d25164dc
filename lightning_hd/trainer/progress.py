"""How far a Trainer is: the step on the axis of its loggers, and the steps that it still takes."""

import math
from itertools import pairwise
from typing import Any

from lightning.pytorch import Trainer

from lightning_hd.checks import class_names


def axis(trainer: Trainer) -> int:
    """The step on the axis of ``self.log``.

    Lightning has no public name for it. ``global_step`` is not the same in manual optimization, because it counts the
    steps of all optimizers. ``LearningRateMonitor`` reads the same attribute.
    """
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def is_due(trainer: Trainer, every: int | None, batch_idx: int) -> bool:
    """Whether to log at the end of a batch.

    Args:
        trainer: The Trainer.
        every: The interval in steps; ``None``: the Trainer's. 0: never.
        batch_idx: The batch.
    """
    if every is None:
        every = int(trainer.log_every_n_steps)  # type: ignore[attr-defined]  # public, but set without an annotation
    # The axis does not move while gradients are accumulated.
    moves = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
    return bool(moves and every and (axis(trainer) + 1) % every == 0)


def remaining_steps(trainer: Trainer, batch_idx: int | None) -> int | None:
    """How many steps the training still takes, if each batch leads to one; ``None`` if that is not known.

    Args:
        trainer: The Trainer.
        batch_idx: The batch that begins; ``None``: the training begins.
    """
    if not trainer.lightning_module.automatic_optimization:
        return None
    total = trainer.estimated_stepping_batches
    if not 0 < total < math.inf:
        return None
    remaining = int(total) - trainer.global_step
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    if epochs is not None and epochs > 0 and batches < math.inf:
        first = 0 if batch_idx is None else trainer.current_epoch
        over = trainer.global_step if batch_idx is None else batch_idx // trainer.accumulate_grad_batches
        remaining = _steps(trainer, int(batches), first, epochs) - over
        if trainer.max_steps > 0:
            remaining = min(remaining, trainer.max_steps - trainer.global_step)
    return max(remaining, 0)


def _steps(trainer: Trainer, batches: int, first: int, stop: int) -> int:
    """The number of steps in the epochs from ``first`` on, up to ``stop``, of so many batches each."""
    # It goes by its name, because the package `pytorch_lightning` has its own. The last one has the last word.
    callbacks = list[Any](trainer.callbacks)  # type: ignore[attr-defined]
    named = [callback for callback in callbacks if "GradientAccumulationScheduler" in class_names(callback)]
    if not named:
        return math.ceil(batches / trainer.accumulate_grad_batches) * (stop - first)
    changes = [first, *sorted(epoch for epoch in named[-1].scheduling if first < epoch < stop), stop]
    counts = [math.ceil(batches / named[-1].get_accumulate_grad_batches(epoch)) for epoch in changes]
    return sum(count * (b - a) for count, (a, b) in zip(counts, pairwise(changes), strict=False))
