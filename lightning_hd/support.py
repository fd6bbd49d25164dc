"""What the callback takes: strategies, optimizers and modules of a Trainer."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_hd.hypergradient import HypergradientLR
from lightning_hd.optimizers import check_optimizer

_SUPPORTED = {"SingleDeviceStrategy", "DDPStrategy", "FSDPStrategy", "ModelParallelStrategy"}
_REFUSED = {"DeepSpeedStrategy", "XLAStrategy", "SingleDeviceXLAStrategy"}  # though they are subclasses of those
"""By their names, for the package ``pytorch_lightning`` has classes of its own of the same names."""


def strategies(trainer: Trainer) -> set[str]:
    """The names of the strategy's class and of those that it is a subclass of."""
    return {base.__name__ for base in type(trainer.strategy).__mro__}


def total_steps(trainer: Trainer) -> int | None:
    """How many steps the training takes; ``None`` where that is not known."""
    if not trainer.lightning_module.automatic_optimization:
        return None
    steps = trainer.estimated_stepping_batches
    return int(steps) if 0 < steps < math.inf else None


def tunable(optimizers: Sequence[Optimizer]) -> list[Optimizer]:
    """Those of some optimizers that can be tuned; a warning names the others.

    Raises:
        TypeError: None of them can.
        ValueError: One is not in order.
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


def renew_states(
    checkpoint: dict[str, Any], optimizers: Sequence[Optimizer], classes: Sequence[str], restart: bool
) -> None:
    """Put fresh states into a checkpoint for optimizers to which the saved ones do not belong, with a warning.

    Args:
        checkpoint: The checkpoint.
        optimizers: The optimizers.
        classes: The names of the classes of the saved ones, as far as they are known.
        restart: Whether to do so, rather than to raise.

    Raises:
        ValueError: A state is of an optimizer of another class. (What else is wrong with it is torch's to say.)
    """
    states = checkpoint.get("optimizer_states", [])
    for i, (optimizer, saved) in enumerate(zip(optimizers, states, strict=False)):
        fresh = optimizer.state_dict()
        layouts = [[len(group["params"]) for group in state["param_groups"]] for state in (saved, fresh)]
        other = len(classes) == len(states) and classes[i] != type(optimizer).__name__
        if other and not restart:
            raise ValueError(
                f"HypergradientDescent: the saved state has optimizer={classes[i]!r}, now it is "
                f"{type(optimizer).__name__!r}: go on with the same, or start anew with on_mismatch='restart'"
            )
        if restart and (layouts[0] != layouts[1] or other):
            rank_zero_warn(
                "HypergradientDescent(on_mismatch='restart'): the checkpoint holds the state of another optimizer than "
                f"this {type(optimizer).__name__} with {len(layouts[1])} parameter groups, so it starts anew."
            )
            states[i] = fresh


def restore(engines: Sequence[HypergradientLR], saved: Sequence[dict[str, Any]], restart: bool) -> None:
    """Load the saved state of each engine.

    Args:
        engines: The engines.
        saved: Their states.
        restart: Whether to warn, rather than to raise, where a state is of something else.

    Raises:
        ValueError: A state is of something else.
    """
    errors = list[str]()
    if len(saved) != len(engines):
        errors = [
            f"the checkpoint holds HypergradientDescent's state of {len(saved)} optimizers, but configure_optimizers "
            f"returned {len(engines)} that can be tuned"
        ]
    for engine, state_dict in zip(engines, saved, strict=True) if not errors else ():
        try:
            engine.load_state_dict(state_dict)
        except ValueError as error:
            errors.append(f"{type(engine.optimizer).__name__}: {error}")
    if errors and not restart:
        raise ValueError(f"HypergradientDescent: {'; '.join(errors)}")
    for wrong in errors:
        rank_zero_warn(f"HypergradientDescent: tuning starts anew. {wrong}.")


def check_alone(kind: type[Callback], trainer: Trainer) -> None:
    """Raise :class:`RuntimeError` where the Trainer has two such callbacks."""
    count = sum(isinstance(callback, kind) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    if count > 1:
        raise RuntimeError(f"the Trainer has {count} {kind.__name__} callbacks, each for all optimizers: give it one")


def show_small_numbers(trainer: Trainer) -> None:
    """Let a RichProgressBar show three digits of a number that is below 0.001, unless it has a format of its own."""
    bar = trainer.progress_bar_callback
    theme = getattr(bar, "theme", None)
    if theme is not None and theme.metrics_format == ".3f":
        bar.theme = replace(theme, metrics_format=".3g")  # type: ignore[union-attr]


def axis(trainer: Trainer) -> int:
    """The step on the axis of ``self.log``.

    Lightning offers nothing public for it: ``global_step`` counts the steps of all optimizers, so that it differs in
    manual optimization. ``LearningRateMonitor`` reads the same attribute.
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
    # The axis stands still while gradients are accumulated.
    moves = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
    return bool(moves and every and (axis(trainer) + 1) % every == 0)


def with_groups(trainer: Trainer) -> list[Optimizer]:
    """The Trainer's optimizers that have parameters."""
    return [optimizer for optimizer in trainer.optimizers if optimizer.param_groups]


def check_tensors(optimizers: list[Optimizer]) -> None:
    """Raise :class:`ValueError` where two share a rate: each would take what the other learns for a written one."""
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
    """Raise :class:`TypeError` where the Trainer's strategy is not supported."""
    names = strategies(trainer)
    if not names & _SUPPORTED or names & _REFUSED:
        raise TypeError(
            f"HypergradientDescent does not support {type(trainer.strategy).__name__}: its dot products would see a "
            "part of the parameters only. Use strategy='ddp', 'fsdp', ModelParallelStrategy (fully_shard) or a single "
            "device"
        )


def check_modules(pl_module: LightningModule, optimizers: Sequence[Optimizer]) -> None:
    """Raise :class:`TypeError` where a module that one of these optimizers trains has sparse gradients."""
    trained = {p for optimizer in optimizers for settings in optimizer.param_groups for p in settings["params"]}
    for name, module in pl_module.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse and module.weight in trained:
            raise TypeError(
                f"module '{name}' has sparse gradients, which HypergradientDescent does not support: build it with "
                "sparse=False"
            )
