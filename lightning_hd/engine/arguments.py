"""Checks the arguments of the public classes, and builds the objects that they stand for."""

import math

from torch.optim import Optimizer

from lightning_hd.checks import check_count, check_flag, check_number
from lightning_hd.engine.cooldown import Cooldown
from lightning_hd.optimizers import has_scheduler, is_marked, parameters_of, unwrap
from lightning_hd.processes import Notices, is_flat_shard
from lightning_hd.rules import Rule, make_rule

_PART = 0.2
"""The default length of the cooldown, as a part of the run. The noise of the gradient averages out within a fifth, and
the steps before it learn as much as without a cooldown."""


def check_arguments(
    rule: Rule | str,
    hypergrad_lr: float | None,
    scope: str,
    min_lr: float | None,
    max_lr: float | None,
    probe: int | str | None,
    stop_after: int | None,
    scheduled: bool | None,
) -> tuple[Rule, float, float]:
    """Check the arguments that both public classes have.

    Returns:
        The rule, and the lower and the upper clamp on the rates (infinite where there is none).

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range.
    """
    if not isinstance(scope, str) or scope not in ("global", "group"):
        raise ValueError(f"scope must be 'global' or 'group', got {scope!r}")
    low = -math.inf if min_lr is None else check_number("min_lr", min_lr)
    high = math.inf if max_lr is None else check_number("max_lr", max_lr)
    if high <= 0 == low:
        raise ValueError(f"max_lr must be above 0, got {max_lr!r} (or pass min_lr=None, for rates below 0)")
    if low > high:
        raise ValueError(f"min_lr must not be above max_lr, got min_lr={min_lr!r} and max_lr={max_lr!r}")
    if isinstance(probe, str) and probe != "default":
        raise ValueError(f"probe must be a whole number, None for all coordinates, or 'default', got {probe!r}")
    if not isinstance(probe, str) and probe is not None and check_count("probe", probe) == 0:
        raise ValueError("probe must be at least 1, or None for all coordinates, got 0")
    if scheduled is not None:
        check_flag("scheduled", scheduled)
    made = make_rule(rule, hypergrad_lr)
    if stop_after is not None and check_count("stop_after", stop_after) == 0 and made.picks_start:
        raise ValueError("stop_after must be at least 1 with a rule that picks its first rate, got 0")
    return made, low, high


def make_cooldown(part: float | str, total: int | None, rule: Rule) -> Cooldown:
    """Build the cooldown from the arguments ``cooldown`` and ``total_steps``.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range.
    """
    if isinstance(part, str) and part != "default":
        raise ValueError(f"cooldown must be a number from 0 to 1, or 'default', got {part!r}")
    if isinstance(part, str):
        part = _PART if rule.long_horizon else 0.0
    if total is not None and check_count("total_steps", total) == 0:
        raise ValueError("total_steps must be at least 1, or None where it is not known, got 0")
    return Cooldown(check_number("cooldown", part, 0.0, 1.0), total)


def check_shards(optimizer: Optimizer, rule: Rule) -> None:
    """Raise ``TypeError`` for flat shards if the rule needs the last direction, and for shards without a mesh."""
    # torch marks shards of tensor parallelism so where DistributedDataParallel has made plain tensors of them. It has
    # no public name for that.
    if any(hasattr(p, "_st_info") for p in parameters_of(optimizer)):
        raise TypeError(
            "DistributedDataParallel or FullyShardedDataParallel over tensor parallelism is not supported: use "
            "torch.distributed.fsdp.fully_shard on a mesh of two dimensions"
        )
    flat = any(map(is_flat_shard, parameters_of(optimizer)))
    if flat and not rule.long_horizon:
        raise TypeError(
            f"rule {type(rule).__name__} does not support FullyShardedDataParallel: use rule='auto', or shard the "
            "model with torch.distributed.fsdp.fully_shard"
        )


def warn_of_marks(optimizer: Optimizer, total_steps: int | None, notices: Notices) -> None:
    """Warn if the length of the run has no effect, because the optimizer itself has left a mark like a scheduler's."""
    alone = (
        is_marked(optimizer.param_groups) and not has_scheduler(optimizer, unwrap(optimizer)) and not optimizer.state
    )
    if alone and total_steps is not None:
        notices.warn(
            "marks",
            "its groups hold initial_lr, so their rates count as a schedule, and there is no cooldown. If there is no "
            f"scheduler, pass {notices.owner}(scheduled=False), and scheduled=True if there is one",
        )
