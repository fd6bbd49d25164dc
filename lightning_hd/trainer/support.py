"""What the callback needs of a Trainer: checks of its strategy, optimizers and modules, and its counts of steps."""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_hd.engine import HypergradientLR
from lightning_hd.optimizers import check_optimizer, get_lrs, set_lr, unwrap

_SUPPORTED = {"SingleDeviceStrategy", "DDPStrategy", "FSDPStrategy", "ModelParallelStrategy"}
_REFUSED = {"DeepSpeedStrategy", "XLAStrategy", "SingleDeviceXLAStrategy"}  # though they are subclasses of the former
"""Strategies go by their names, because the package ``pytorch_lightning`` has its own classes of these names."""

_WAY_OUT = "Go on with the same, or start anew with on_mismatch='restart'"


def strategies(trainer: Trainer) -> set[str]:
    """The names of the strategy's class and of its base classes."""
    return {base.__name__ for base in type(trainer.strategy).__mro__}


def remaining_steps(trainer: Trainer, whole_epochs: bool) -> int | None:
    """How many steps the training still takes; ``None`` if that is not known.

    Args:
        trainer: The Trainer.
        whole_epochs: Whether an epoch begins. If so, its own batches and accumulation are counted.
    """
    if not trainer.lightning_module.automatic_optimization:
        return None
    total = trainer.estimated_stepping_batches
    if not 0 < total < math.inf:
        return None
    remaining = int(total) - trainer.global_step
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    if whole_epochs and epochs is not None and epochs > 0 and batches < math.inf:
        remaining = math.ceil(batches / trainer.accumulate_grad_batches) * (epochs - trainer.current_epoch)
        if trainer.max_steps > 0:
            remaining = min(remaining, trainer.max_steps - trainer.global_step)
    return max(remaining, 0)


def tunable(optimizers: Sequence[Optimizer]) -> list[Optimizer]:
    """The optimizers that can be tuned. A warning names the others.

    Raises:
        TypeError: None of them can be tuned.
        ValueError: One has no parameter group, a group without ``lr``, or one with a parameter twice.
    """
    found, reasons = [], list[str]()
    for optimizer in optimizers:
        try:
            check_optimizer(optimizer)
        except TypeError as error:
            if len(optimizers) == 1:
                raise
            reasons.append(str(error))
        else:
            found.append(optimizer)
    if optimizers and not found:
        raise TypeError("none of the optimizers can be tuned: " + "; ".join(reasons))
    for reason in reasons:
        rank_zero_warn(f"HypergradientDescent tunes the other optimizers only: {reason}.")
    return found


