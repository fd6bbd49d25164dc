"""Attaches engines to the optimizers of a Trainer when training starts, and detaches them when it ends."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_hd.engine import HypergradientLR
from lightning_hd.optimizers import unwrap
from lightning_hd.reporting.names import optimizer_names
from lightning_hd.reporting.recorder import Tracker
from lightning_hd.trainer.support import check_modules, check_tensors, remaining_steps, tunable, with_groups

Make = Callable[[Optimizer, int | None, dist.ProcessGroup | None], HypergradientLR]


class Attachment:
    """Attaches an engine and a tracker to each optimizer that can be tuned.

    Args:
        callback: The callback that owns the engines.
        make: Builds an engine from an optimizer, the number of its steps and the processes that train together.
        scheduled: Whether the rates in the groups belong to a schedule; ``None``: it is detected.
    """

    def __init__(self, callback: Callback, make: Make, scheduled: bool | None) -> None:
        self._callback = callback
        self._make = make
        self._scheduled = scheduled
        self.engines: list[HypergradientLR] = []
        self.trackers: list[Tracker] = []
        self._optimizers: list[Optimizer] = []  # all of the Trainer's, including those that cannot be tuned
        self._handles: list[RemovableHandle] = []
        self._alone: dist.ProcessGroup | None = None
        self._paused: list[bool] | None = None  # whether each engine was paused before a tuner began to search

    def observe(self, outputs: Any) -> None:
        """Report to the engines what ``training_step`` has returned."""
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        for engine in self.engines if loss is not None else ():
            engine.observe(loss)

    def suggestion(self) -> float | dict[str, float]:
        """The constant rate that the engines recommend, or one for each parameter group.

        Raises:
            RuntimeError: No step was tuned yet.
        """
        found: dict[str, float] = {}
        for tracker in self.trackers:
            with suppress(RuntimeError):  # it has taken no step
                own = tracker.engine.suggestion()
                lrs = own.values() if isinstance(own, dict) else [own]
                found |= dict(zip(tracker.names(), lrs, strict=False))
        if not found:
            raise RuntimeError("there is no suggestion: no step of an optimizer was tuned yet, on this process")
        return found if len(found) > 1 else next(iter(found.values()))

    def attach(self, trainer: Trainer) -> None:
        """Attach to every optimizer.

        Raises:
            TypeError, ValueError, RuntimeError: An optimizer, a module or a rate cannot be tuned.
        """
        schedulers = [config.scheduler.optimizer for config in trainer.lr_scheduler_configs]
        everyone = with_groups(trainer)
        self._optimizers = [unwrap(optimizer) for optimizer in everyone]
        optimizers = tunable(everyone)
        check_modules(trainer.lightning_module, optimizers)
        check_tensors(optimizers)
        if dist.is_initialized() and dist.get_world_size() > 1 and trainer.world_size == 1:
            # This Trainer has one process only, so the others train another model.
            self._alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
        remaining = remaining_steps(trainer, whole_epochs=False)
        for optimizer, name in zip(everyone, optimizer_names(everyone), strict=True):
            if not any(optimizer is other for other in optimizers):
                continue
            # Lightning's tuner removes all callbacks while it searches. Its steps are no part of the training.
            self._handles.append(optimizer.register_step_pre_hook(partial(self._pause, trainer)))
            engine = self._make(optimizer, remaining, self._alone)
            self.engines.append(engine)
            if self._scheduled is not None or any(optimizer is other for other in schedulers):
                engine.scheduled = self._scheduled is not False
            self.trackers.append(Tracker(engine, name))

    def expect(self, trainer: Trainer, whole_epochs: bool) -> None:
        """Set how many steps the engines expect. The training may have become longer or shorter."""
        remaining = remaining_steps(trainer, whole_epochs)
        for engine in self.engines:
            engine.total_steps = None if remaining is None else engine.step_count + remaining

    @property
    def classes(self) -> list[str]:
        """The names of the classes of all optimizers."""
        return [type(optimizer).__name__ for optimizer in self._optimizers]

    def is_stale(self, trainer: Trainer) -> bool:
        """Whether the Trainer has other optimizers now."""
        now = [unwrap(optimizer) for optimizer in with_groups(trainer)]
        return list(map(id, now)) != list(map(id, self._optimizers))

    def detach(self) -> None:
        """Detach all engines. Their state stays, for checkpoints that are written later."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._paused = [], None
        for engine, tracker in zip(self.engines, self.trackers, strict=False):
            engine.detach(keep_state=True)
            tracker.detach()
        if self._alone is not None and dist.is_initialized():
            dist.destroy_process_group(self._alone)
        self._alone = None

    def forget(self) -> None:
        """Detach all engines, and drop them."""
        self.detach()
        self.engines, self.trackers, self._optimizers = [], [], []

    def _pause(self, trainer: Trainer, *_: Any) -> None:
        searching = not any(callback is self._callback for callback in trainer.callbacks)  # type: ignore[attr-defined]
        if searching and self._paused is None:
            self._paused = [engine.paused for engine in self.engines]
            for engine in self.engines:
                engine.paused = True
        elif not searching and self._paused is not None:
            for engine, paused in zip(self.engines, self._paused, strict=True):
                engine.paused = paused
            self._paused = None
