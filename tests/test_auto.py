"""The rule auto: against a transcription in NumPy, and what it promises in training."""

import functools
import itertools
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    lr_scheduler,
)

from lightning_hd import Auto, Context, HypergradientDescent, HypergradientLR, Observation
from tests import reference
from tests.pairs import by_turns, pairwise
from tests.test_callback import Digits, Reference, digits, make_trainer, scalars, tags
from tests.test_checkpoints import differences
from tests.test_hypergradient import FAMILIES, observed, run, same, trajectory
from tests.test_joining import take_step

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]

METHODS: dict[str, tuple[Any, dict[str, Any], float]] = {
    "sgd": (SGD, {}, 0.0),
    "heavy_ball": (SGD, {"momentum": 0.9, "dampening": 0.3}, 0.0),
    "sgdn": (SGD, {"momentum": 0.9, "nesterov": True}, 0.0),
    "adam": (Adam, {}, 0.0),
    "adamw": (AdamW, {}, 0.1),
}
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (SGD, {}),
    "heavy ball": (SGD, {"momentum": 0.9}),
    "Nesterov": (SGD, {"momentum": 0.9, "nesterov": True}),
    **{
        cls.__name__: (cls, {})
        for cls in (Adam, AdamW, RMSprop, Adagrad, Adadelta, Adamax, NAdam, RAdam, ASGD, Adafactor)
    },
    **({"Muon": (torch.optim.Muon, {})} if hasattr(torch.optim, "Muon") else {}),
}


RATES = [1.0, 0.0, 1e-8, 1e-3, 1e3]


# ---------------------------------------------------------------------- the formula


def transcribed(method: str, **arguments: Any) -> tuple[list[float], list[reference.Array], reference.AutoRule]:
    _, settings, weight_decay = METHODS[method]
    return reference.train_auto(method.removesuffix("w"), settings, weight_decay, **arguments)


def trained(
    method: str,
    lr: float,
    rule: Auto,
    steps: int,
    leaps: dict[int, float],
    report: Callable[[int, float], float] | None = None,
    **arguments: Any,
) -> tuple[list[float], nn.Module, HypergradientLR]:
    cls, settings, weight_decay = METHODS[method]
    network = reference.torch_network()
    optimizer = cls(network.parameters(), lr=lr, weight_decay=weight_decay, **settings)
    hd = HypergradientLR(optimizer, rule, **arguments)
    data, lrs = reference.torch_batches(), []
    for t in range(1, steps + 1):
        optimizer.zero_grad()
        loss = reference.torch_loss(network, *data[(t - 1) % len(data)])
        (leaps.get(t, 1.0) * loss).backward()
        if report is not None:
            hd.observe(report(t, loss.item()))
        optimizer.step()
        lrs += hd.lrs
    return lrs, network, hd


@pytest.mark.parametrize("method", METHODS)
def test_a_leap_that_lasts_brakes_for_longer_where_steps_follow_the_gradient(method: str) -> None:
    leaps = dict.fromkeys(range(100, 118), 80.0)
    expected, _, rule = transcribed(method, steps=118, leaps=leaps)
    mine, _, hd = trained(method, 0.3, Auto(), 118, leaps)
    assert (114 in rule.braked) == (method in ("sgd", "sgdn", "heavy_ball"))
    np.testing.assert_allclose(mine, expected, rtol=1e-7)  # these steps are so short that rounding shows
    assert hd.stats.backoffs == (len(rule.braked),)


@pytest.mark.parametrize(
    "method",
    [pytest.param(method, marks=pytest.mark.slow if method in ("heavy_ball", "adam") else ()) for method in METHODS],
)
def test_the_trajectory_is_that_of_the_formula(method: str) -> None:
    # the horizon grows from step 900 on, and looks are up to 8 steps apart from step 1000 on
    leaps = {41: 20.0, 42: 20.0, 150: 6.0, **dict.fromkeys(range(1020, 1028), 6.0)}
    expected, parameters, rule = transcribed(method, steps=1060, leaps=leaps)
    braked = rule.braked
    mine, network, hd = trained(method, 0.3, Auto(), 1060, leaps)
    assert {41, 42, 150} < set(braked), "the comparison needs a brake that acts"
    assert max(braked) > 1020, "and one between looks"
    assert max(expected) > 100 * expected[0], "and a rate that climbs beyond the limit for caution"
    np.testing.assert_allclose(mine, expected, rtol=1e-9)
    assert hd.stats.backoffs == (len(braked),)
    for p, value in zip(network.parameters(), parameters, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), value, rtol=1e-7)


@pytest.mark.parametrize("method", ["sgdn", "adamw"])
def test_the_trajectory_from_a_configured_rate_is_that_of_the_formula(method: str) -> None:
    expected, _, rule = transcribed(method, leaps={60: 20.0}, first_lr=1e-3)
    mine, _, hd = trained(method, 1e-3, Auto(start="configured"), len(expected), {60: 20.0})
    assert mine[0] == 1e-3, "the first step is taken with the configured rate"
    assert hd.stats.backoffs == (len(rule.braked),) != (0,)
    np.testing.assert_allclose(mine, expected, rtol=1e-9)


def rising(t: int, loss: float) -> float:
    """A loss that rises twice, though nothing has happened to the parameters."""
    return loss + (2.0 if 100 < t <= 250 else 5.0 if t > 400 else 0.0)


@pytest.mark.parametrize("method", ["sgdn", "adamw"])
def test_the_trajectory_with_a_rising_loss_is_that_of_the_formula(method: str) -> None:
    expected, _, rule = transcribed(method, steps=600, report=rising, cooldown=0.2)
    calm, _, _ = transcribed(method, steps=600, cooldown=0.2)
    assert rule.retreats, "the comparison needs losses that are seen to rise"
    assert rule.undone, "and cuts that have not helped"
    mine, _, hd = trained(method, 0.3, Auto(), 600, {}, rising, total_steps=600)
    np.testing.assert_allclose(mine, expected, rtol=1e-9)
    assert hd.stats.backoffs == (len(rule.braked) + len(rule.retreats),)
    assert mine[-1] < 0.01 * max(mine)
    cut = rule.retreats[0] - 1
    assert expected[cut] < calm[cut]


