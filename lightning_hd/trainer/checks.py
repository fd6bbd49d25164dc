"""Checks of the callback's own arguments, and of a Trainer, its optimizers and its modules."""

from collections.abc import Sequence

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_hd.checks import check_count, check_flag, class_names
from lightning_hd.optimizers import check_optimizer

_SUPPORTED = {"SingleDeviceStrategy", "DDPStrategy", "FSDPStrategy", "ModelParallelStrategy"}
_REFUSED = {"DeepSpeedStrategy", "XLAStrategy", "SingleDeviceXLAStrategy"}  # though they are subclasses of the former
"""Strategies go by their names, because the package ``pytorch_lightning`` has its own classes of these names."""


def check_own_arguments(
    rule: object, log_every_n_steps: int | None, prog_bar: bool, on_mismatch: str, summary: bool, warm_start: bool
) -> None:
    """Check the arguments that only the callback has, and that its first one is no optimizer.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range.
    """
    if isinstance(rule, Optimizer):
        raise TypeError(
            f"rule must be a rule, got the optimizer {type(rule).__name__}: HypergradientDescent() tunes all of "
            "a Trainer's optimizers. In a loop of your own, use HypergradientLR(optimizer)"
        )
    if log_every_n_steps is not None:
        check_count("log_every_n_steps", log_every_n_steps)
    check_flag("prog_bar", prog_bar)
    check_flag("summary", summary)
    check_flag("warm_start", warm_start)
    if not isinstance(on_mismatch, str) or on_mismatch not in ("error", "restart"):
        raise ValueError(f"on_mismatch must be 'error' or 'restart', got {on_mismatch!r}")


def check_alone(kind: type[Callback], trainer: Trainer) -> None:
    """Raise ``RuntimeError`` if the Trainer has several such callbacks."""
    found = [type(callback).__name__ for callback in trainer.callbacks if isinstance(callback, kind)]  # type: ignore[attr-defined]
    if len(found) > 1:
        raise RuntimeError(
            f"the Trainer has {len(found)} {kind.__name__} callbacks ({', '.join(found)}): keep one of them, which "
            "tunes all optimizers"
        )


def strategies(trainer: Trainer) -> set[str]:
    """The names of the strategy's class and of its base classes."""
    return class_names(trainer.strategy)


def check_strategy(trainer: Trainer) -> None:
    """Raise ``TypeError`` if the Trainer's strategy is not supported."""
    names = strategies(trainer)
    if not names & _SUPPORTED or names & _REFUSED:
        raise TypeError(
            f"HypergradientDescent does not support {type(trainer.strategy).__name__}: its dot products would see a "
            "part of the parameters only. Use strategy='ddp' or 'fsdp', ModelParallelStrategy (fully_shard) or a "
            "single device"
        )


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


def check_tensors(optimizers: Sequence[Optimizer]) -> None:
    """Raise ``ValueError`` if two optimizers share a rate: each would take what the other learns for a written rate."""
    seen = set[int]()
    for optimizer in optimizers:
        own = {id(group["lr"]) for group in optimizer.param_groups if isinstance(group["lr"], Tensor)}
        if own & seen:
            raise ValueError(
                f"two optimizers share one lr tensor, the second of them {type(optimizer).__name__}: give each its "
                "own, as in lr=torch.tensor(...)"
            )
        seen |= own


def check_modules(pl_module: LightningModule, optimizers: Sequence[Optimizer]) -> None:
    """Raise ``TypeError`` if one of these optimizers trains a module with sparse gradients."""
    trained = {p for optimizer in optimizers for settings in optimizer.param_groups for p in settings["params"]}
    for name, module in pl_module.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse and module.weight in trained:
            raise TypeError(
                f"module '{name}' has sparse gradients, which HypergradientDescent does not support: build it with "
                "sparse=False"
            )
