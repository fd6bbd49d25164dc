"""Optimizers whose step is not in proportion to their learning rate: found out early, and reported."""

import copy
import itertools
import random
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from lightning_hd import HypergradientLR
from tests.test_callback import same


class Simple(Optimizer):
    """What optimizers of others have in common: a class of their own, and its state."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})
        self.calls = 0  # what is not in the state must be copied as well

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.calls += 1
        for settings in self.param_groups:
            for p in settings["params"]:
                if p.grad is not None:
                    self.move(p, p.grad, settings["lr"], self.state[p])

    def move(self, p: Tensor, g: Tensor, lr: float, state: dict[str, Any]) -> None:
        p.sub_(g * lr / self.calls**0.5)


class Noisy(Simple):
    """As stochastic gradient Langevin dynamics, but for a noise that is in proportion to the rate."""

    def move(self, p: Tensor, g: Tensor, lr: float, state: dict[str, Any]) -> None:
        p.sub_(lr * (g + 0.1 * torch.randn_like(g)))


class DualAveraging(Simple):
    """Writes the parameters from the sum of all gradients."""

    def move(self, p: Tensor, g: Tensor, lr: float, state: dict[str, Any]) -> None:
        if not state:
            state.update(start=p.clone(), sum=torch.zeros_like(p))
        state["sum"].add_(g)
        p.copy_(state["start"] - lr * state["sum"])


class RateInMomentum(Simple):
    """Keeps moves, not gradients, in its momentum."""

    def move(self, p: Tensor, g: Tensor, lr: float, state: dict[str, Any]) -> None:
        state["v"] = 0.9 * state.get("v", torch.zeros_like(p)) - lr * g
        p.add_(state["v"])


class Squared(Simple):
    """Its step goes with the square of the rate."""

    def move(self, p: Tensor, g: Tensor, lr: float, state: dict[str, Any]) -> None:
        p.sub_(lr**2 * g)


class Hybrid(Optimizer):
    """Has another inside whose groups are copies: the rate of its own groups is never read."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})
        self.matrices = SGD([dict(settings) for settings in self.param_groups], lr=lr)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.matrices.step()


class Sharing(Optimizer):
    """Has another inside that has the same groups."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})
        self.base = AdamW([torch.zeros(1, requires_grad=True)], lr=lr)
        self.base.param_groups = self.param_groups
        for settings in self.param_groups:
            settings.update({**self.base.defaults, **settings})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.base.step()


def train(
    make: Callable[[Any], Optimizer], rule: Any, steps: int = 15, **arguments: Any
) -> tuple[nn.Module, list[str]]:
    """A small network, and the warnings that were given."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    x = torch.randn(64, 4)
    optimizer = make(network.parameters())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        HypergradientLR(optimizer, rule, **arguments)  # type: ignore[arg-type]
        for _ in range(steps):
            optimizer.zero_grad()
            (network(x) - x.sum(1, keepdim=True).sin()).square().mean().backward()
            optimizer.step()
    return network, [str(warning.message) for warning in caught]


@pytest.mark.parametrize("optimizer", [Simple, Noisy, Sharing])
@pytest.mark.parametrize("rule", ["additive", "auto"])
def test_nothing_is_said_of_steps_that_are_linear(optimizer: Any, rule: Any) -> None:
    assert train(optimizer, rule)[1] == []


@pytest.mark.parametrize("optimizer", [DualAveraging, RateInMomentum, Squared])
def test_steps_that_are_not_linear_are_reported_once_by_name(optimizer: Any) -> None:
    (told,) = train(optimizer, "additive")[1]
    assert f"HypergradientLR({optimizer.__name__}): its step is not linear in its learning rate" in told
    assert "rule='auto'" in told


def test_an_optimizer_that_idles_is_asked_once_it_moves() -> None:
    class Late(DualAveraging):
        def move(self, p: Tensor, g: Tensor, lr: float, state: dict[str, Any]) -> None:
            if self.calls > 6:
                super().move(p, g, lr, state)

    told = train(Late, "additive", steps=20)[1]
    assert sum("not linear" in words for words in told) == 1


@pytest.mark.parametrize("optimizer", [DualAveraging, RateInMomentum])
def test_auto_changes_slowly_where_a_change_moves_what_was_learned(optimizer: Any) -> None:
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(20))
    tuned = optimizer([w])
    hd = HypergradientLR(tuned)
    lrs = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(60):
            tuned.zero_grad()
            (w - 1).square().sum().backward()
            tuned.step()
            lrs += hd.lrs
    largest = max(abs(b / a - 1) for a, b in itertools.pairwise(lrs[10:]))
    assert (largest < 0.021) == (optimizer is DualAveraging)
    again = HypergradientLR(optimizer([w]))
    again.load_state_dict(hd.state_dict())  # it is not forgotten
    assert again.state_dict()["nonlinear"] == (optimizer is DualAveraging)