def test_a_closure_reports_what_it_returns() -> None:
    found = []
    for closed in (False, True):
        network = reference.torch_network()
        optimizer = SGD(network.parameters(), lr=1.0)
        hd = HypergradientLR(optimizer)
        data, lrs = reference.torch_batches(), []
        for t in range(1, 301):
            batch = data[(t - 1) % len(data)]

            def closure(network: Any = network, optimizer: Any = optimizer, batch: Any = batch, t: int = t) -> Tensor:
                optimizer.zero_grad()
                loss = reference.torch_loss(network, *batch)
                loss.backward()
                return loss + (2.0 if t > 100 else 0.0)

            if closed:
                optimizer.step(closure)
            else:
                hd.observe(closure())
                optimizer.step()
            lrs += hd.lrs
        found.append(lrs)
    assert found[0] == found[1]


@pytest.mark.parametrize("loss", [math.nan, math.inf, torch.tensor(math.nan)])
def test_a_loss_that_is_not_finite_counts_as_unknown(loss: Any) -> None:
    plain, *_ = trained("adam", 1.0, Auto(), 150, {})
    mine, _, hd = trained("adam", 1.0, Auto(), 150, {}, lambda t, _: loss)
    assert mine == plain
    assert hd.stats.nonfinite_steps == 0


@pytest.mark.parametrize("loss", [None, "1", torch.ones(2), torch.ones(1, dtype=torch.complex64), [1.0]])
def test_what_is_no_loss_is_refused(loss: Any) -> None:
    hd = HypergradientLR(SGD([nn.Parameter(torch.ones(1))], lr=0.1))
    with pytest.raises(TypeError, match="loss must be a real number or a tensor of one"):
        hd.observe(loss)


def test_the_scale_and_the_offset_of_the_loss_make_no_difference() -> None:
    plain, *_ = trained("adam", 1.0, Auto(), 300, {}, rising)
    other, *_ = trained("adam", 1.0, Auto(), 300, {}, lambda t, loss: 1024 * rising(t, loss) - 4096)
    np.testing.assert_allclose(other, plain, rtol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"cooldown": 1.5}, ValueError, "cooldown must be a finite number of at least 0 and at most 1, got 1.5"),
        ({"cooldown": "much"}, ValueError, "cooldown must be a number from 0 to 1, or 'default', got 'much'"),
        ({"cooldown": None}, TypeError, "cooldown must be a number, got None"),
        ({"total_steps": 0}, ValueError, "total_steps must be at least 1"),
        ({"total_steps": 10.0}, TypeError, "total_steps must be a whole number, got 10.0"),
    ],
)
def test_a_bad_cooldown_is_named(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        HypergradientLR(SGD([nn.Parameter(torch.ones(1))], lr=0.1), **arguments)


@pytest.mark.parametrize(("rule", "falls"), [("auto", True), ("additive", False)])
def test_rates_fall_over_the_last_fifth(rule: Any, falls: bool) -> None:
    lrs: dict[int | None, list[float]] = {}
    for total in (None, 50):
        p = nn.Parameter(torch.ones(3))
        optimizer = SGD([p], lr=0.1)
        hd = HypergradientLR(optimizer, rule, hypergrad_lr=0.0 if rule == "additive" else None, total_steps=total)
        found = lrs[total] = []
        for _ in range(60):
            p.grad = torch.ones(3)
            optimizer.step()
            found += hd.lrs
    assert lrs[50][:41] == lrs[None][:41]
    if falls:
        assert lrs[None][-1] > lrs[None][40], "the comparison needs rates that would rise"  # and do not rise meanwhile
        falling = [lrs[50][40] * (1 - math.sqrt(1 - part / 10)) for part in (*range(9, 0, -1), *[1] * 10)]
        np.testing.assert_allclose(lrs[50][41:], falling, rtol=1e-12)
    else:
        assert lrs[50] == lrs[None]


def test_the_first_steps_by_hand() -> None:
    p = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    optimizer = SGD([p], lr=7.0)
    hd = HypergradientLR(optimizer)
    for t, alpha in enumerate((1e-4 * 5 / 2, 1e-4 * 5 / 2 * math.exp(0.5), 1e-4 * 5 / 2 * math.exp(1.0))):
        p.grad = torch.tensor([2.0, 0.0], dtype=torch.float64)
        optimizer.step()
        assert hd.lrs == [pytest.approx(alpha, rel=1e-14)], t
    squares = (1 - 1 / 60) * ((1 - 1 / 60) * 1.15**2 + 1.3**2) + 0.15**2  # of 1 + 0.3 / 2, 1 + 0.3 and 0 + 0.3 / 2
    alpha *= math.exp(0.15 / math.sqrt(squares))
    for _ in range(2):
        p.grad = torch.tensor([0.0, 0.5], dtype=torch.float64)
        optimizer.step()
        p.data[1] = 4.0  # whatever happens between two steps is a part of the move
        assert observed(hd).cosine == 0
        assert hd.lrs == [pytest.approx(alpha, rel=1e-14)], "two right angles say nothing"


# ---------------------------------------------------------------------- what it does not depend on


def build(cls: Any, lrs: Sequence[float], settings: dict[str, Any], dtype: torch.dtype) -> tuple[nn.Module, Optimizer]:
    """The reference network with a group for each rate."""
    network = reference.torch_network().to(dtype)
    p = list(network.parameters())
    parts = [p] if len(lrs) == 1 else [p[:1], p[1:]] if len(lrs) == 2 else [p[:1], p[1:2], p[2:]]
    groups = [{"params": part, "lr": lr} for part, lr in zip(parts, lrs, strict=True)]
    return network, cls(groups, lr=1.0, **settings)


@pytest.mark.parametrize(
    ("optimizer", "groups", "dtype"),
    pairwise(
        [(SGD, {}), (SGD, {"momentum": 0.9, "nesterov": True}), (Adam, {}), (RMSprop, {})],
        [(1, "global"), (3, "global"), (3, "group")],
        [torch.float32, torch.float64],
    ),
)
def test_the_configured_rate_makes_no_difference(
    optimizer: tuple[Any, dict[str, Any]], groups: tuple[int, Any], dtype: torch.dtype
) -> None:
    """For some groups, with a scope."""
    ends = []
    for lr in RATES:
        network, built = build(optimizer[0], [lr] * groups[0], optimizer[1], dtype)
        hd = HypergradientLR(built, scope=groups[1])
        ends.append((trajectory(network, built, hd, range(40)), network))
    for lrs, network in ends[1:]:
        assert lrs == ends[0][0]
        assert same(network, ends[0][1])


@pytest.mark.parametrize(
    ("cls", "settings"), [(SGD, {}), (SGD, {"momentum": 0.9, "nesterov": True}), (Adam, {}), (RMSprop, {})]
)
@pytest.mark.parametrize("scope", ["global", "group"])
def test_only_the_ratio_of_the_configured_rates_makes_a_difference(
    cls: Any, settings: dict[str, Any], scope: Any
) -> None:
    ends = []
    for lr in (1.0, 2.0**-27, 2.0**-10, 2.0**10, 1e-8, 1e-3, 1e3):
        network, optimizer = build(cls, [lr, lr / 4, 2 * lr], settings, torch.float64)
        hd = HypergradientLR(optimizer, scope=scope)
        ends.append((trajectory(network, optimizer, hd, range(40)), network))
    for lrs, network in ends[1:4]:  # powers of two, which divide without rounding
        assert lrs == ends[0][0]
        assert same(network, ends[0][1])
    for lrs, _ in ends[4:]:
        np.testing.assert_allclose(lrs, ends[0][0], rtol=1e-12)
    first = ends[0][0][0]
    if scope == "global":
        assert all((a, c) == (4 * b, 8 * b) for a, b, c in ends[0][0])
    else:
        assert first[0] != 4 * first[1]


def test_the_configured_rate_makes_no_difference_in_a_trainer(tmp_path: Path) -> None:
    ends = []
    for lr in (1e-6, 10.0):
        module, hd = Digits(AdamW, lr), HypergradientDescent()
        make_trainer(tmp_path, hd, max_epochs=5).fit(module)
        ends.append((hd.lrs, module.losses, module))
    assert ends[0][:2] == ends[1][:2]
    assert same(ends[0][2], ends[1][2])
    assert ends[0][1][-1] < 0.5 * ends[0][1][0]


def norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(t.square().sum()) for t in tensors))


