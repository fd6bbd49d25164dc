"""HypergradientDescent: the Lightning callback. Its hooks are in the order in which the Trainer calls them."""

import functools
import inspect
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_hd.engine import HypergradientLR, check_arguments, common_rate, make_cooldown
from lightning_hd.hypergradient import copies_of, leave_copies, load_copies
from lightning_hd.reporting import Recorder, figure, loggers, summary
from lightning_hd.rules import Rule, RuleName
from lightning_hd.trainer.attachment import Attachment, TrainerEngine, optimizers_of_torch, with_groups
from lightning_hd.trainer.checkpoints import check_saved, configured_rates, guard_states, restore
from lightning_hd.trainer.checks import check_alone, check_own_arguments, check_strategy, strategies
from lightning_hd.trainer.progress import axis, is_due

if TYPE_CHECKING:  # matplotlib is an extra
    from matplotlib.figure import Figure

_OWN = ("log_every_n_steps", "prog_bar", "on_mismatch", "summary", "warm_start")
"""The arguments that are not those of the engines."""


class HypergradientDescent(Callback):
    r"""Tunes the learning rate of every optimizer of the Trainer while the model trains, and logs it.

    Add it to a Trainer; nothing else changes:

        trainer = Trainer(callbacks=[HypergradientDescent()])

    One instance tunes all optimizers, so a Trainer takes one only. When training starts, one ``HypergradientLR`` is
    attached to each optimizer that ``configure_optimizers`` returns, in automatic and in manual optimization. It is
    detached when training ends or an exception stops it. Every logger of the Trainer gets these numbers, on the step
    axis of Lightning's own metrics:

    - ``hd/lr-Adam``: the effective learning rate of each group, which the last step used;
    - ``hd/scale-Adam``: the learned scale of each scope: the effective rate over the configured or scheduled one;
    - ``hd/schedule-Adam``: the scheduled rate of each group, where there is a scheduler;
    - ``hd/hypergradient-Adam``: the hypergradient of each scope, averaged over the steps since it was last logged;
    - ``hd/cosine-Adam``: the cosine between the new gradient and the direction of the last step (of all remembered
      steps with the default rule), averaged likewise, and ``hd/mean_cosine-Adam``: its mean over the last 100 steps;
    - ``hd/backoffs-Adam``: how often the rule has backed off from an overshoot, from the first time on.

    The part after the dash is what ``LearningRateMonitor`` uses: ``Adam-1`` for a second Adam; ``Adam/pg1``, or
    ``Adam/`` and the group's ``name``, where there are several groups. After every batch, the current numbers are in
    ``trainer.callback_metrics``, so that other callbacks can monitor them.

    Source: "Online Learning Rate Adaptation with Hypergradient Descent" (Baydin et al., ICLR 2018, arXiv 1703.04782),
    Section 3. The default rule is this project's own.

    Args:
        rule: ``"auto"`` has nothing to tune and does not depend on the configured rate (see ``Auto``). ``"additive"``
            and ``"multiplicative"`` are the paper's two rules. A ``Rule`` object serves as well.
        hypergrad_lr: ``β`` of the paper's rules (for its unit see ``Additive``); ``None``: the rule's default. With 0,
            training is the same as without the callback, bit for bit.
        scope: ``"global"``: one scale for all parameter groups of an optimizer, whose ratios stay as configured.
            ``"group"``: one scale for each group.
        min_lr: Lower clamp on the effective learning rate; ``None``: unclamped, as in the paper.
        max_lr: Upper clamp; ``None``: unclamped.
        probe: How many coordinates of the parameters to look at; ``None``: all. ``"default"``: 2^16 at most with the
            default rule, all with the paper's.
        log_every_n_steps: Logging interval in steps; ``None``: the Trainer's. 0: loggers get nothing.
        prog_bar: Whether to show the learning rates in the progress bar.
        cooldown: The last part of the training, from 0 to 1, over which the rates fall to 0; 0: none.
            ``"default"``: a fifth with the default rule, none with the paper's, or with ``warm_start``. The rates do
            not fall under a scheduler, in manual optimization, or where the Trainer does not know how long it trains.
            They do not reach 0 if ``on_train_batch_start`` ends epochs by -1.
        stop_after: The number of steps of each optimizer after which tuning stops. The learned scale then stays as it
            is, and schedules and the cooldown go on. ``None``: never.
        scheduled: Whether the rates in ``param_groups`` belong to a schedule; ``None``: it is detected. Pass ``True``
            where your own code writes the schedule, in ``on_train_epoch_start`` for example.
        on_mismatch: What to do with a checkpoint of another rule, scope, optimizer or layout of parameter groups.
            ``"error"``: raise an error. ``"restart"``: warn, and start tuning and such an optimizer anew.
        summary: Whether to log what is tuned at the start, and a table of the rates at the end.
        warm_start: Whether a fit begins with what the last one has learned, also with new optimizers of the same
            classes and numbers of groups, or in another Trainer. It is for many short fits. If optimizers differ, the
            fit starts anew, with a warning. The step count goes on, and the default cooldown is none.

    Attributes:
        engines: The ``HypergradientLR`` of each optimizer, during training and after it.
        lrs: The effective learning rate of every optimizer step since training started or was resumed: a list for each
            group, under the name in its tag (``lr-Adam``). The list of a group that was added later is shorter.

    Raises:
        TypeError: An argument is of the wrong type. When training starts: an optimizer, a strategy or a module is not
            supported.
        ValueError: An argument or a configured learning rate is out of range. When training starts: a checkpoint holds
            the state of another rule, scope or layout of optimizers.
        RuntimeError: When training starts: the Trainer has two such callbacks, or an optimizer is tuned already.
    """

    def __init__(
        self,
        rule: Rule | RuleName = "auto",  # the class comes first, because command lines try the types in this order
        *,
        hypergrad_lr: float | None = None,
        scope: Literal["global", "group"] = "global",
        min_lr: float | None = 0.0,
        max_lr: float | None = None,
        probe: int | Literal["default"] | None = "default",
        log_every_n_steps: int | None = None,
        prog_bar: bool = False,
        cooldown: float | Literal["default"] = "default",
        stop_after: int | None = None,
        scheduled: bool | None = None,
        on_mismatch: Literal["error", "restart"] = "error",
        summary: bool = True,
        warm_start: bool = False,
    ) -> None:
        check_own_arguments(rule, log_every_n_steps, prog_bar, on_mismatch, summary, warm_start)
        checked, *_ = check_arguments(rule, hypergrad_lr, scope, min_lr, max_lr, probe, stop_after, scheduled)
        make_cooldown(cooldown, None, checked)
        self.rule = rule
        self.hypergrad_lr = hypergrad_lr
        self.scope = scope
        self.min_lr, self.max_lr = min_lr, max_lr
        self.probe = probe
        self.cooldown, self.stop_after, self.scheduled = cooldown, stop_after, scheduled
        self.log_every_n_steps, self.prog_bar, self.summary = log_every_n_steps, prog_bar, summary
        self.on_mismatch, self.warm_start = on_mismatch, warm_start
        self._attachment = Attachment(self, self._make)
        self._restored: dict[str, Any] | None = None  # the state of a checkpoint, until training starts
        self._learned: dict[str, Any] = {}  # the state at the end of the last fit, for a warm start
        self._guards = ExitStack()  # they stay until the optimizers have loaded their states
        self._configured: dict[int, list[float]] = {}  # the rates of each optimizer before a checkpoint was loaded
        self._since = 0.0  # when training started, in seconds
        self._announced = False  # whether what is tuned was reported
        self._began = False  # whether a batch of this training has begun
        self._trains = True  # whether the Trainer does more than to validate, test or predict
        self._evaluated = False  # whether ``_restored`` is of a checkpoint that was only validated or tested

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in inspect.signature(HypergradientDescent).parameters}

    def __repr__(self) -> str:
        defaults = inspect.signature(HypergradientDescent).parameters
        shown = {name: value for name, value in self._settings().items() if value != defaults[name].default}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in ({'rule': self.rule} | shown).items())})"

    @property
    def engines(self) -> list[HypergradientLR]:
        """The ``HypergradientLR`` of each optimizer that is tuned, during training and after it."""
        return [*self._attachment.engines]

    @property
    def lrs(self) -> dict[str, list[float]]:
        """The effective learning rate of every optimizer step since training started or was resumed, by group name."""
        return {f"lr-{name}": lrs for recorder in self._recorders for name, lrs in recorder.history()}

    @property
    def _recorders(self) -> list[Recorder]:
        return self._attachment.recorders

    @overload
    def suggestion(self) -> float: ...

    @overload
    def suggestion(self, *, by_group: Literal[True]) -> dict[str, float]: ...

    def suggestion(self, *, by_group: bool = False) -> float | dict[str, float]:
        """The constant rate that the steps so far suggest for a training like this one without the callback.

        After a checkpoint was loaded, it is that of the training that has written it, until training goes on. See
        ``HypergradientLR.suggestion``.

        Args:
            by_group: Whether to return the rate of each parameter group by its name, which is that in its tag.

        Raises:
            RuntimeError: No step was tuned yet.
            ValueError: The groups have different rates, and ``by_group`` is not ``True``.

        Warns:
            RuntimeWarning: Many steps were not finite.
        """
        restored: dict[str, float] = {} if self._restored is None else self._restored.get("suggestion", {})
        named = restored or self._attachment.suggestions(warn=True)
        if not named:
            raise RuntimeError("there is no suggestion: no step of an optimizer was tuned yet, on this process")
        return named if by_group else common_rate(named)

    def plot(self) -> "Figure":
        """Draw the learning rates, the loss and the cosines of this training, for a notebook.

        The figure is that of ``python -m lightning_hd plot``. It begins where training started or was resumed.

        Raises:
            RuntimeError: No step was tuned yet.
            ModuleNotFoundError: matplotlib is not installed.
        """
        if not any(recorder.steps for recorder in self._recorders):
            raise RuntimeError("there is nothing to plot: no step of an optimizer was tuned yet, on this process")
        return figure([recorder.curves() for recorder in self._recorders])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier training, and a checkpoint that was loaded for validation or testing."""
        self._trains = stage == "fit"
        if self._trains:
            check_alone(HypergradientDescent, trainer)
            if self.prog_bar:
                loggers.show_small_numbers(trainer)
            last = self._attachment.state_dict() if self._evaluated else self.state_dict()
            self._learned = (self.warm_start and last) or self._learned
            self._attachment.forget()  # an error in another callback may have prevented it before
            self._began, self._evaluated, self._announced, self._restored = False, False, False, None
            loggers.describe(trainer, pl_module, self._settings())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state of a checkpoint until training starts. If it has started already, go on from that state."""
        check_saved(state_dict)
        self._restored, self._evaluated = state_dict, not self._trains
        if self._attachment.active:
            self._restore()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare the optimizers for loading their states from a checkpoint."""
        self._configured = configured_rates(with_groups(trainer))
        if self._restored is not None:
            classes = self._restored.get("classes", [])
            self._guards = guard_states(with_groups(trainer), classes, restart=self.on_mismatch == "restart")
        for optimizer in optimizers_of_torch(trainer):
            copies_of(optimizer)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Load the engines' tensors from a distributed checkpoint, because Lightning does not."""
        if "ModelParallelStrategy" in strategies(trainer) and trainer.ckpt_path and Path(trainer.ckpt_path).is_dir():
            for i, optimizer in enumerate(trainer.optimizers):
                load_copies(pl_module, optimizer, f"optimizer_{i}", Path(trainer.ckpt_path))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach to every optimizer."""
        self._guards.close()
        self._since = time.perf_counter()
        check_strategy(trainer)
        self._attachment.attach(trainer, self.scope, self._configured)
        summary.say_what_is_missing(trainer, self._recorders, self._restored or self._learned or None)
        self._restore()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Attach to the new optimizers if they were replaced."""
        self._began = True
        if self._attachment.is_stale(trainer):
            rank_zero_warn(
                "HypergradientDescent: the Trainer's optimizers were replaced in mid-training, so tuning the learning "
                "rate starts from the beginning."
            )
            self._attachment.forget()
            self._attachment.attach(trainer, self.scope, configured_rates(with_groups(trainer)))
        self._attachment.before_batch(trainer, batch_idx)

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Forget the losses of batches whose gradients are dropped."""
        for engine in self._attachment.engines:
            engine.forget_losses()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Report the loss of a batch. In manual optimization, it may be of any optimizer, or scaled by the user."""
        if pl_module.automatic_optimization:
            self._attachment.observe(trainer, loss)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the numbers if a step was taken."""
        recorders = self._recorders
        if not trainer.barebones:
            loggers.show(trainer, pl_module, recorders, self.prog_bar)
        for recorder in recorders:
            recorder.mark(axis(trainer))
            if self.log_every_n_steps == 0:
                recorder.skip()
        if self.summary and not self._announced and any(recorder.steps for recorder in recorders):
            self._announced = True
            summary.announce(recorders, self.rule, self.max_lr)
        if any(recorder.has_news for recorder in recorders) and is_due(trainer, self.log_every_n_steps, batch_idx):
            self._attachment.check_agreement()
            loggers.log(trainer, recorders, axis(trainer))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Detach, write what was not logged yet, and remove all hooks: Lightning calls no ``teardown`` now."""
        self._attachment.detach()
        self._let_go(trainer)
        if self.log_every_n_steps != 0:
            loggers.rescue_curves(trainer, self._recorders, axis(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Detach."""
        if self._began:
            summary.check_tuned(self._recorders)
        loggers.log_curves(trainer, self._recorders)
        if self._announced:
            summary.summarize(self._recorders, self.rule, time.perf_counter() - self._since)
        self._attachment.detach()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the hooks from the optimizers, in case training did not start."""
        self._let_go(trainer)

    def _let_go(self, trainer: Trainer) -> None:
        self._trains = True
        self._guards.close()
        for optimizer in optimizers_of_torch(trainer):
            leave_copies(optimizer)

    def state_dict(self) -> dict[str, Any]:
        """What every engine has learned. Tensors of the parameters' size are in the optimizers' states (``hd_*``)."""
        # the first, as long as training has not started yet
        return self._attachment.state_dict() if self._restored is None else self._restored

    def __getstate__(self) -> dict[str, Any]:
        """A copy has the arguments. It has no part in the training of the original."""
        without = ("log", "log_dict", "_attachment", "_guards", "_learned")  # the first two are the module's
        return {name: value for name, value in vars(self).items() if name not in without}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _guards=ExitStack(), _learned={})
        self._attachment = Attachment(self, self._make)

    def _make(
        self, optimizer: Optimizer, group: dist.ProcessGroup | None, steps: int | None, scheduled: bool | None
    ) -> TrainerEngine:
        settings = {name: value for name, value in self._settings().items() if name not in _OWN}
        if steps is None or (self.warm_start and self.cooldown == "default"):
            settings["cooldown"] = 0.0
        if self.scheduled is None:
            settings["scheduled"] = scheduled
        total = None if steps is None else max(steps, 1)
        engine = TrainerEngine(optimizer, process_group=group, total_steps=total, **settings)
        engine.expect(steps)
        return engine

    def _restore(self) -> None:
        if self._restored is not None:
            saved, self._restored = self._restored, None
            restore(self._attachment, saved, self._configured, restart=self.on_mismatch == "restart")
        elif self._learned:
            restore(self._attachment, self._learned, self._configured, restart=True, warm_start=True)


# A Trainer's constructor refuses two callbacks that override ``state_dict``, and asks for another ``state_key``. What
# wraps the method of ``Callback`` is no override to it, and is saved all the same. So ``setup`` can say what to do.
functools.update_wrapper(HypergradientDescent.state_dict, Callback.state_dict, assigned=(), updated=())
