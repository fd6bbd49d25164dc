"""Steps that the engine cannot see, or must not tune: reported, or refused before anything has moved."""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_hd import HypergradientLR

RULES = ["auto", "additive"]


def backward(w: nn.Parameter) -> Tensor:
    loss = (w - 1).square().sum()
    loss.backward()
    return loss


def go_without_a_step(w: nn.Parameter) -> None:
    """Thirty gradients that come and go."""
    for _ in range(30):
        w.grad = None
        backward(w)


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_that_come_and_go_without_a_step_are_reported_once(to_none: bool) -> None:
    w = nn.Parameter(torch.zeros(3))
    optimizer = SGD([w], lr=0.1)
    HypergradientLR(optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(30 if to_none else 1100):
            optimizer.zero_grad(set_to_none=to_none)
            backward(w)
            with torch.no_grad():
                w.sub_(0.1)
    (told,) = caught
    assert "HypergradientLR(SGD): gradients came and went, but no step was seen" in str(told.message)


def test_nothing_is_said_where_gradients_are_accumulated_or_the_engine_is_gone() -> None:
    w = nn.Parameter(torch.zeros(3))
    optimizer = SGD([w], lr=0.1)
    hd = HypergradientLR(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(64):
            backward(w)  # into one tensor
        optimizer.step()
        for _ in range(50):
            optimizer.zero_grad()
            backward(w)
        hd.detach()
        HypergradientLR(optimizer).detach()
        for _ in range(50):
            optimizer.zero_grad()
            backward(w)
    assert not w._post_accumulate_grad_hooks  # type: ignore[attr-defined]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda hd: pickle.loads(pickle.dumps(hd))])
def test_a_copy_watches_nothing(duplicate: Callable[[Any], HypergradientLR]) -> None:
    w = nn.Parameter(torch.zeros(3))
    w.register_post_accumulate_grad_hook(lambda p: None)  # a handle holds all hooks, and pickle refuses this one
    hd = HypergradientLR(SGD([w], lr=0.1))
    backward(w)
    other = duplicate(hd)
    assert other._hooks is not None
    (copied,) = other._optimizer.param_groups[0]["params"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        go_without_a_step(copied)
    with pytest.warns(RuntimeWarning, match="no step was seen"):
        go_without_a_step(w)


class Sam(Optimizer):
    """Sharpness-aware: in every so many steps it moves the parameters before it evaluates the closure."""

    def __init__(self, params: Any, lr: float = 0.05, period: int = 1, first: int = 1) -> None:
        super().__init__(params, {"lr": lr})
        self.count, self.period, self.first = 0, period, first

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.count += 1
        away = self.count >= self.first and (self.count - self.first) % self.period == 0
        (w,) = self.param_groups[0]["params"]
        before = w.clone()
        if away:
            w.add_(0.01)
        with torch.enable_grad():
            loss = closure()
        w.copy_(before)
        w.sub_(w.grad, alpha=self.param_groups[0]["lr"])
        return loss


def run(optimizer: Optimizer, w: nn.Parameter, steps: int) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        return backward(w)

    for _ in range(steps):
        optimizer.step(closure)  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", RULES)
def test_an_optimizer_that_moves_first_is_refused_and_its_parameters_are_as_they_were(rule: Any) -> None:
    w = nn.Parameter(torch.zeros(3))
    optimizer = Sam([w])
    HypergradientLR(optimizer, rule)
    with pytest.raises(TypeError, match="Sam moves the parameters before it evaluates its closure"):
        run(optimizer, w, 1)
    assert torch.equal(w, torch.zeros(3))


@pytest.mark.parametrize("rule", RULES)
def test_single_steps_that_move_first_are_taken_without_tuning(rule: Any) -> None:
    w = nn.Parameter(torch.zeros(3))
    optimizer = Sam([w], period=4, first=4)
    hd = HypergradientLR(optimizer, rule)
    with pytest.warns(RuntimeWarning, match="step 4 moves the parameters before it evaluates its closure") as caught:
        run(optimizer, w, 21)
    assert len(caught) == 1
    assert hd.step_count == 21 - 5

    still = nn.Parameter(torch.zeros(3))
    plain, tuned = Sam([still], period=4, first=4), nn.Parameter(torch.zeros(3))
    run(plain, still, 21)
    other = Sam([tuned], period=4, first=4)
    HypergradientLR(other, "additive", hypergrad_lr=0.0)
    with pytest.warns(RuntimeWarning, match="sharpness-aware"):
        run(other, tuned, 21)
    assert torch.equal(still, tuned)


@pytest.mark.filterwarnings("ignore:.*sharpness-aware.*")
def test_under_a_schedule_such_a_step_is_taken_at_the_last_rate_and_goes_on_after_resuming() -> None:
    def make() -> tuple[nn.Parameter, Sam, LambdaLR, HypergradientLR]:
        w = nn.Parameter(torch.zeros(3))
        optimizer = Sam([w], lr=50.0, period=5, first=5)
        hd = HypergradientLR(optimizer)
        return w, optimizer, LambdaLR(optimizer, lambda step: 1.0), hd

    w, optimizer, scheduler, hd = make()
    for step in range(12):
        before = w.detach().clone()
        run(optimizer, w, 1)
        assert optimizer.param_groups[0]["lr"] == 50.0
        if step % 5 == 4:
            assert w.grad is not None
            assert torch.equal(w, torch.add(before, w.grad, alpha=-hd.lrs[0]))
        scheduler.step()
        if step == 3:
            saved: Any = copy.deepcopy([w.detach(), optimizer.state_dict(), scheduler.state_dict(), hd.state_dict()])
    again, its_optimizer, its_scheduler, its_hd = make()
    again.data.copy_(saved[0])
    its_optimizer.load_state_dict(saved[1])
    its_scheduler.load_state_dict(saved[2])
    its_hd.load_state_dict(saved[3])
    its_optimizer.count = 4
    for _ in range(8):
        run(its_optimizer, again, 1)
        its_scheduler.step()
    assert torch.equal(w, again)
    assert hd.lrs == its_hd.lrs


class TwoCalls(Optimizer):
    """Stepped by two calls, with a backward pass between them."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})
        self.base_optimizer = SGD(self.param_groups, lr=0.1)

    def first_step(self) -> None: ...

    def second_step(self) -> None:
        self.base_optimizer.step()


def test_an_optimizer_that_is_stepped_by_two_calls_is_refused_and_the_one_inside_is_named() -> None:
    w = nn.Parameter(torch.zeros(3))
    optimizer = TwoCalls([w])
    with pytest.raises(TypeError, match=r"stepped by its first_step and second_step.* its attribute 'base_optimizer'"):
        HypergradientLR(optimizer)
    hd = HypergradientLR(optimizer.base_optimizer)
    backward(w)
    optimizer.second_step()
    assert hd.step_count == 1
