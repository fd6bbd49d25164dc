"""Attaches engines to the optimizers of a Trainer when training starts, and detaches them when it ends."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.swa_utils import SWALR
from torch.utils.hooks import RemovableHandle

from lightning_hd.engine import HypergradientLR, suggestions
from lightning_hd.optimizers import unwrap
from lightning_hd.reporting import Recorder, optimizer_names
from lightning_hd.trainer.checks import check_modules, check_tensors, tunable
from lightning_hd.trainer.progress import remaining_steps


class TrainerEngine(HypergradientLR):
    """The engine of a Trainer's optimizer. Its messages name the callback, which is what the user has written."""

    _owner = "HypergradientDescent"

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer, without wrappers."""
        return self._optimizer

    def hand_over(self) -> None:
        """Leave the rates to SWALR, which was built since the last step; see ``Rates.hand_over``."""
        if not self._tuning.rates.handed_over:
            self._tuning.rates.hand_over()
            self._tuning.notices.log(f"from step {self.step_count + 1} on, the rates are those of SWALR")

    def stand_aside(self, aside: bool) -> None:
        """Whether to leave steps as they are, with the rates in the groups, because Lightning's tuner searches."""
        self._tuning.aside = aside

    def expect(self, remaining: int | None) -> None:
        """Set how many steps the training still takes; ``None``: it is not known."""
        self._tuning.cooldown.total = None if remaining is None else self.step_count + remaining

    def suggestions(self, warn: bool) -> list[float]:
        """The suggested rate of each parameter group; none before the first step.

        Args:
            warn: Whether to warn if many steps were not finite.
        """
        if warn:
            self._warn_of_nonfinite_steps()
        return suggestions(self._tuning.rates) or []

    def forget_losses(self) -> None:
        """Forget the losses that no step has used."""
        self._tuning.looks.losses.reported.clear()

    def check_agreement(self) -> None:
        """Raise ``RuntimeError`` on every process if the rates of the processes are not equal bit for bit."""
        self._tuning.ranks.check_agreement(f"{self._owner}({self._name})", self.step_count, self.lrs)


Make = Callable[[Optimizer, dist.ProcessGroup | None, int | None, bool | None], TrainerEngine]


def optimizers_of_torch(trainer: Trainer) -> list[Optimizer]:
    """The Trainer's optimizers of torch's base class. Wrappers need not be of it."""
    return [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, Optimizer)]


def with_groups(trainer: Trainer) -> list[Optimizer]:
    """The Trainer's optimizers that have parameters."""
    return [optimizer for optimizer in trainer.optimizers if optimizer.param_groups]


