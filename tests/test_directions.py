"""Directions against autograd through a differentiable step, and against finite differences of real steps."""

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

from lightning_hd import HypergradientLR, Observation
from lightning_hd.hypergradient.directions import Direction, direction_of
from lightning_hd.optimizers import is_coupled

LR = 0.02
CLASSES = {
    name: cls
    for name, cls in vars(torch.optim).items()
    if inspect.isclass(cls) and issubclass(cls, Optimizer) and cls is not Optimizer
}
REFUSED = {"LBFGS", "Rprop", "SparseAdam"}


@pytest.fixture(autouse=True)
def _double_precision() -> Iterator[None]:
    """Torch keeps step counts, and bias corrections made of them, in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class SignDescent(Optimizer):
    """An optimizer that the package has never seen."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if not state:  # as many optimizers do: nothing else may be in the state before its own
                        state["mean"] = torch.zeros_like(p)
                    state["mean"].lerp_(p.grad, 0.1)
                    p.mul_(1 - 0.1 * group["lr"]).add_(state["mean"].sign() + p.grad, alpha=-group["lr"])
        return loss


class CautiousAdam(Adam):
    """A subclass of a known class that steps otherwise, and calls its parent's step."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        before = [p.clone() for group in self.param_groups for p in group["params"]]
        loss: float | None = super().step(closure)
        for p, old in zip((p for group in self.param_groups for p in group["params"]), before, strict=True):
            p.copy_(old + 0.5 * (p - old))
        return loss


def parameters() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 4), (3, 6)]
    return [(0.5 * torch.randn(s, generator=generator, dtype=torch.float64)).requires_grad_() for s in shapes]


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(8, 4, generator=generator, dtype=torch.float64)
    return x, torch.sin(x[:, :3]) + 0.3 * torch.randn(8, 3, generator=generator, dtype=torch.float64)


def loss_of(params: list[Tensor], step: int) -> Tensor:
    x, y = batch(step)
    return ((torch.tanh(x @ params[0].T) @ params[1].T - y) ** 2).mean()


def objective(optimizer: Optimizer, params: list[Tensor], step: int) -> Tensor:
    """What the optimizer minimizes: L2 weight decay is part of it, and it is minus the loss under maximize."""
    group = optimizer.param_groups[0]
    value = loss_of(params, step)
    if group.get("maximize"):
        value = -value
    if is_coupled(optimizer, group):
        value = value + 0.5 * group.get("weight_decay", 0.0) * sum((p**2).sum() for p in params)
    return value


def cases() -> Iterator[Any]:
    for name, cls in CLASSES.items():
        if name in REFUSED:
            continue
        offered = inspect.signature(cls).parameters
        switches: list[list[dict[str, Any]]] = [
            [{}, {"weight_decay": 0.1}] if "weight_decay" in offered else [{"weight_decay": 0.0}],
            [{}, {"maximize": True}] if "maximize" in offered else [{}],
            [{}, {"amsgrad": True}] if "amsgrad" in offered else [{}],
            [{}, {"decoupled_weight_decay": True}] if "decoupled_weight_decay" in offered else [{}],
            [{}, {"centered": True, "momentum": 0.9}] if "centered" in offered else [{}],
        ]
        if cls is SGD:
            switches.append(
                [
                    {},
                    {"momentum": 0.9},
                    {"momentum": 0.9, "dampening": 0.3},
                    {"momentum": 0.9, "nesterov": True},
                ]
            )
        for chosen in itertools.product(*switches):
            settings = {key: value for switch in chosen for key, value in switch.items()}
            yield pytest.param(cls, settings, id=f"{name}-{settings}")


CASES = list(cases())
# The others refuse a tensor learning rate in their differentiable step, or cut its graph.
AUTOGRAD_CASES = [case for case in CASES if case.values[0].__name__ in {"SGD", "Adam", "AdamW", "NAdam", "RAdam"}]  # type: ignore[attr-defined]


class LoudSGD(SGD):
    """A subclass that steps as its parent does."""


OTHERS = [
    pytest.param(LoudSGD, {"momentum": 0.9, "weight_decay": 0.1}, id="subclass with its parent's step"),
    pytest.param(SignDescent, {}, id="unseen class"),
    pytest.param(CautiousAdam, {"weight_decay": 0.1}, id="subclass that calls its parent"),
]


def backward(params: list[Tensor], step: int) -> None:
    for p in params:
        p.grad = None
    loss_of(params, step).backward()


def derivative_by_autograd(optimizer: Optimizer, settings: dict[str, Any], step: int) -> float:
    """D objective_{step+1} / d lr through the real differentiable step, of a copy of everything."""
    lr = torch.tensor(LR, dtype=torch.float64, requires_grad=True)
    params = optimizer.param_groups[0]["params"]
    copies = [p.detach().clone().requires_grad_().clone() for p in params]
    twin = type(optimizer)(copies, lr=lr, differentiable=True, **settings)  # type: ignore[call-arg]
    for p, c in zip(params, copies, strict=True):
        c.grad = p.grad.clone()
        own = {key: value for key, value in optimizer.state.get(p, {}).items() if not key.startswith("hd_")}
        if own:
            twin.state[c].update(copy.deepcopy(own))
    twin.step()
    (derivative,) = torch.autograd.grad(objective(twin, copies, step + 1), lr)
    return float(derivative)


def derivative_by_difference(optimizer: Optimizer, settings: dict[str, Any], step: int, lr: float) -> float:
    """The same, from two real steps with rates a little above and below."""
    eps = 1e-5
    values = []
    for rate in (lr + eps, lr - eps):
        params = [p.detach().clone().requires_grad_() for p in optimizer.param_groups[0]["params"]]
        twin = type(optimizer)(params, lr=1.0, **settings)  # type: ignore[call-arg]
        twin.param_groups[0]["lr"] = rate
        for p, c in zip(optimizer.param_groups[0]["params"], params, strict=True):
            c.grad = p.grad.clone()
            own = {key: value for key, value in optimizer.state.get(p, {}).items() if not key.startswith("hd_")}
            if own:
                twin.state[c].update(copy.deepcopy(own))
        twin.step()
        values.append(float(objective(twin, params, step + 1)))
    return (values[0] - values[1]) / (2 * eps)


def test_a_subclass_with_its_parents_step_needs_no_copy() -> None:
    SGD([torch.ones(1)], lr=0.1)  # torch wraps the steps of classes that are instantiated, in either order
    for _ in range(2):
        optimizer = LoudSGD([torch.ones(1)], lr=0.1, momentum=0.9)
        assert type(direction_of(optimizer, optimizer.param_groups[0], 0.1)).__name__ == "HeavyBall"
    own = CautiousAdam([torch.ones(1)])
    assert type(direction_of(own, own.param_groups[0], 0.1)).__name__ == "Measured"


@pytest.mark.parametrize("saved", [{}, {"family": "Guess"}, {"family": "Measured"}, {"family": "HeavyBall", "lr": 1}])
def test_what_is_no_saved_direction_is_refused(saved: dict[str, Any]) -> None:
    with pytest.raises(KeyError, match=r"family|Guess|lr|momentum"):
        Direction.from_dict(saved)


def observed(hd: HypergradientLR) -> Observation:
    (seen,) = hd.last
    assert seen is not None
    return seen


def check_hypergradients(
    optimizer: Optimizer, hd: HypergradientLR, steps: int, derivative: Callable[[int], float], tolerance: float
) -> None:
    """Each step's hypergradient is the derivative of its objective with respect to the rate of the step before."""
    params = optimizer.param_groups[0]["params"]
    expected = None
    for step in range(steps):
        backward(params, step)
        following = derivative(step)
        optimizer.step()
        if expected is not None:
            assert observed(hd).hypergradient == pytest.approx(expected, rel=tolerance)
        expected = following


