"""A state that is saved while a step runs, as by the handler of a signal or after an interrupt, is that before it."""

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import ASGD, SGD, Adam, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_hd import HypergradientLR

BEFORE, AFTER = 40, 20


class Loop:
    """Trains a small network."""

    def __init__(self, make: Callable[..., Optimizer], rule: Any, scheduled: bool, paused: bool = False) -> None:
        torch.manual_seed(0)
        self.network = nn.Linear(4, 2)
        self.optimizer = make(self.network.parameters())
        self.scheduler = CosineAnnealingLR(self.optimizer, 2 * (BEFORE + AFTER)) if scheduled else None
        self.hd = HypergradientLR(self.optimizer, rule, total_steps=BEFORE + AFTER)
        self.pauses = paused

    def step(self, number: int) -> float:
        batch = torch.randn(16, 4, generator=torch.Generator().manual_seed(number))
        self.hd.paused = self.pauses and number == BEFORE
        self.optimizer.zero_grad()
        (self.network(batch) - batch.flip(1)[:, :2]).square().mean().backward()
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        return self.hd.lrs[0]

    def save(self) -> list[Any]:
        parts: list[Any] = [self.network, self.optimizer, self.hd, *([self.scheduler] if self.scheduler else [])]
        return copy.deepcopy([part.state_dict() for part in parts])

    def load(self, states: list[Any]) -> None:
        self.network.load_state_dict(states[0])
        self.optimizer.load_state_dict(states[1])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(states[3])
        self.hd.load_state_dict(states[2])


def tensor_rate(parameters: Any) -> Optimizer:
    return Adam(parameters, lr=torch.tensor(0.01))


MAKE = [SGD, Adam, ASGD, tensor_rate]


@pytest.mark.parametrize("scheduled", [False, True], ids=["", "scheduled"])
@pytest.mark.parametrize("make", MAKE, ids=lambda make: make.__name__)
@pytest.mark.parametrize("fails", [False, True], ids=["a handler saves", "the step fails"])
def test_auto_goes_on_as_if_nothing_had_been_saved(make: Any, scheduled: bool, fails: bool) -> None:
    loop, saved = Loop(make, "auto", scheduled), list[Any]()
    for number in range(BEFORE):
        loop.step(number)

    def save(*_: Any) -> None:
        saved.extend(loop.save())
        if fails:
            raise KeyboardInterrupt

    handle = loop.optimizer.register_step_pre_hook(save)  # the rates of the step are set by then
    if fails:
        with pytest.raises(KeyboardInterrupt):
            loop.step(BEFORE)
    else:
        rates = [loop.step(BEFORE)]
    handle.remove()
    if fails:
        rates = [loop.step(BEFORE)]
    rates += [loop.step(BEFORE + i) for i in range(1, AFTER)]
    resumed = Loop(make, "auto", scheduled)
    resumed.load(saved)
    assert [resumed.step(BEFORE + i) for i in range(AFTER)] == rates
    for a, b in zip(resumed.network.parameters(), loop.network.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rule", ["additive", "multiplicative"])
@pytest.mark.parametrize("scheduled", [False, True], ids=["", "scheduled"])
@pytest.mark.parametrize("make", MAKE, ids=lambda make: make.__name__)
def test_the_paper_s_rules_go_on_from_the_last_rate(make: Any, scheduled: bool, rule: Any) -> None:
    """The last direction may have been overwritten already, so the scale stays as it is for one step."""
    loop, saved = Loop(make, rule, scheduled), list[Any]()
    for number in range(BEFORE):
        loop.step(number)
    scale = loop.hd.scales
    loop.optimizer.register_step_pre_hook(lambda *_: saved.extend(loop.save()))
    loop.step(BEFORE)
    assert loop.hd.scales != scale
    resumed = Loop(make, rule, scheduled)
    resumed.load(saved)
    resumed.step(BEFORE)
    assert resumed.hd.scales == pytest.approx(scale, rel=1e-6)


@pytest.mark.parametrize("rule", ["auto", "multiplicative"])
def test_steps_at_a_kept_scale_are_saved_with_the_scheduler_s_rate(rule: Any) -> None:
    loop, saved = Loop(Adam, rule, scheduled=True, paused=True), list[Any]()
    for number in range(BEFORE):
        loop.step(number)
    held = loop.optimizer.param_groups[0]["lr"]
    handle = loop.optimizer.register_step_pre_hook(lambda *_: saved.extend(loop.save()))
    loop.step(BEFORE)
    handle.remove()
    _, optimizer_state, engine_state, _ = saved
    assert optimizer_state["param_groups"][0]["lr"] == engine_state["rates"]["groups"][0]["held"] == held


def test_a_state_can_be_loaded_after_a_step_that_failed() -> None:
    loop, other = Loop(Adam, "auto", False), Loop(Adam, "auto", False)
    for number in range(BEFORE):
        loop.step(number)
    state = loop.save()
    rates = [loop.step(BEFORE + i) for i in range(AFTER)]

    def fail(*_: Any) -> None:
        raise RuntimeError("no memory")

    for number in range(BEFORE // 2):
        other.step(number)
    handle = other.optimizer.register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no memory"):
        other.step(BEFORE // 2)
    handle.remove()
    other.load(state)
    assert [other.step(BEFORE + i) for i in range(AFTER)] == rates


# ---------------------------------------------------------------------- a first gradient that is not finite


class Unknown(SGD):
    """An optimizer with a step of its own, whose direction is not known before the step."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                if p.grad is not None:
                    m = self.state[p].setdefault("mine", torch.zeros_like(p))
                    m.mul_(0.9).add_(p.grad)
                    p.sub_(m, alpha=self.param_groups[0]["lr"])


def momentum(parameters: Any) -> Optimizer:
    return SGD(parameters, lr=0.01, momentum=0.9, nesterov=True)


@pytest.mark.parametrize("make", [SGD, momentum, Adam, tensor_rate, Unknown], ids=lambda make: make.__name__)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_first_gradient_that_is_not_finite_is_left_out(make: Any, bad: float) -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer: Optimizer = make([p])
    hd = HypergradientLR(optimizer, total_steps=300)
    seen: list[Tensor | None] = []
    optimizer.register_step_post_hook(lambda *_: seen.append(p.grad))
    for step in range(300):
        optimizer.zero_grad()
        (p - 3).square().sum().backward()
        if step < 2:
            assert p.grad is not None
            p.grad[0] = bad
            told = pytest.warns(RuntimeWarning, match="so there is no first learning rate yet")
            with nullcontext() if step else told:
                optimizer.step()
            assert p.tolist() == [1.0] * 3
            assert seen[-1] is p.grad, "others see the gradient"
            assert not optimizer.state.get(p), "the optimizer has not seen it"
        else:
            optimizer.step()
    assert hd.stats.nonfinite_steps == 2
    assert p.tolist() == pytest.approx([3.0] * 3, abs=0.1)


def test_a_gradient_that_was_left_out_does_not_come_back_after_an_error() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = Adam([p])
    HypergradientLR(optimizer)

    def fail(*_: Any) -> None:
        raise RuntimeError("no memory")

    p.grad = torch.full((3,), math.inf)
    handle = optimizer.register_step_pre_hook(fail)
    with pytest.warns(RuntimeWarning), pytest.raises(RuntimeError, match="no memory"):
        optimizer.step()
    handle.remove()
    p.grad = good = torch.ones(3)
    optimizer.step()
    assert p.grad is good
    assert p.tolist() != [1.0] * 3