class Attachment:
    """Attaches an engine and a recorder to each optimizer that can be tuned.

    Args:
        callback: The callback that owns the engines.
        make: Builds an engine from an optimizer, the processes that train together, the number of steps that the
            training still takes, and whether a scheduler of the Trainer owns the rates.
    """

    def __init__(self, callback: Callback, make: Make) -> None:
        self._callback = callback
        self._make = make
        self.engines: list[TrainerEngine] = []
        self.recorders: list[Recorder] = []
        self.active = False  # whether the engines are attached
        self._optimizers: list[Optimizer] = []  # all of the Trainer's, including those that cannot be tuned
        self._schedulers: list[Any] = []  # the Trainer's when training started; others come with weight averaging
        self._handles: list[RemovableHandle] = []
        self._alone: dist.ProcessGroup | None = None

    def attach(self, trainer: Trainer, scope: str, configured: Mapping[int, list[float]]) -> None:
        """Attach to every optimizer.

        Args:
            trainer: The Trainer.
            scope: The scope of the learned rates.
            configured: The rates that the groups of each optimizer were configured with, by its id.

        Raises:
            TypeError, ValueError, RuntimeError: An optimizer, a module or a rate cannot be tuned.
        """
        everyone = with_groups(trainer)
        self._optimizers = list(map(unwrap, everyone))
        optimizers = tunable(everyone)
        check_modules(trainer.lightning_module, optimizers)
        check_tensors(optimizers)
        if dist.is_initialized() and dist.get_world_size() > 1 and trainer.world_size == 1:
            # This Trainer has one process only, so the others train another model.
            self._alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
        self.active = True
        remaining = remaining_steps(trainer, batch_idx=None)
        self._schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        scheduled = [id(scheduler.optimizer) for scheduler in self._schedulers]
        own: Any = trainer.lightning_module.optimizers()  # schedulers may be built on these, which are wrappers
        wrappers = {id(unwrap(wrapper)): wrapper for wrapper in (own if isinstance(own, list) else [own])}
        for optimizer, name in zip(everyone, optimizer_names(everyone), strict=True):
            if optimizer not in optimizers:
                continue
            # Lightning's tuner removes all callbacks while it searches. Its steps are no part of the training.
            self._handles.append(optimizer.register_step_pre_hook(partial(self._pause, trainer)))
            wrapper = wrappers.get(id(optimizer), optimizer)
            engine = self._make(wrapper, self._alone, remaining, id(optimizer) in scheduled or None)
            self.engines.append(engine)
            rates = configured.get(id(engine.optimizer), [])
            self.recorders.append(Recorder(engine, engine.optimizer, name, scope, rates))

    def before_batch(self, trainer: Trainer, batch_idx: int) -> None:
        """Note what has changed since the last batch: the length of the training, its scheduler, parameter groups."""
        remaining = remaining_steps(trainer, batch_idx)
        for engine in self.engines:
            engine.expect(remaining)  # in each batch, because the last ones may not have led to a step
        for config in trainer.lr_scheduler_configs:
            swapped = config.scheduler not in self._schedulers
            for engine in self.engines:
                if swapped and isinstance(config.scheduler, SWALR) and config.scheduler.optimizer is engine.optimizer:
                    engine.hand_over()
        for recorder in self.recorders:
            recorder.see_groups()

    def observe(self, trainer: Trainer, loss: Tensor) -> None:
        """Report the loss of a batch to the engines.

        Args:
            trainer: The Trainer.
            loss: What is backpropagated: the loss over the number of accumulated batches, times a GradScaler's scale.
        """
        loss = loss.detach()
        if trainer.accumulate_grad_batches > 1:
            loss = loss * trainer.accumulate_grad_batches
        if trainer.scaler is not None:
            loss = loss / trainer.scaler.scale(torch.ones((), device=loss.device))
        for engine in self.engines:
            engine.observe(loss)

    def check_agreement(self) -> None:
        """Raise ``RuntimeError`` if the rates differ between the processes."""
        for engine in self.engines:
            engine.check_agreement()

    def suggestions(self, warn: bool) -> dict[str, float]:
        """The suggested rate of each parameter group, by its name.

        Args:
            warn: Whether to warn if many steps were not finite.
        """
        found: dict[str, float] = {}
        for engine, recorder in zip(self.engines, self.recorders, strict=True):
            found |= dict(zip(recorder.names(), engine.suggestions(warn), strict=False))
        return found

    def state_dict(self) -> dict[str, Any]:
        """What every engine has learned; nothing if there is none."""
        if not self.engines:
            return {}
        return {
            "optimizers": [engine.state_dict() for engine in self.engines],
            "classes": [type(optimizer).__name__ for optimizer in self._optimizers],
            "names": [recorder.names() for recorder in self.recorders],
            "suggestion": self.suggestions(warn=False),
        }

    def is_stale(self, trainer: Trainer) -> bool:
        """Whether the Trainer has other optimizers now."""
        return list(map(unwrap, with_groups(trainer))) != self._optimizers

    def detach(self) -> None:
        """Detach all engines. Their state stays, for checkpoints that are written later."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.active = [], False
        for engine in self.engines:
            engine.detach(keep_state=True)
        for recorder in self.recorders:
            recorder.detach()
        if self._alone is not None and dist.is_initialized():
            dist.destroy_process_group(self._alone)
        self._alone = None

    def forget(self) -> None:
        """Detach all engines, and drop them."""
        self.detach()
        self.engines, self.recorders, self._optimizers = [], [], []

    def _pause(self, trainer: Trainer, *_: Any) -> None:
        for engine in self.engines:
            engine.stand_aside(self._callback not in trainer.callbacks)  # type: ignore[attr-defined]