def test_a_rate_that_is_not_used_is_reported() -> None:
    (told,) = train(Hybrid, "additive")[1]
    assert "the rate that is reported is not used" in told
    assert "Tune the optimizer inside of it, SGD: its attribute 'matrices'" in told


@pytest.mark.parametrize("optimizer", [Simple, Noisy, DualAveraging, RateInMomentum, Hybrid, Sharing])
def test_looking_changes_nothing(optimizer: Any) -> None:
    def alone() -> tuple[nn.Module, Tensor]:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        x = torch.randn(64, 4)
        plain = optimizer(network.parameters())
        for _ in range(15):
            plain.zero_grad()
            (network(x) - x.sum(1, keepdim=True).sin()).square().mean().backward()
            plain.step()
        return network, torch.rand(1)

    before, number = alone()
    after, _ = train(optimizer, "additive", hypergrad_lr=0.0)
    assert torch.equal(number, torch.rand(1))
    assert same(before, after)


class Hooked(Simple):
    """Calls something of the user's after each step."""

    def __init__(self, params: Any, after: Callable[[], object]) -> None:
        super().__init__(params)
        self.after = after

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        self.after()


class Drawing(Simple):
    """Draws from all generators that there are."""

    def move(self, p: Tensor, g: Tensor, lr: float, state: dict[str, Any]) -> None:
        p.sub_(lr * g * (1 + 0.1 * (random.random() + np.random.rand() + float(torch.rand(())))))


class Weak(Simple):
    """Holds its parameters by weak references."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.known = [weakref.ref(p) for settings in self.param_groups for p in settings["params"]]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        with torch.no_grad():
            for known in self.known:
                known().mul_(0.999)  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["a function", "all generators", "weak references", "hooks of all optimizers"])
def test_looking_changes_nothing_that_the_optimizer_has_in_common_with_others(kind: str) -> None:
    calls = []
    handle = register_optimizer_step_post_hook(lambda *_: calls.append(1)) if kind.startswith("hooks") else None

    def train(tuned: bool) -> list[Any]:
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        network = nn.Linear(4, 2)
        x = torch.randn(16, 4)

        @torch.no_grad()
        def after() -> None:
            for p in network.parameters():
                p.mul_(0.999)

        optimizer: Optimizer
        if kind == "a function":
            optimizer = Hooked(network.parameters(), after)
        else:
            optimizer = {"all": Drawing, "weak": Weak, "hooks": Simple}[kind.split()[0]](network.parameters())
        if tuned:
            HypergradientLR(optimizer, "additive", hypergrad_lr=0.0)
        calls.clear()
        for _ in range(15):
            optimizer.zero_grad()
            network(x).square().mean().backward()
            optimizer.step()
        return [*network.parameters(), torch.rand(1), torch.tensor([random.random(), np.random.rand(), len(calls)])]

    try:
        assert all(torch.equal(a, b) for a, b in zip(train(False), train(True), strict=True))
    finally:
        if handle is not None:
            handle.remove()


def test_what_is_large_is_not_copied() -> None:
    class Holding(Simple):
        def __init__(self, params: Any) -> None:
            super().__init__(params)
            self.data = torch.zeros(2**21)

        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError

    assert train(Holding, "additive")[1] == []


def test_an_optimizer_that_cannot_be_copied_is_left_alone() -> None:
    class Holding(DualAveraging):
        def __init__(self, params: Any) -> None:
            super().__init__(params)
            self.lines = (number for number in [1])

    with pytest.raises(TypeError):
        copy.deepcopy(Holding([nn.Parameter(torch.ones(1))]).lines)
    assert train(Holding, "additive")[1] == []


@pytest.mark.parametrize("settings", [{"d": 1e-6, "d0": 1e-6}, {"d": 1e-6, "k": 0}, {"d": 1e-6}], ids=len)
@pytest.mark.parametrize("rule", ["auto", "additive"])
def test_an_optimizer_that_estimates_its_rate_is_named(rule: Any, settings: dict[str, float]) -> None:
    class Estimating(Simple):
        def __init__(self, params: Any) -> None:
            super().__init__(params)
            for group in self.param_groups:
                group.update(settings)

    told = train(Estimating, rule)[1]
    assert len(told) == 1
    assert "HypergradientLR(Estimating): this optimizer estimates its learning rate itself" in told[0]