def relative_steps(factor: float, **settings: Any) -> tuple[list[float], list[Tensor], HypergradientLR]:
    """``α‖d‖/‖θ‖`` of SGD where the loss is multiplied by a factor."""
    network = reference.torch_network()
    optimizer = SGD(network.parameters(), lr=0.1, **settings)
    hd = HypergradientLR(optimizer)
    steps = []
    for x, y in reference.torch_batches():
        before = [p.detach().clone() for p in network.parameters()]
        optimizer.zero_grad()
        (factor * reference.torch_loss(network, x, y)).backward()
        optimizer.step()
        moved = [p.detach() - q for p, q in zip(network.parameters(), before, strict=True)]
        steps.append(norm(moved) / norm(before))
    return steps, [p.detach() for p in network.parameters()], hd


@pytest.mark.parametrize(
    "settings", [{}, pytest.param({"momentum": 0.9}, marks=pytest.mark.slow), {"momentum": 0.9, "nesterov": True}]
)
def test_the_scale_of_the_loss_makes_no_difference_to_sgd(settings: dict[str, Any]) -> None:
    steps, parameters, hd = relative_steps(1.0, **settings)
    assert hd.stats.backoffs == (0,), "its excess is a difference of logarithms, which rounds"
    assert max(steps) > 50 * steps[0]
    for factor in (2.0**20, 2.0**-20):
        others, ends, other = relative_steps(factor, **settings)
        assert others == steps
        assert all(torch.equal(p, q) for p, q in zip(ends, parameters, strict=True))
        assert other.lrs == [hd.lrs[0] / factor]
    for factor in (1e6, 1e-6, 1e25, 1e-25):
        others, ends, _ = relative_steps(factor, **settings)
        np.testing.assert_allclose(others, steps, rtol=1e-6)
        for p, q in zip(ends, parameters, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("cls", "settings"), FAMILIES)
def test_two_runs_are_equal_bit_for_bit(cls: Any, settings: dict[str, Any]) -> None:
    ends = []
    for _ in range(2):
        network = reference.torch_network().float()
        optimizer = cls(network.parameters(), lr=0.01, **settings)
        hd = HypergradientLR(optimizer)
        ends.append((trajectory(network, optimizer, hd, range(60)), network, hd.state_dict()))
    assert ends[0][0] == ends[1][0]
    assert same(ends[0][1], ends[1][1])
    assert differences(ends[0][2], ends[1][2]) == 0


# ---------------------------------------------------------------------- its state


def feed(
    rule: Auto, observations: Iterable[Observation], lr: float = 1.0, start: int = 2, length: float = math.inf
) -> list[float]:
    """The rates that the rule makes of a sequence, from its second step on."""
    lrs = []
    for step, seen in enumerate(observations, start=start):
        lr = rule.update(lr, seen, Context(step, length=length))
        lrs.append(lr)
    return lrs


def noise(steps: int, sigma: float = 0.5, seed: int = 0) -> list[Observation]:
    rng = np.random.default_rng(seed)
    norms, cosines = rng.lognormal(0, sigma, steps), rng.normal(0, 0.1, steps)
    return [Observation(-float(n * c), float(n), 1.0) for n, c in zip(norms, cosines, strict=True)]


def test_a_rate_that_was_high_never_falls_as_fast_as_it_climbed_at_the_start() -> None:
    rule = Auto()
    first = rule.first_lr(1.0, 1.0)
    up, down = (Observation(sign, 1.0, 1.0) for sign in (-0.5, 0.5))
    climbed = feed(rule, [up] * 60, first)
    assert climbed[0] == pytest.approx(first * math.exp(0.5)), "the large cap of the start"
    assert climbed[-1] > 60 * first
    fallen = feed(rule, [down] * 4000, climbed[-1], start=62)
    assert fallen[-1] < 3 * first, "the test needs a rate that comes back to the first ones"
    falls = -np.diff(np.log(fallen))
    steps = np.arange(63, 63 + len(falls))
    assert np.all(falls <= 0.05 * np.minimum(1, 100 / steps) + 1e-12)


@pytest.mark.parametrize("leapt", [False, True])
def test_what_has_fallen_fast_may_rise_as_fast_up_to_half_of_the_rate_at_the_last_leap(leapt: bool) -> None:
    rule, start, growth = Auto(start="configured"), 1000, 1.07
    before = [Observation(0.0, norm, 1.0) for norm in [1.0] * 40 + [1e3] * leapt + [1.0] * 40]
    down = [Observation(0.5 * growth**i, growth**i, 1.0) for i in range(60)]
    up = [Observation(-0.5 * growth**60, growth**60, 1.0)] * 200
    lrs = np.array([1.0, *feed(rule, before + down + up, 1.0, start)])
    changes = np.diff(np.log(lrs))
    caps = 5 / np.arange(start, start + len(changes))
    falls, rises = np.maximum(-changes - caps, 0.0), np.maximum(changes - caps, 0.0)
    assert falls.max() == pytest.approx(0.1 - caps[len(before)], abs=1e-3), "the norm has doubled"
    assert changes.max() == pytest.approx(0.1, rel=1e-12)
    assert np.all(lrs[:-1][rises > 1e-12] < (0.5 if leapt else np.inf))
    if not leapt:
        assert rises.sum() == pytest.approx(falls.sum(), abs=0.01), "no further than it has fallen so"