def guard_states(optimizers: Sequence[Optimizer], classes: Sequence[str], restart: bool) -> list[RemovableHandle]:
    """Check that states belong to their optimizers when these load them from a checkpoint.

    Args:
        optimizers: The optimizers.
        classes: The class names of the optimizers in the checkpoint.
        restart: Whether to warn and start an optimizer anew if its state is another's. Otherwise ``ValueError`` is
            raised.

    Returns:
        Handles that remove the checks.
    """

    def check(saved_class: str, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        fresh = optimizer.state_dict()
        layouts = [[len(group["params"]) for group in state["param_groups"]] for state in (state_dict, fresh)]
        now = type(optimizer).__name__
        if saved_class == now and layouts[0] == layouts[1]:
            return None
        counts = [f"{len(layout)} parameter groups" for layout in layouts]
        found = f"optimizer={saved_class!r} with {counts[0]}, now it is {now!r} with {counts[1]}"
        if not restart:
            raise ValueError(f"HypergradientDescent: the saved state has {found}. {_WAY_OUT}")
        rank_zero_warn(f"HypergradientDescent: the saved state has {found}, so this optimizer starts anew.")
        return fresh

    return [
        optimizer.register_load_state_dict_pre_hook(partial(check, saved_class), prepend=True)
        for optimizer, saved_class in zip(optimizers, classes, strict=False)
        if isinstance(optimizer, Optimizer)
    ]


def restore(
    engines: Sequence[HypergradientLR],
    saved: Sequence[dict[str, Any]],
    configured: Sequence[list[float]],
    restart: bool,
) -> None:
    """Load the saved state of each engine.

    Args:
        engines: The engines.
        saved: The states.
        configured: The rates that the groups of each optimizer were configured with.
        restart: Whether to warn and start from these rates if a state does not fit. Otherwise ``ValueError`` is raised.

    Raises:
        ValueError: A state does not fit.
    """
    errors, failed = list[str](), list(range(len(engines)))
    if len(saved) != len(engines):
        errors = [
            f"the checkpoint holds HypergradientDescent's state of {len(saved)} optimizers, but configure_optimizers "
            f"returned {len(engines)} that can be tuned"
        ]
    for i, (engine, state_dict) in enumerate(zip(engines, saved, strict=True) if not errors else ()):
        try:
            engine.load_state_dict(state_dict)
            failed.remove(i)
        except ValueError as error:
            errors.append(f"{type(engine.optimizer).__name__}: {error}")
    if errors and not restart:
        raise ValueError(f"HypergradientDescent: {'; '.join(errors)}. {_WAY_OUT}")
    for i in failed:
        if not engines[i].under_schedule:
            for settings, lr in zip(engines[i].optimizer.param_groups, configured[i], strict=False):
                set_lr(settings, lr)
    for wrong in errors:
        rank_zero_warn(f"HypergradientDescent: tuning starts anew. {wrong}.")


def configured_rates(optimizers: Sequence[Optimizer]) -> dict[int, list[float]]:
    """The rates in the groups of each optimizer, by its id. Optimizers with something else than rates are left out."""
    rates = {}
    for optimizer in optimizers:
        with contextlib.suppress(KeyError, TypeError, ValueError, RuntimeError):
            rates[id(unwrap(optimizer))] = get_lrs(optimizer.param_groups)
    return rates


def check_alone(kind: type[Callback], trainer: Trainer) -> None:
    """Raise ``RuntimeError`` if the Trainer has several such callbacks."""
    count = sum(isinstance(callback, kind) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    if count > 1:
        raise RuntimeError(f"the Trainer has {count} {kind.__name__} callbacks: use one, which tunes all optimizers")


def show_small_numbers(trainer: Trainer) -> None:
    """Let a RichProgressBar show three digits of numbers below 0.001, unless it has its own format."""
    bar = trainer.progress_bar_callback
    theme = getattr(bar, "theme", None)
    if theme is not None and theme.metrics_format == ".3f":
        bar.theme = replace(theme, metrics_format=".3g")  # type: ignore[union-attr]


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


def with_groups(trainer: Trainer) -> list[Optimizer]:
    """The Trainer's optimizers that have parameters."""
    return [optimizer for optimizer in trainer.optimizers if optimizer.param_groups]


def check_tensors(optimizers: list[Optimizer]) -> None:
    """Raise ``ValueError`` if two optimizers share a rate: each would take what the other learns for a written rate."""
    tensors = [
        {id(group["lr"]) for group in optimizer.param_groups if isinstance(group["lr"], Tensor)}
        for optimizer in optimizers
    ]
    for i, own in enumerate(tensors):
        if any(own & others for others in tensors[:i]):
            raise ValueError(
                f"two optimizers share one lr tensor, the second of them {type(optimizers[i]).__name__}: give each its "
                "own, as in lr=torch.tensor(...)"
            )


def check_strategy(trainer: Trainer) -> None:
    """Raise ``TypeError`` if the Trainer's strategy is not supported."""
    names = strategies(trainer)
    if not names & _SUPPORTED or names & _REFUSED:
        raise TypeError(
            f"HypergradientDescent does not support {type(trainer.strategy).__name__}: its dot products would see a "
            "part of the parameters only. Use strategy='ddp' or 'fsdp', ModelParallelStrategy (fully_shard) or a "
            "single device"
        )


def check_modules(pl_module: LightningModule, optimizers: Sequence[Optimizer]) -> None:
    """Raise ``TypeError`` if one of these optimizers trains a module with sparse gradients."""
    trained = {p for optimizer in optimizers for settings in optimizer.param_groups for p in settings["params"]}
    for name, module in pl_module.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse and module.weight in trained:
            raise TypeError(
                f"module '{name}' has sparse gradients, which HypergradientDescent does not support: build it with "
                "sparse=False"
            )
