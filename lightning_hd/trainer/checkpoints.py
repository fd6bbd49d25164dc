"""Takes up the state of a checkpoint: checks that it fits, and loads it into the engines."""

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from lightning_hd.optimizers import get_lrs, set_lr, unwrap
from lightning_hd.trainer.attachment import Attachment

_WAY_OUT = "To start tuning anew, pass on_mismatch='restart'"


def check_saved(state: Any) -> None:
    """Raise ``ValueError`` if a checkpoint's state of the callback is damaged."""
    parts = state if isinstance(state, dict) else {}
    if not isinstance(parts.get("optimizers"), list) or not isinstance(parts.get("suggestion", {}), dict):
        raise ValueError("the checkpoint's state of HypergradientDescent is damaged: it lacks what the engines learned")


def configured_rates(optimizers: Sequence[Optimizer]) -> dict[int, list[float]]:
    """The rates in the groups of each optimizer, by its id. Optimizers with something else than rates are left out."""
    rates = {}
    for optimizer in map(unwrap, optimizers):
        with contextlib.suppress(KeyError, TypeError, ValueError, RuntimeError):
            rates[id(optimizer)] = get_lrs(optimizer.param_groups)
    return rates


def guard_states(optimizers: Sequence[Optimizer], classes: Sequence[str], restart: bool) -> contextlib.ExitStack:
    """Check that states belong to their optimizers when these load them from a checkpoint.

    Args:
        optimizers: The optimizers.
        classes: The class names of the optimizers in the checkpoint.
        restart: Whether to warn and start an optimizer anew if its state is another's. Otherwise ``ValueError`` is
            raised.

    Returns:
        What removes the checks when it is closed.
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

    guards = contextlib.ExitStack()
    for optimizer, saved_class in zip(optimizers, classes, strict=False):
        if isinstance(optimizer, Optimizer):
            hook = partial(check, saved_class)
            guards.enter_context(optimizer.register_load_state_dict_pre_hook(hook, prepend=True))
    return guards


def restore(
    attachment: Attachment,
    saved: dict[str, Any],
    configured: dict[int, list[float]],
    *,
    restart: bool,
    warm_start: bool = False,
) -> None:
    """Load the saved state of each engine.

    Args:
        attachment: The engines and their recorders.
        saved: The state of the callback.
        configured: The rates that the groups of each optimizer were configured with, by its id.
        restart: Whether to warn and start from these rates if a state does not fit. Otherwise ``ValueError`` is raised.
        warm_start: Whether the state is that of another training.

    Raises:
        ValueError: A state does not fit.
    """
    engines, states = attachment.engines, saved["optimizers"]
    errors, failed = list[str](), list(range(len(engines)))
    if len(states) != len(engines):
        errors = [
            f"there is a saved state of {len(states)} optimizers, but configure_optimizers "
            f"returned {len(engines)} that can be tuned"
        ]
    for i, (engine, state_dict) in enumerate(zip(engines, states, strict=True) if not errors else ()):
        try:
            engine.load_state_dict(state_dict, warm_start=warm_start)
            failed.remove(i)
        except ValueError as error:
            errors.append(f"{type(engine.optimizer).__name__}: {error}")
    if errors and not restart:
        raise ValueError(f"HypergradientDescent: {'; '.join(errors)}. {_WAY_OUT}")
    for engine in (engines[i] for i in failed if not engines[i].scheduled):
        lrs = configured.get(id(engine.optimizer), [])
        for settings, lr in zip(engine.optimizer.param_groups, lrs, strict=False):
            set_lr(settings, lr)
    for wrong in errors:
        rank_zero_warn(f"HypergradientDescent: tuning starts anew. {wrong}.")
    for recorder, names in zip(attachment.recorders, saved.get("names", []), strict=False):
        recorder.go_on(names)
