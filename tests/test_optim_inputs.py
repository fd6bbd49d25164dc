"""Every optimizer of torch.optim, with the inputs of torch's own tests: a rule that does nothing changes no bit."""

import copy
import inspect
import sys
import unittest
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_hd import HypergradientLR
from tests.distributed.processes import run

STEPS = 3
REFUSED = ("LBFGS", "Rprop", "SparseAdam")
CLASSES: dict[str, Any] = {
    name: cls
    for name, cls in vars(torch.optim).items()
    if inspect.isclass(cls) and issubclass(cls, Optimizer) and cls is not Optimizer
}
IMPLEMENTATIONS = {
    "loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "differentiable": {"differentiable": True},
}
VARIATIONS = ("plain", "tensor lr", "maximize", "complex", "closure", "two groups")
Inputs: TypeAlias = dict[str, list[tuple[str, dict[str, Any]]]]
Numbers: TypeAlias = dict[str, Any]


def read_inputs() -> Inputs:
    """What torch publishes nowhere but in a private module of its own tests.

    It is imported in another process, because it sets flags of torch and of hypothesis. It needs expecttest only for a
    class that is not used here.
    """
    stand_in: Any = ModuleType("expecttest")
    stand_in.TestCase = unittest.TestCase
    sys.modules["expecttest"] = stand_in
    from torch.testing._internal import common_optimizers

    known: Any = common_optimizers.optim_db
    return {info.optim_cls.__name__: [(i.desc, i.kwargs) for i in info.optim_inputs_func("cpu")] for info in known}


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    (known,) = run(read_inputs, 1)
    assert not isinstance(known, Exception), known
    return known  # type: ignore[no-any-return]


def implementations(cls: Any) -> list[str]:
    """Those that the constructor has an argument for; an optimizer without any has a loop only."""
    offered = inspect.signature(cls).parameters
    return [name for name, flags in IMPLEMENTATIONS.items() if offered.keys() >= flags.keys()] or ["loop"]


def is_slow(cls: Any, implementation: str, variation: str) -> bool:
    """Loops are tested with each variation; of the others each by default with two, in turn."""
    i, j = implementations(cls).index(implementation), VARIATIONS.index(variation)
    return i > 0 and (i + j) % 3 != 0


CASES = [
    pytest.param(
        name,
        implementation,
        variation,
        id=f"{name}-{implementation}-{variation}",
        marks=pytest.mark.slow if is_slow(cls, implementation, variation) else (),
    )
    for name, cls in CLASSES.items()
    if name not in REFUSED
    for implementation in implementations(cls)
    for variation in VARIATIONS
]


def start(name: str, implementation: str, variation: str, kwargs: dict[str, Any]) -> Optimizer:
    """An optimizer as that test wants it; it raises where torch does not offer that."""
    cls = CLASSES[name]
    offered = inspect.signature(cls).parameters
    settings = copy.deepcopy(kwargs)
    settings |= {key: value for key, value in IMPLEMENTATIONS[implementation].items() if key in offered}
    if variation == "tensor lr":
        settings["lr"] = torch.as_tensor(settings.get("lr", 0.01), dtype=torch.float32).clone()
    if variation == "maximize":
        settings["maximize"] = True
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (3, 5), (2, 2)] if name == "Muon" else [(4, 3), (5,), (2, 2)]
    dtype = torch.complex64 if variation == "complex" else torch.float32
    params = [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]
    if implementation == "differentiable":
        params = [p.clone() for p in params]  # torch differentiates such steps for parameters that are no leaves
    if variation == "two groups":
        return cls([{"params": params[:1]}, {"params": params[1:], "lr": 0.037}], **settings)  # type: ignore[no-any-return]
    return cls(params, **settings)  # type: ignore[no-any-return]


def loss_with_gradients(optimizer: Optimizer, step: int) -> Tensor:
    """The loss of a step; its gradients are set, for a parameter that is no leaf gets none from autograd."""
    generator = torch.Generator().manual_seed(100 + step)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    leaves = [p.detach().clone().requires_grad_() for p in params]
    differences = [p - torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in leaves]
    loss = torch.stack([(difference * difference.conj()).real.sum() for difference in differences]).sum()
    for p, gradient in zip(params, torch.autograd.grad(loss, leaves), strict=True):
        p.grad = gradient
    return loss.detach()


def train(optimizer: Optimizer, with_closure: bool) -> None:
    take_step: Callable[..., Any] = optimizer.step
    for step in range(STEPS):
        if with_closure:
            take_step(partial(loss_with_gradients, optimizer, step))
        else:
            loss_with_gradients(optimizer, step)
            take_step()


def frozen(value: Any) -> Any:
    """What can be compared bit for bit."""
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.detach().resolve_conj().numpy().tobytes()
    return value


def numbers(optimizer: Optimizer) -> Numbers:
    """All that an optimizer has made: its parameters, their states, and what is in its groups."""
    found: Numbers = {}
    for i, group in enumerate(optimizer.param_groups):
        found |= {f"group {i}, {key}": frozen(value) for key, value in group.items() if key != "params"}
        for j, p in enumerate(group["params"]):
            found[f"group {i}, parameter {j}"] = frozen(p)
            found |= {f"group {i}, {key} of {j}": frozen(value) for key, value in optimizer.state[p].items()}
    return found


def test_torch_has_inputs_for_every_optimizer(inputs: Inputs) -> None:
    assert inputs.keys() == CLASSES.keys()
    assert all(inputs.values())


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_rate_to_tune_is_refused_with_all_inputs(name: str, inputs: Inputs) -> None:
    for _, kwargs in inputs[name]:
        optimizer = CLASSES[name]([torch.zeros(2, 2, requires_grad=True)], **copy.deepcopy(kwargs))
        with pytest.raises(TypeError, match=name):
            HypergradientLR(optimizer, rule="additive", hypergrad_lr=0.0)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(("name", "implementation", "variation"), CASES)
def test_a_rule_that_does_nothing_changes_nothing(
    name: str, implementation: str, variation: str, inputs: Inputs
) -> None:
    refusals, differences = [], []
    for description, kwargs in inputs[name]:
        try:
            alone = start(name, implementation, variation, kwargs)
            train(alone, variation == "closure")
        except Exception as error:  # torch has no common error for what it does not offer
            refusals.append(f"{description}: {error}")
            continue
        tuned = start(name, implementation, variation, kwargs)
        hd = HypergradientLR(tuned, rule="additive", hypergrad_lr=0.0)
        train(tuned, variation == "closure")
        assert hd.step_count == STEPS
        expected, got = numbers(alone), numbers(tuned)
        assert expected.keys() == got.keys()
        differences += [f"{description}: {key}" for key, value in expected.items() if got[key] != value]
    assert not differences
    if len(refusals) == len(inputs[name]):
        pytest.skip(f"torch refuses it: {refusals[0]}")