def test_its_state_is_saved_and_loaded_bit_for_bit(tmp_path: Path) -> None:
    rule = Auto()
    lr = rule.first_lr(3.0, 7.0)
    lr = feed(rule, noise(200), lr)[-1]
    torch.save(rule.state_dict(), tmp_path / "rule.pt")
    saved = torch.load(tmp_path / "rule.pt", weights_only=True)
    assert saved == rule.state_dict()
    other = Auto()
    other.load_state_dict(saved)
    assert other.state_dict() == rule.state_dict()
    assert {key: type(value) for key, value in other.state_dict().items()} == {
        key: type(value) for key, value in rule.state_dict().items()
    }
    assert other.backoffs == rule.backoffs > 0
    assert feed(other, noise(200, seed=1), lr, 202) == feed(rule, noise(200, seed=1), lr, 202)


@pytest.mark.parametrize("key", Auto().state_dict())
def test_a_state_with_a_missing_number_is_refused(key: str) -> None:
    saved = Auto().state_dict()
    del saved[key]
    with pytest.raises(KeyError, match=key):
        Auto().load_state_dict(saved)
    hd = HypergradientLR(SGD([nn.Parameter(torch.ones(1))], lr=0.1))
    whole = hd.state_dict()
    del whole["rates"]["scopes"][0]["rule"][key]
    with pytest.raises(ValueError, match=f"damaged.*{key}"):
        hd.load_state_dict(whole)


def test_a_rule_that_is_bound_is_a_copy() -> None:
    rule = Auto(start="configured")
    bound = rule.bind(normalized=True)
    assert isinstance(bound, Auto)
    feed(bound, noise(20))
    assert rule.state_dict() == Auto().state_dict()
    assert bound.start == "configured"


# ---------------------------------------------------------------------- the brake


def test_a_leap_alone_is_braked_for_a_while() -> None:
    rule = Auto(start="configured")
    lrs = feed(rule, [Observation(0.0, norm, 1.0) for norm in (1.0, 1.0, 1.0, 2.4, 8.0)])
    assert lrs == [1.0] * 5, "α itself stays"
    assert rule.backoffs == 1
    weights = 0.9 ** np.arange(4)[::-1]
    mean = np.dot(weights, [0, 0, 0, math.log(2.4)]) / weights.sum()
    variance = (math.log(2.5) / 3) ** 2
    for rise in (0.0, math.log(2.4)):  # the mean of the norms before was 1
        variance += 0.005 * (rise**2 - variance)
    excess = math.log(8.0) - mean - max(math.log(2.5), 3 * math.sqrt(variance))
    assert 0 < excess < 1
    for waited in range(200):
        assert rule.used(1.0, Context(6)) == pytest.approx(math.exp(-excess * 0.95**waited), rel=1e-12)
        feed(rule, [Observation(0.0, 1.0, 1.0)])
    assert rule.backoffs == 1


def test_leaps_in_a_row_lower_the_rate() -> None:
    rule = Auto(start="configured")
    calm = [Observation(0.0, 1.0, 1.0)] * 5
    lrs = feed(rule, [*calm, *(Observation(0.0, norm, 1.0) for norm in (1e3, 1e6, 1e9)), *calm])
    assert rule.backoffs == 3
    assert lrs[5] == 1.0
    assert lrs[6] == pytest.approx(math.exp(-1), rel=1e-12), "by a factor of e at most"
    assert lrs[7] == pytest.approx(math.exp(-2), rel=1e-12)
    assert lrs[-1] == lrs[7]
    assert rule.used(lrs[7], Context(14)) == pytest.approx(lrs[7] * math.exp(-2 * 0.95**5), rel=1e-12)


@pytest.mark.parametrize(("normalized", "longest"), [(True, 2.0), (False, math.log(1e4) - math.log(2.5))])
def test_only_steps_that_follow_the_gradient_are_braked_by_all_of_a_leap(normalized: bool, longest: float) -> None:
    rule = Auto(start="configured").bind(normalized)
    feed(rule, [Observation(0.0, norm, 1.0) for norm in (1.0, 1.0, 1e4)])
    assert rule.used(1.0, Context(3)) == pytest.approx(math.exp(-longest), rel=1e-12)


def test_a_leap_to_a_level_that_stays_costs_the_rate_nothing() -> None:
    rule = Auto(start="configured")
    norms = [1.0] * 10 + [30.0] * 10  # as where another task, whose loss is larger, has its turn
    assert feed(rule, [Observation(0.0, norm, 1.0) for norm in norms]) == [1.0] * 20
    assert rule.backoffs >= 2


def test_no_brake_takes_it_below_its_first_rate() -> None:
    rule = Auto()
    first = rule.first_lr(1.0, 1.0)
    lr = 20 * first
    for t, norm in enumerate([1.0] * 5 + [100.0**i for i in range(40)], start=2):
        lr = rule.update(lr, Observation(0.0, norm, 1.0), Context(t))
    assert rule.backoffs > 10
    assert lr == first
    assert rule.update(lr / 2, Observation(0.0, 1e100, 1.0), Context(50)) == lr / 2, (
        "where the cosine has taken it, it stays"
    )


def test_it_does_not_brake_before_it_has_seen_two_norms() -> None:
    for norms, backoffs in (((1.0, 100.0), 0), ((1.0, 1.0, 100.0), 1), ((1.0, 0.0, 100.0), 0)):
        rule = Auto(start="configured")
        feed(rule, [Observation(0.0, norm, 1.0) for norm in norms])
        assert rule.backoffs == backoffs


def test_a_brake_outweighs_the_cosine() -> None:
    rule = Auto(start="configured")
    norms = [1.0, 1.0, 1.0, 100.0, 10000.0]
    lrs = feed(rule, [Observation(-norm, norm, 1.0) for norm in norms])  # all cosines are 1
    assert lrs[3] == lrs[2]
    assert lrs[4] == pytest.approx(lrs[3] / math.e, rel=1e-12)


def test_a_zero_gradient_tells_it_nothing() -> None:
    rule = Auto(start="configured")
    feed(rule, noise(20))
    before = rule.state_dict()
    assert rule.update(0.7, Observation(0.0, 0.0, 3.0), Context(22)) == 0.7
    assert rule.state_dict() == before


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sigma", [0.2, 0.5, 1.5])
def test_noise_of_small_batches_seldom_backs_off(sigma: float, seed: int) -> None:
    rule = Auto(start="configured")
    norms = np.random.default_rng(seed).lognormal(0, sigma, 5000)
    lrs = feed(rule, [Observation(0.0, float(norm), 1.0) for norm in norms])
    assert rule.backoffs < 0.03 * len(norms)
    assert -math.log(lrs[-1]) < 0.003 * len(norms), "a cosine of 0.1 outweighs that"