@pytest.mark.parametrize(("cls", "settings"), AUTOGRAD_CASES)
def test_hypergradient_is_the_autograd_derivative_of_the_next_loss(cls: Any, settings: dict[str, Any]) -> None:
    optimizer = cls(parameters(), lr=LR, **settings)
    hd = HypergradientLR(optimizer, rule="additive", hypergrad_lr=0)
    check_hypergradients(optimizer, hd, 6, lambda step: derivative_by_autograd(optimizer, settings, step), 1e-6)


@pytest.mark.parametrize(("cls", "settings"), [*CASES, *OTHERS])
@pytest.mark.parametrize("lr", [LR, 0.0])
def test_hypergradient_is_the_finite_difference_of_the_next_loss(cls: Any, settings: dict[str, Any], lr: float) -> None:
    optimizer = cls(parameters(), lr=lr, **settings)
    hd = HypergradientLR(optimizer, rule="additive", hypergrad_lr=0)
    # ASGD moves by a rate that it made of the learning rate one step ahead: only its first step follows it at once.
    steps = 2 if cls is torch.optim.ASGD else 6
    check_hypergradients(
        optimizer, hd, steps, lambda step: derivative_by_difference(optimizer, settings, step, lr), 1e-6
    )
    if lr == 0:
        for p, initial in zip(optimizer.param_groups[0]["params"], parameters(), strict=True):
            assert torch.equal(p, initial)


@pytest.mark.filterwarnings("ignore:.*has lost the last direction")
@pytest.mark.parametrize("reset", [False, True])
def test_adams_own_count_of_its_steps_counts(reset: bool) -> None:
    optimizer = Adam(parameters(), lr=LR)
    hd = HypergradientLR(optimizer, rule="additive", hypergrad_lr=0)

    def derivative(step: int) -> float:
        return derivative_by_difference(optimizer, {}, step, LR)

    check_hypergradients(optimizer, hd, 4, derivative, 1e-6)
    hd.paused = True
    for step in range(3):
        backward(optimizer.param_groups[0]["params"], step)
        optimizer.step()
    hd.paused = False
    if reset:
        optimizer.state.clear()
    check_hypergradients(optimizer, hd, 4, derivative, 1e-6)
