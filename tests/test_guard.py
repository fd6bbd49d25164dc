"""The loss guard: when it cuts the rate, when it does not, and when it takes a cut back."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

from lightning_hd import Auto, Context, HypergradientLR
from lightning_hd.rules.guard import LossGuard
from tests.test_callback import digits


def watch(
    guard: LossGuard, losses: list[float], slope: float = 0.0, start: int = 1, log_lr: float = 0.0
) -> list[float]:
    """The logarithms of the rates that the guard makes of a constant one."""
    return [guard.limit(log_lr, loss, slope, Context(step)) for step, loss in enumerate(losses, start=start)]


CUT = math.log(2) / 2
"""How far below the rate of the best block a cut goes, in its logarithm."""


def noisy(mean: float, count: int, seed: int = 0) -> list[float]:
    return list(mean + 0.01 * np.random.default_rng(seed).standard_normal(count))


def test_a_risen_loss_cuts_the_rate_below_that_of_the_best_block() -> None:
    guard = LossGuard()
    found = watch(guard, noisy(1.0, 10) + noisy(2.0, 10))
    assert found[:19] == [0.0] * 19
    assert found[19] == pytest.approx(-CUT, rel=1e-12)
    assert guard.tries


def test_there_is_no_cut_while_the_moves_lower_the_loss_at_their_ends() -> None:
    guard = LossGuard()
    assert watch(guard, noisy(1.0, 10) + noisy(2.0, 10), slope=-0.1) == [0.0] * 20
    assert not guard.tries


def test_a_cut_that_has_not_helped_is_undone_and_asks_for_more_next_time() -> None:
    guard = LossGuard()
    watch(guard, noisy(1.0, 10) + noisy(2.0, 10))
    after = watch(guard, noisy(2.0, 10, seed=1), start=21, log_lr=-CUT)
    assert after[-1] == 0.0, "the rate before the cut"
    assert guard.demand == 2.0
    assert guard.ceiling == math.inf


def fits(losses: list[list[float]]) -> tuple[LossGuard, list[float]]:
    """A guard that compares whole fits, and the logarithms of the rates that it makes of 0 at the start of each."""
    guard, found = LossGuard(whole=True), []
    for i, own in enumerate(losses):
        found.append(watch(guard, own, start=1 + 30 * i)[0])
        guard.over = True
    return guard, found


def test_whole_fits_are_compared_if_they_have_some_steps() -> None:
    falling = [list(np.linspace(2.0, 0.1, 30) + loss) for loss in (0.0, 0.0, 1.0, 0.0)]
    _, found = fits(falling)
    assert found == [0.0, 0.0, 0.0, pytest.approx(-CUT, abs=0.02)], "the loss may fall and rise in a fit"
    _, found = fits([noisy(1.0, 5), noisy(1.0, 5), noisy(2.0, 5), noisy(2.0, 5), noisy(2.0, 5)])
    assert found[:4] == [0.0] * 4
    assert found[4] < -0.3, "two of them make a block"


def test_fits_that_go_on_badly_are_not_taken_for_the_fault_of_the_rate() -> None:
    _, found = fits([noisy(1.0, 30)] + [noisy(2.0, 30, seed) for seed in range(6)])
    assert found[2] < -0.3
    assert found[3:] == [0.0] * 4, "the cut has not helped"


@pytest.mark.parametrize(("event", "ends"), [("rewritten", False), ("replaced", False), ("fit", True)])
def test_only_a_warm_start_ends_a_fit(event: Any, ends: bool) -> None:
    rule = Auto()
    rule.begin(event)
    assert rule.state_dict()["fits"]["over"] is ends


def test_a_cut_that_has_helped_stays() -> None:
    guard = LossGuard()
    watch(guard, noisy(1.0, 10) + noisy(2.0, 10))
    after = watch(guard, noisy(1.2, 10, seed=1), start=21, log_lr=-CUT)
    assert after == [pytest.approx(-CUT, rel=1e-12)] * 10
    assert guard.ceiling == pytest.approx(-CUT + math.log(31 / 21), rel=1e-12), "it doubles only when the run does"
    assert guard.demand == 1.0


@pytest.mark.parametrize(("mean", "lifts"), [(1.1, True), (1.2, False)])
def test_after_a_cut_each_block_that_is_the_best_lifts_the_ceiling(mean: float, lifts: bool) -> None:
    guard = LossGuard()
    watch(guard, noisy(1.0, 10) + noisy(2.0, 10) + noisy(1.19, 10))
    before = guard.ceiling
    watch(guard, noisy(mean, 10, seed=1), start=31, log_lr=-CUT)
    with_the_run = math.log(41 / 31)
    assert guard.ceiling == pytest.approx(before + with_the_run + lifts * math.log(2), rel=1e-12)


def quadratic_rates(report: Callable[[int, float], float]) -> list[float]:
    """The rates of Adam on a noisy quadratic."""
    generator = torch.Generator().manual_seed(0)
    w = nn.Parameter(torch.randn(50, generator=generator))
    curvature = torch.logspace(-2, 1, 50)
    hd = HypergradientLR(Adam([w], lr=1e-3), total_steps=600)
    lrs: list[float] = []
    for t in range(300):
        loss = 0.5 * (curvature * w.detach().square()).sum().item()
        w.grad = curvature * w.detach() + 0.1 * curvature.sqrt() * torch.randn(50, generator=generator)
        hd.observe(report(t, loss))
        hd._optimizer.step()
        lrs += hd.lrs
    return lrs


def test_a_reported_loss_that_leaps_without_a_reason_costs_a_few_dozen_steps() -> None:
    calm = quadratic_rates(lambda t, loss: loss)
    leapt = quadratic_rates(lambda t, loss: loss + 5.0 * (t >= 20))
    assert max(leapt[:150]) > 0.3 * max(calm[:150])
    assert leapt[-1] > 0.3 * calm[-1]


def test_the_rate_comes_back_where_the_labels_change() -> None:
    (x, y), generator = digits(), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    hd = HypergradientLR(SGD(network.parameters(), lr=1e-3, momentum=0.9, nesterov=True), total_steps=1200)
    names, losses = torch.randperm(10, generator=generator), []
    for t in range(1200):
        batch = torch.randint(0, len(x), (32,), generator=generator)
        hd._optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(x[batch]), names[y[batch]] if t >= 600 else y[batch])
        loss.backward()  # type: ignore[no-untyped-call]
        hd.observe(loss)
        hd._optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-100:]) < 0.1


def trained(cls: Any, sign: float, closure: bool) -> tuple[list[float], tuple[int, ...]]:
    """The rates and the back-offs where the loss, times a sign, leaps by 5 for a while."""
    images, labels = (part[:512] for part in digits())
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    optimizer = cls(network.parameters(), lr=0.1, maximize=sign < 0)
    hd = HypergradientLR(optimizer, total_steps=200)
    generator = torch.Generator().manual_seed(1)

    def evaluate() -> Tensor:
        chosen = torch.randint(512, (16,), generator=generator)
        optimizer.zero_grad()
        loss = sign * nn.functional.cross_entropy(network(images[chosen]), labels[chosen])
        loss.backward()
        return (loss + sign * 5.0 * (50 < hd.step_count < 120)).detach()

    lrs = []
    for _ in range(200):
        if closure:
            optimizer.step(evaluate)
        else:
            hd.observe(evaluate())
            optimizer.step()
        lrs += hd.lrs
        assert hd.stats.loss is not None
        assert hd.stats.loss * sign > 0
    return lrs, hd.stats.backoffs


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("cls", [SGD, Adam])
def test_a_loss_that_is_maximized_is_that_of_the_mirrored_training(cls: Any, closure: bool) -> None:
    plain = trained(cls, 1.0, closure)
    assert trained(cls, -1.0, closure) == plain
    assert plain[1][0] > 0