def rare_events(seed: int) -> tuple[Tensor, Tensor]:
    """Two classes, 2 % of the points in one of them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4000, 20, generator=generator)
    score = x @ torch.randn(20, generator=generator)
    return x, (score > score.kthvalue(3920).values).float()


def mean_loss(
    parameters: Iterable[Tensor], name: str, lr: float | None, steps: int, loss: Callable[[], Tensor]
) -> float:
    """The mean loss of the last eighth of a run: tuned, or at a constant rate."""
    cls, settings = OPTIMIZERS[name]
    optimizer = cls(parameters, **{"lr": lr or 1e-3, **settings})
    hd = HypergradientLR(optimizer, total_steps=steps) if lr is None else None
    losses = [take_step(optimizer, hd, loss()) for _ in range(steps)]
    return float(np.mean(losses[-(steps // 8) :]))


def factorize(name: str, lr: float | None, seed: int) -> float:
    """Factorize a noisy matrix from small factors, a saddle behind which the loss bends far more."""
    torch.manual_seed(seed)
    left, right = torch.randn(300, 8), torch.randn(200, 8)
    factors = [nn.Parameter(0.1 * torch.randn(rows, 12)) for rows in (300, 200)]

    def loss() -> Tensor:
        i, j = torch.randint(300, (128,)), torch.randint(200, (128,))
        noisy = (left[i] * right[j]).sum(1) + 0.5 * torch.randn(128)
        return nn.functional.mse_loss((factors[0][i] * factors[1][j]).sum(1), noisy)

    return mean_loss(factors, name, lr, 2000, loss)


@pytest.mark.parametrize(("name", "best"), [("Nesterov", 0.1), pytest.param("SGD", 1.0, marks=pytest.mark.slow)])
def test_the_rate_falls_in_time_behind_a_saddle(name: str, best: float) -> None:
    """The best rate is by far that of a grid whose rates are a factor of three apart."""
    for seed in (0, 1):
        assert factorize(name, None, seed) < 1.1 * factorize(name, best, seed)


def learn_in_stages(name: str, lr: float | None, seed: int) -> float:
    """Learn the digits, one label in ten wrong; two more classes come in after each fifth of the steps."""
    torch.manual_seed(seed)
    x, y = digits()
    noisy = torch.where(torch.rand(len(y)) < 0.1, torch.randint(10, y.shape), y)
    network = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    seen = itertools.count()

    def loss() -> Tensor:
        known = (y < 2 * (next(seen) // 300 + 1)).nonzero().flatten()
        i = known[torch.randint(len(known), (32,))]
        return nn.functional.cross_entropy(network(x[i]), noisy[i])

    return mean_loss(network.parameters(), name, lr, 1500, loss)


@pytest.mark.parametrize(
    ("name", "best", "seeds"),
    [
        ("SGD", 0.3, 2),
        pytest.param("Nesterov", 0.1, 4, marks=pytest.mark.slow),
        pytest.param("Adam", 0.01, 4, marks=pytest.mark.slow),
    ],
)
def test_classes_that_come_in_stages_are_not_taken_for_the_fault_of_the_rate(
    name: str, best: float, seeds: int
) -> None:
    """In the mean: one seed is some 5 % off. The best rate is that of a grid, for all seeds."""
    ratios = [learn_in_stages(name, None, seed) / learn_in_stages(name, best, seed) for seed in range(seeds)]
    assert sum(ratios) / seeds < 1.1


def separate(name: str, lr: float | None, seed: int) -> float:
    """Separate the digits by planes, one at a time. Once they are, most have no gradient but that of the decay."""
    torch.manual_seed(seed)
    x, y = digits()
    planes = nn.Linear(64, 10)

    def loss() -> Tensor:
        i = torch.randint(len(x), (1,))
        return nn.functional.multi_margin_loss(planes(x[i]), y[i]) + 1e-3 * planes.weight.square().sum()

    return mean_loss(planes.parameters(), name, lr, 3000, loss)


@pytest.mark.parametrize(
    ("name", "best", "seeds"),
    [
        ("SGD", 0.03, [0, 1]),
        pytest.param("Nesterov", 0.003, [1], marks=pytest.mark.slow),
        pytest.param("Adam", 0.003, [1], marks=pytest.mark.slow),
    ],
)
def test_batches_of_one_do_not_starve_it(name: str, best: float, seeds: list[int]) -> None:
    """With the second seed, the loss seems to rise twice in the first 200 steps. No rate of a grid is 1 % better."""
    for seed in seeds:
        assert separate(name, None, seed) < 1.25 * separate(name, best, seed)


@pytest.mark.parametrize("name", ["SGD", pytest.param("Nesterov", marks=pytest.mark.slow), "Adam"])
def test_rare_large_gradients_do_not_starve_it(name: str) -> None:
    # A batch of 8 has one of the rare class in every seventh step; its gradient is ten times that of the others. The
    # best constant rates of a grid reach 0.013 to 0.015; the loss of guessing the frequency is 0.098.
    x, y = rare_events(0)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 1))
    cls, settings = OPTIMIZERS[name]
    optimizer = cls(network.parameters(), **{"lr": 1e-3, **settings})
    hd = HypergradientLR(optimizer, total_steps=2500)
    generator = torch.Generator().manual_seed(1)
    lrs = []
    for _ in range(2500):
        chosen = torch.randint(len(x), (8,), generator=generator)
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(network(x[chosen]).squeeze(1), y[chosen]).backward()
        optimizer.step()
        lrs += hd.lrs
    with torch.no_grad():
        loss = nn.functional.binary_cross_entropy_with_logits(network(x).squeeze(1), y).item()
    assert loss < 0.045
    assert np.quantile(lrs[1000:2000], 0.01) > 1e-3, "but for a few steps, which a leap shortens by its excess"


def test_a_brake_is_counted_and_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lightning_hd"):
        lrs, _, hd = trained("sgd", 0.1, Auto(), 60, {50: 20.0})
    assert hd.stats.backoffs == (1,)
    (record,) = (r for r in caplog.records if r.name == "lightning_hd")
    assert record.levelno == logging.INFO
    assert "HypergradientLR(SGD): step 50: the gradient's norm leapt to" in record.getMessage()
    assert f"backs off from {lrs[48]:.3g} to {lrs[49]:.3g}" in record.getMessage()
    assert lrs[49] < lrs[48]


def test_each_scope_has_a_brake_of_its_own() -> None:
    a, b = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    optimizer = SGD([{"params": [a]}, {"params": [b]}], lr=0.1)
    hd = HypergradientLR(optimizer, scope="group")
    for norm in (1.0, 1.0, 1.0, 1.0, 50.0):
        a.grad, b.grad = torch.ones_like(a), torch.full_like(b, norm)
        optimizer.step()
    assert hd.stats.backoffs == (0, 1)


def test_backoffs_are_logged_once_there_are_any(tmp_path: Path) -> None:
    class Leaping(Reference):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss + 9 * (loss - loss.detach()) if batch_idx in (95, 150) else loss

    hd = HypergradientDescent()
    make_trainer(tmp_path / "leaping", hd, logger=TensorBoardLogger(tmp_path / "leaping"), log_every_n_steps=10).fit(
        Leaping()
    )
    assert scalars(tmp_path / "leaping", "hd/backoffs-SGD") == {
        step: 1 if step < 150 else 2 for step in range(99, 200, 10)
    }
    make_trainer(
        tmp_path / "calm", HypergradientDescent(), logger=TensorBoardLogger(tmp_path / "calm"), log_every_n_steps=10
    ).fit(Reference())
    assert "hd/backoffs-SGD" not in tags(tmp_path / "calm")


# ---------------------------------------------------------------------- training


def classifier(bias: bool = True) -> nn.Sequential:
    # All of 280 runs at batch sizes 16 and 128 from seeds 0 to 9 halved the loss within 250 steps.
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(64, 64, bias=bias), nn.ReLU(), nn.Linear(64, 10, bias=bias))


def whole_loss(network: nn.Module) -> float:
    x, y = digits()
    with torch.no_grad():
        return float(nn.functional.cross_entropy(network(x), y))


def train(
    network: nn.Module,
    optimizer: Optimizer,
    batch: int,
    steps: int,
    before: Callable[[], None] = lambda: None,
    after: Callable[[], None] = lambda: None,
    micro_batches: int = 1,
) -> list[float]:
    """The loss of every step; ``before`` and ``after`` are called around the optimizer's."""
    x, y = digits()
    generator = torch.Generator().manual_seed(2)
    losses = []
    for _ in range(steps):
        chosen = torch.randint(len(x), (batch,), generator=generator) if batch < len(x) else torch.arange(len(x))
        optimizer.zero_grad()
        total = 0.0
        for part in chosen.chunk(micro_batches):
            loss = nn.functional.cross_entropy(network(x[part]), y[part]) / micro_batches
            loss.backward()
            total += loss.item()
        before()
        optimizer.step()
        after()
        losses.append(total)
    return losses


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_one_poisoned_batch_does_not_ruin_a_training_with_momentum(momentum: float) -> None:
    """Momentum holds its gradient for many steps."""
    network = classifier()
    optimizer = SGD(network.parameters(), lr=1e-3, momentum=momentum, nesterov=momentum > 0)
    HypergradientLR(optimizer)
    steps, moves, before = itertools.count(), list[float](), list[Tensor]()

    def poison() -> None:
        if next(steps) == 250:
            for p in network.parameters():
                if p.grad is not None:
                    p.grad.mul_(1e6)
        before[:] = [p.detach().clone() for p in network.parameters()]

    def measure() -> None:
        moves.append(norm([p.detach() - old for p, old in zip(network.parameters(), before, strict=True)]))

    losses = train(network, optimizer, 16, 500, poison, measure)
    assert max(moves[250:]) < 5 * max(moves[150:250])
    assert np.mean(losses[-50:]) < 2 * np.mean(losses[200:250])


