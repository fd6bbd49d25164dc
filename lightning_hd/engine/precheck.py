"""Checks before the first step: whether it is a step at all, and whether all processes have the same settings."""

import gc
import inspect
from typing import Any

import torch
from torch import Tensor
from torch.distributed.algorithms.join import Join
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_hd.checks import save_fields
from lightning_hd.engine.rates import Rates
from lightning_hd.hypergradient import View
from lightning_hd.optimizers import check_gradients, device_of, get_lr, parameters_of
from lightning_hd.processes import Ranks, is_flat_shard, local
from lightning_hd.rules import Rule


def is_dry(optimizer: Optimizer, ranks: Ranks, fresh: bool) -> bool:
    """Whether this is the dry step by which ``torch.distributed.checkpoint`` makes an optimizer's state.

    In a dry step all rates and all gradients are 0. It comes before the first step, or while there is no state.
    One rank may take it alone, unless the parameters are sharded.

    Args:
        optimizer: The optimizer.
        ranks: The processes that train together.
        fresh: Whether no step was taken yet.
    """
    live = _has_rate(optimizer)
    sharded = (fresh or not live) and any(isinstance(p, DTensor) for p in parameters_of(optimizer))
    if live and not sharded:
        return False
    live = live or _has_gradient(optimizer)
    if sharded:
        live = bool(ranks.sum(torch.tensor(float(live), device=device_of(optimizer))).item())
    return not live


def _has_rate(optimizer: Optimizer) -> bool:
    try:
        return any(map(get_lr, optimizer.param_groups))
    except (RuntimeError, TypeError, ValueError):  # a later check raises a clear error
        return True


def _has_gradient(optimizer: Optimizer) -> bool:
    """Whether a gradient is not 0. Without any gradient it is an ordinary step, which does not count."""
    gradients = [p.grad for p in parameters_of(optimizer) if p.grad is not None]
    if not gradients:
        return any(p.requires_grad for p in parameters_of(optimizer))
    return any(g.layout != torch.strided or bool(local(g).any()) for g in gradients)


def check(rates: Rates, rule: Rule, view: View, ranks: Ranks, name: str, others: dict[str, Any]) -> None:
    """Raise what would fail later, with a clear error. All ranks raise if their settings differ.

    Args:
        rates: The rates.
        rule: The rule.
        view: The view.
        ranks: The processes that train together.
        name: What errors begin with.
        others: Other settings, by the words for them.

    Raises:
        TypeError, ValueError: A rate or a gradient is out of order.
        RuntimeError: The settings of the processes differ, or they are within ``DistributedDataParallel.join()``.
    """
    optimizer, error = rates.optimizer, None
    try:
        rates.read()
        check_gradients(optimizer)
    except (TypeError, ValueError) as wrong:
        error = wrong
    if ranks.count > 1:
        _check_joins(optimizer)
        groups = optimizer.param_groups
        shapes = [["a flat shard" if is_flat_shard(p) else tuple(p.shape) for p in g["params"]] for g in groups]
        learned = [[save_fields(scope, ("rule", "last")), scope.rule.state_dict()] for scope in rates.scopes]
        mine = {
            "error": error and repr(error),
            "optimizer": type(optimizer).__name__,
            "rule": _plain((type(rule).__name__, vars(rule))),
            "scope": rates.kind,
            "min_lr, max_lr": rates.limits,
            "scheduled": rates.is_scheduled(),
            "probe": view.budget,
            **others,
            "lrs": [str(group["lr"]) if error else get_lr(group) for group in groups],
            "shapes of parameters": shapes,
            "what was learned": _plain(learned),
        }
        _compare(ranks.gather(mine), name)
    if error is not None:
        raise error


def _compare(everyone: list[dict[str, Any]], name: str) -> None:
    for rank, other in enumerate(everyone):
        for key, value in other.items():
            if value != everyone[0][key]:
                raise RuntimeError(
                    f"{name}: the settings of the processes differ: {key} is {everyone[0][key]} on "
                    f"rank 0 and {value} on rank {rank}. Models that train apart need a HypergradientLR with a "
                    "process_group each"
                )


def _check_joins(optimizer: Optimizer) -> None:
    """Raise ``RuntimeError`` within a ``DistributedDataParallel.join()`` of a model with these parameters.

    A process that has run out of data takes part in the collectives of the model only. Ours would wait for it
    forever.
    """
    trained = set(parameters_of(optimizer))
    # torch has no public way to ask whether such a context is open, nor for which models. So this looks at all
    # objects, once. It asks for their types: `isinstance` would ask weak proxies, whose objects may be gone.
    for join in (thing for thing in gc.get_objects() if issubclass(type(thing), Join)):
        ends_all = join._throw_on_early_termination or not join._enable
        models = [model for model in join._joinables if isinstance(model, DistributedDataParallel)]
        if not ends_all and any(p in trained for model in models for p in model.parameters()):
            raise RuntimeError(
                "DistributedDataParallel.join() is not supported: a process that has run out of data takes no part "
                "in the sums for the learning rate. Give all processes as many batches (a DistributedSampler "
                "does), or call join(throw_on_early_termination=True)"
            )


def _plain(value: Any) -> Any:
    """A value that can be compared between processes: tensors as numbers, functions as names, objects as classes."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Tensor):
        return value.tolist()
    if inspect.isfunction(value):
        return value.__qualname__
    return value if isinstance(value, (int, float, str, type(None))) else type(value).__name__