def check_learned(network: nn.Module, losses: Sequence[float], start: float) -> None:
    assert np.isfinite(losses).all()
    assert np.mean(losses[-30:]) < 0.5 * start
    assert whole_loss(network) < 0.5 * start


ALL = 1797
"""The batch of all digits, which is slow."""


@pytest.mark.parametrize(
    ("name", "batch"),
    [
        pytest.param(
            name,
            batch,
            marks=pytest.mark.slow if batch == 128 or (batch == ALL and name not in ("SGD", "Adam", "Muon")) else (),
        )
        for name in OPTIMIZERS
        for batch in (16, 128, ALL)
    ],
)
def test_every_optimizer_learns_at_every_batch_size(name: str, batch: int) -> None:
    cls, settings = OPTIMIZERS[name]
    network = classifier(bias=name != "Muon")  # which takes matrices only
    optimizer = cls(network.parameters(), **{"lr": 1e-3, **settings})
    hd = HypergradientLR(optimizer)
    start = whole_loss(network)
    check_learned(network, train(network, optimizer, batch, 250), start)
    assert hd.step_count == 250
    assert hd.stats.nonfinite_steps == 0


@pytest.mark.parametrize("factor", [1.0, 2.0**20])
def test_the_second_step_of_asgd_is_as_short_as_the_first(factor: float) -> None:
    p = nn.Parameter(torch.ones(4, dtype=torch.float64))
    optimizer = ASGD([p], lr=1.0)
    HypergradientLR(optimizer)
    for _ in range(2):
        before = p.detach().clone()
        optimizer.zero_grad()
        (factor * p.square().sum()).backward()
        optimizer.step()
        assert norm([p.detach() - before]) < 1e-3 * norm([before])


def test_groups_with_and_without_weight_decay_keep_their_ratio() -> None:
    network = classifier()
    groups = [
        {"params": [p for p in network.parameters() if p.ndim > 1], "weight_decay": 0.05, "lr": 1e-3},
        {"params": [p for p in network.parameters() if p.ndim < 2], "weight_decay": 0.0, "lr": 3e-3},
    ]
    optimizer = AdamW(groups, lr=1.0)
    hd = HypergradientLR(optimizer)
    rates: list[list[float]] = []
    start = whole_loss(network)
    check_learned(network, train(network, optimizer, 128, 200, after=lambda: rates.append(hd.lrs)), start)
    for decaying, other in rates:
        assert other == pytest.approx(3 * decaying, rel=1e-14)
    assert len(hd.scales) == 1


SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=400),
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.1, total_steps=401, cycle_momentum=False
    ),
    "warmup and decay": lambda optimizer: lr_scheduler.LambdaLR(
        optimizer, lambda t: min((t + 1) / 40, (400 - t) / 360)
    ),
    "warmup from 0": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda t: min(t / 40, (400 - t) / 360)),
}


FAMILIES_UNDER_SCHEDULES: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (SGD, {}),
    "heavy ball": (SGD, {"momentum": 0.9}),
    "AdamW": (AdamW, {}),
}


@functools.cache
def under_schedule(family: str, name: str) -> tuple[list[float], list[float], float, float]:
    """The losses and the scales of 400 steps, and the loss on all data before and after them."""
    cls, settings = FAMILIES_UNDER_SCHEDULES[family]
    network = classifier()
    optimizer = cls(network.parameters(), lr=0.01, **settings)
    scheduler = SCHEDULES[name](optimizer)
    hd = HypergradientLR(optimizer)
    scales: list[float] = []

    def after() -> None:
        scales.extend(hd.scales)
        scheduler.step()

    start = whole_loss(network)
    losses = train(network, optimizer, 128, 400, after=after)
    return losses, scales, start, whole_loss(network)


@pytest.mark.parametrize(("family", "name"), by_turns(FAMILIES_UNDER_SCHEDULES, SCHEDULES, every=2))
def test_it_learns_under_a_schedule(family: str, name: str) -> None:
    losses, _, start, end = under_schedule(family, name)
    assert np.isfinite(losses).all()
    assert np.mean(losses[-30:]) < 0.5 * start
    assert end < 0.5 * start


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("family", FAMILIES_UNDER_SCHEDULES)
def test_it_does_not_undo_the_decay_of_a_schedule(family: str, name: str) -> None:
    _, scales, _, _ = under_schedule(family, name)
    assert scales[-1] < 10 * np.median(scales[100:200])


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("family", FAMILIES_UNDER_SCHEDULES)
def test_between_steps_the_scheduler_has_its_own_values(family: str, name: str) -> None:
    cls, settings = FAMILIES_UNDER_SCHEDULES[family]
    runs = []
    for tuned in (False, True):
        network = reference.torch_network()
        optimizer = cls(network.parameters(), lr=0.01, **settings)
        scheduler = SCHEDULES[name](optimizer)
        hd = HypergradientLR(optimizer) if tuned else None
        written: list[float] = []

        def after(_: int, optimizer: Optimizer = optimizer, scheduler: Any = scheduler, to: Any = written) -> None:
            to.append(optimizer.param_groups[0]["lr"])
            scheduler.step()
            to.append(optimizer.param_groups[0]["lr"])

        run(network, optimizer, range(100), after)
        runs.append(written)
    assert runs[0] == runs[1]
    assert hd is not None
    assert hd.scales != [1.0]


def test_it_learns_from_clipped_gradients_and_from_accumulated_ones() -> None:
    for micro_batches in (1, 4):
        for limit in (1.0, math.inf):
            network = classifier()
            optimizer = AdamW(network.parameters(), lr=1.0)
            HypergradientLR(optimizer)

            def clip(network: nn.Module = network, limit: float = limit) -> None:
                nn.utils.clip_grad_norm_(network.parameters(), limit)

            start = whole_loss(network)
            check_learned(network, train(network, optimizer, 64, 200, clip, micro_batches=micro_batches), start)


@pytest.mark.parametrize(("cls", "settings"), FAMILIES)
def test_four_quarter_batches_are_one_batch(cls: Any, settings: dict[str, Any]) -> None:
    ends = []
    for parts in (1, 4):
        network = reference.torch_network()
        optimizer = cls(network.parameters(), lr=0.01, **settings)
        hd = HypergradientLR(optimizer)
        lrs = []
        for x, y in reference.torch_batches()[:100]:
            optimizer.zero_grad()
            for quarter, target in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (reference.torch_loss(network, quarter, target) / parts).backward()
            optimizer.step()
            lrs += hd.lrs
        ends.append(lrs)
    np.testing.assert_allclose(ends[1], ends[0], rtol=1e-9)


# ---------------------------------------------------------------------- where to start from


def test_a_configured_start_of_zero_is_refused() -> None:
    optimizer = SGD([nn.Parameter(torch.ones(1))], lr=0.0)
    with pytest.raises(ValueError, match=r"start='configured' cannot leave a learning rate of 0: configure a positive"):
        HypergradientLR(optimizer, Auto(start="configured"))
    HypergradientLR(optimizer)  # nothing was left behind, and the default has no use for the configured rate


@pytest.mark.parametrize(("cls", "settings"), FAMILIES)
def test_the_first_step_of_a_configured_start_is_that_of_the_optimizer_alone(
    cls: Any, settings: dict[str, Any]
) -> None:
    networks = []
    for tuned in (False, True):
        network = reference.torch_network()
        optimizer = cls(network.parameters(), lr=0.01, **settings)
        if tuned:
            hd = HypergradientLR(optimizer, Auto(start="configured"))
        run(network, optimizer, range(1))
        networks.append(network)
    assert same(*networks)
    assert hd.lrs == [0.01]
    run(network, optimizer, range(1, 2))
    assert abs(math.log(hd.lrs[0] / 0.01)) <= 0.1 + 1e-12


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"start": "x"}, ValueError, "start must be 'automatic' or 'configured', got 'x'"),
        ({"start": None}, ValueError, "start must be"),
    ],
)
def test_a_bad_start_is_named(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Auto(**arguments)


def test_a_hypergrad_lr_beside_the_default_rule_is_refused() -> None:
    optimizer = SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(ValueError, match=r"hypergrad_lr=0.1 has no effect on rule='auto'"):
        HypergradientLR(optimizer, hypergrad_lr=0.1)
    with pytest.raises(ValueError, match=r"hypergrad_lr=0.1 has no effect on rule='auto'"):
        HypergradientDescent(hypergrad_lr=0.1)
    with pytest.raises(ValueError, match=r"hypergrad_lr=0.1 beside a rule object"):
        HypergradientLR(optimizer, Auto(), hypergrad_lr=0.1)


@pytest.mark.parametrize("cls", [SGD, Adam, RMSprop])
def test_parameters_that_are_all_zero_get_a_first_step_of_fixed_length(cls: Any) -> None:
    p = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = cls([p], lr=1.0)
    hd = HypergradientLR(optimizer)
    p.grad = torch.tensor([3.0, 0.0, 4.0, 0.0], dtype=torch.float64)
    optimizer.step()
    assert p.norm().item() == pytest.approx(1e-4, rel=1e-6)
    if cls is SGD:
        assert hd.lrs == [pytest.approx(1e-4 / 5, rel=1e-14)]


@pytest.mark.parametrize("cls", [SGD, Adam, RMSprop])
def test_it_waits_for_a_gradient(cls: Any) -> None:
    p = nn.Parameter(torch.ones(4, dtype=torch.float64))
    optimizer = cls([p], lr=1.0)
    hd = HypergradientLR(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for gradient in (0.0, 0.0, 2.0, 2.0):
            before = p.detach().clone()
            p.grad = torch.full_like(p, gradient)
            optimizer.step()
            moved = (p - before).norm().item()
            assert (moved > 0) == (gradient > 0)
            if gradient and hd.step_count == 3:
                assert moved == pytest.approx(1e-4 * 2, rel=1e-6)
    assert hd.stats.backoffs == (0,)
    assert hd.stats.nonfinite_steps == 0


@pytest.mark.parametrize("cls", [Adam, AdamW, RMSprop])
def test_weight_decay_alone_is_no_first_step(cls: Any) -> None:
    # AdamW's direction is then λ θ, which would give a first rate of 1e-4 / λ.
    lrs = []
    for first in (0.0, 1.0):
        p = nn.Parameter(torch.ones(4, dtype=torch.float64))
        optimizer = cls([p], lr=1.0, weight_decay=0.01)
        hd = HypergradientLR(optimizer)
        for gradient in (first, 1.0):
            p.grad = torch.full_like(p, gradient)
            optimizer.step()
            if not first:
                assert torch.equal(p, torch.ones_like(p)) == (gradient == 0)
        lrs.append(hd.lrs[0])
    assert lrs[0] < 10 * lrs[1]


def test_an_update_that_raised_leaves_no_trace_in_the_rule() -> None:
    class Failing(SGD):
        fail = False

        def step(self, closure: Any = None) -> Any:
            if self.fail:
                raise OSError("full disk")
            return super().step(closure)

    p = nn.Parameter(torch.ones(4, dtype=torch.float64))
    optimizer = Failing([p], lr=1.0)
    hd = HypergradientLR(optimizer)
    for t in range(20):
        p.grad = torch.full_like(p, 30.0 if t == 12 else 1.0)
        before = hd.state_dict()["rates"]
        optimizer.fail = t in (7, 12)
        if optimizer.fail:
            with pytest.raises(OSError, match="full disk"):
                optimizer.step()
            p.grad = None
            optimizer.fail = False
            optimizer.step()  # without gradients: only now is it known that the one before came to nothing
            assert hd.state_dict()["rates"] == before
        else:
            optimizer.step()


@pytest.mark.parametrize("configured", [0.0, 1e-3, 1e3])
def test_a_group_that_is_added_without_a_rate_of_its_own_joins_in_proportion(configured: float) -> None:
    a, b, c = (nn.Parameter(torch.ones(4, dtype=torch.float64)) for _ in range(3))
    optimizer = SGD([a], lr=configured)
    hd = HypergradientLR(optimizer)

    def step() -> None:
        for p in (a, b, c):
            p.grad = torch.ones_like(p)
        optimizer.step()

    for _ in range(9):
        step()
    optimizer.add_param_group({"params": [b]})
    step()
    assert hd.lrs[0] == hd.lrs[1]
    assert optimizer.param_groups[1]["lr"] == hd.lrs[1]
    optimizer.add_param_group({"params": [c], "lr": hd.lrs[0] / 10})  # as a callback does that unfreezes layers
    step()
    assert hd.lrs[0] == hd.lrs[1] == pytest.approx(10 * hd.lrs[2], rel=1e-12)


@pytest.mark.parametrize("scope", ["global", "group"])
@pytest.mark.parametrize("cls", [SGD, AdamW, RMSprop])
def test_a_group_without_gradients_rests_until_it_gets_some(cls: Any, scope: Any) -> None:
    a, b, alone = (nn.Parameter(torch.ones(4, dtype=torch.float64)) for _ in range(3))
    optimizer, other = cls([{"params": [a]}, {"params": [b]}], lr=1.0), cls([alone], lr=1.0)
    hd, single = HypergradientLR(optimizer, scope=scope), HypergradientLR(other)
    for _ in range(5):
        a.grad, alone.grad = torch.ones_like(a), torch.ones_like(a)
        optimizer.step()
        other.step()
        assert hd.lrs[0] == single.lrs[0]
    assert torch.equal(b, torch.ones_like(b))
    b.grad = torch.ones_like(b)
    optimizer.step()
    length = (b - 1).norm().item()
    if scope == "group":
        assert length == pytest.approx(1e-4 * 2, rel=1e-6), "its first step"
    else:
        assert hd.lrs[0] == hd.lrs[1]
        moved = torch.cat([a.detach(), b.detach()])
        assert length < 1e-4 * moved.norm(), "the first step of both, anew"


def test_a_complex_parameter_is_two_real_ones() -> None:
    runs = []
    for convert in (torch.Tensor.clone, torch.view_as_complex):
        p = nn.Parameter(convert(torch.linspace(1, 2, 8, dtype=torch.float64).view(4, 2)))
        optimizer = Adam([p])
        hd = HypergradientLR(optimizer)
        lrs = []
        for _ in range(10):
            optimizer.zero_grad()
            p.abs().square().sum().backward()
            optimizer.step()
            lrs += hd.lrs
        runs.append(lrs)
    assert runs[1] == pytest.approx(runs[0], rel=1e-12)


# ---------------------------------------------------------------------- numbers that are not finite


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("cls", [SGD, Adam, RMSprop])
def test_a_first_gradient_that_is_not_finite_is_waited_out(cls: Any, bad: float) -> None:
    p = nn.Parameter(torch.ones(4))
    optimizer = cls([p], lr=1.0)
    hd = HypergradientLR(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        p.grad = torch.tensor([1.0, bad, 1.0, 1.0])
        optimizer.step()
        p.data.fill_(1.0)
        for key, value in optimizer.state[p].items():
            if key != "step":
                value.zero_()
        for _ in range(3):
            p.grad = torch.ones(4)
            optimizer.step()
    assert 0 < hd.lrs[0] < 1e-2
    assert hd.stats.nonfinite_steps == 1
    assert p.isfinite().all()


def test_a_direction_that_is_not_finite_is_forgotten() -> None:
    p = nn.Parameter(torch.ones(4))
    optimizer = SGD([p], lr=1.0)
    hd = HypergradientLR(optimizer)
    lrs = []
    for step in range(12):
        p.grad = torch.ones(4)
        if step == 4:
            p.grad[0] = math.nan
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
        p.data.nan_to_num_(1.0)  # what SGD has made of it
        lrs += hd.lrs
    assert hd.stats.nonfinite_steps <= 2
    assert lrs[-1] > lrs[5]
