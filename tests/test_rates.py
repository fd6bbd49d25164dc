"""Rates of groups and scopes: ratios, clamps, schedulers, groups that come late, rates that others write."""

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop, lr_scheduler

from lightning_hd import Additive, HypergradientLR
from tests import reference
from tests.test_checkpoints import differences
from tests.test_hypergradient import alternate, check_resuming, observed, run, trajectory


def test_clamps_bound_the_rate_that_is_used() -> None:
    network = reference.torch_network()
    optimizer = SGD(network.parameters(), lr=0.01)
    hd = HypergradientLR(optimizer, rule="additive", hypergrad_lr=0.01, max_lr=0.03)
    lrs = [lr for (lr,) in trajectory(network, optimizer, hd, range(100))]
    assert max(lrs) == 0.03
    network = reference.torch_network()
    optimizer = SGD(network.parameters(), lr=0.001)
    hd = HypergradientLR(optimizer, rule="additive", min_lr=0.02)
    run(network, optimizer, range(1))
    assert hd.lrs == [0.02]


def test_scope_group_is_one_learning_rate_for_each_group() -> None:
    # Two independent halves, in one optimizer with two groups or in two optimizers.
    def halves() -> list[nn.Parameter]:
        return [nn.Parameter(torch.linspace(-1, 1, 5, dtype=torch.float64) * k) for k in (1, 3)]

    def train(halves: Sequence[Tensor], *optimizers: Optimizer) -> None:
        for _ in range(20):
            for p in halves:
                p.grad = None
            sum(k * p.pow(4).sum() for k, p in enumerate(halves, start=1)).backward()  # type: ignore[union-attr]
            for optimizer in optimizers:
                optimizer.step()

    together = halves()
    optimizer = SGD([{"params": [together[0]], "lr": 0.01}, {"params": [together[1]], "lr": 0.0002}], lr=1.0)
    hd = HypergradientLR(optimizer, "additive", hypergrad_lr=1e-10, scope="group")
    train(together, optimizer)
    apart = halves()
    optimizers = [SGD([p], lr=lr) for p, lr in zip(apart, (0.01, 0.0002), strict=True)]
    each = [HypergradientLR(o, "additive", hypergrad_lr=1e-10) for o in optimizers]
    train(apart, *optimizers)
    assert hd.lrs == [each[0].lrs[0], each[1].lrs[0]]
    assert 0.01 < hd.lrs[0] < 0.011
    assert 0.0002 < hd.lrs[1] < 0.0003
    assert len(hd.last) == 2


def test_scope_global_keeps_the_configured_ratios() -> None:
    network = reference.torch_network()
    p = list(network.parameters())
    optimizer = SGD([{"params": p[:2], "lr": 0.01}, {"params": p[2:], "lr": 0.04}, {"params": [], "lr": 0.0}], lr=1.0)
    hd = HypergradientLR(optimizer, "additive", hypergrad_lr=1e-3)
    for lrs in trajectory(network, optimizer, hd, range(30)):
        assert lrs[0] / lrs[1] == pytest.approx(0.25, rel=1e-12)
        assert lrs[2] == 0
    assert hd.lrs[1] > 0.041
    assert hd.scales == [pytest.approx(hd.lrs[1] / 0.04)]


def test_hypergradient_of_several_groups_is_the_finite_difference_in_the_shared_rate() -> None:
    def loss_after(scale: float) -> float:
        network = reference.torch_network()
        p = list(network.parameters())
        optimizer = AdamW(
            [{"params": p[:2], "lr": 0.01 * scale}, {"params": p[2:], "lr": 0.04 * scale, "weight_decay": 0.0}],
            weight_decay=0.1,
        )
        run(network, optimizer, range(1))
        x, y = reference.torch_batches()[1]
        return float(reference.torch_loss(network, x, y).detach())

    network = reference.torch_network()
    p = list(network.parameters())
    optimizer = AdamW(
        [{"params": p[:2], "lr": 0.01}, {"params": p[2:], "lr": 0.04, "weight_decay": 0.0}], weight_decay=0.1
    )
    hd = HypergradientLR(optimizer, rule="additive", hypergrad_lr=0)
    run(network, optimizer, range(2))
    difference = (loss_after(1 + 1e-4) - loss_after(1 - 1e-4)) / (2 * 1e-4 * 0.04)  # α is the largest rate
    assert observed(hd).hypergradient == pytest.approx(difference, rel=1e-6)


@pytest.mark.parametrize("scope", ["global", "group"])
@pytest.mark.parametrize("cls", [SGD, Adam, RMSprop])
def test_a_group_added_in_mid_training_joins_at_its_configured_rate(cls: Any, scope: Any) -> None:
    network = reference.torch_network()
    p = list(network.parameters())
    optimizer = cls(p[:2], lr=0.01)
    hd = HypergradientLR(optimizer, "multiplicative", hypergrad_lr=0.02, scope=scope)
    run(network, optimizer, range(20))
    (before,) = hd.lrs
    assert before > 0.0101
    optimizer.add_param_group({"params": p[2:], "lr": 0.005})
    assert hd.lrs == [before, 0.005]
    run(network, optimizer, range(20, 21))
    first, joined = hd.lrs
    factor = first / before if scope == "global" else 1.0
    assert joined == pytest.approx(0.005 * factor, rel=1e-12)
    run(network, optimizer, range(21, 40))
    assert hd.lrs[1] != joined
    if scope == "global":
        assert hd.lrs[1] / hd.lrs[0] == pytest.approx(joined / first, rel=1e-12)


def test_a_rate_that_somebody_writes_is_taken_over() -> None:
    network = reference.torch_network()
    optimizer = SGD(network.parameters(), lr=0.01)
    hd = HypergradientLR(optimizer, "multiplicative", hypergrad_lr=0.02)
    run(network, optimizer, range(10))
    optimizer.param_groups[0]["lr"] = 0.5
    run(network, optimizer, range(10, 11))
    assert hd.lrs[0] == pytest.approx(0.5 * (1 + 0.02 * observed(hd).cosine), rel=1e-12)
    optimizer.param_groups[0]["lr"] = math.nan
    with pytest.raises(ValueError, match=r"lr of SGD param_groups\[0\] must be a finite number"):
        optimizer.step()


def test_the_update_under_a_schedule_is_taken_at_the_effective_rate() -> None:
    p = nn.Parameter(torch.tensor([4.0], dtype=torch.float64))
    optimizer = SGD([p], lr=0.1)
    scheduler = lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    hd = HypergradientLR(optimizer, "multiplicative", hypergrad_lr=0.5)
    for _ in range(4):
        optimizer.zero_grad()
        (p**2).sum().backward()
        before = p.item()
        optimizer.step()
        assert before - p.item() == pytest.approx(hd.lrs[0] * 2 * before, rel=1e-12)
        scheduler.step()
    assert hd.scales == [pytest.approx(1.5**3)]


def test_the_additive_rule_under_a_rising_schedule_is_the_papers_on_the_effective_rate() -> None:
    # NumPy: α_t = (α_{t-1} - β h_t) s_t / s_{t-1}, as long as the schedule s has not come down.
    schedule = [1 + 0.25 * t for t in range(40)]
    parameters, lr, expected = reference.initial_parameters(), 0.004, []
    direction = reference.directions("sgd", {})
    next(direction)
    last_d: list[reference.Array] = []
    for t, (x, y) in enumerate(reference.batches()[:40]):
        _, g = reference.network_loss(parameters, x, y)
        if last_d:
            lr = (lr + 1e-3 * reference.dot(g, last_d)) * schedule[t] / schedule[t - 1]
        last_d = direction.send(g)
        parameters = [p - lr * d for p, d in zip(parameters, last_d, strict=True)]
        expected.append(lr)
    network = reference.torch_network()
    optimizer = SGD(network.parameters(), lr=0.004)
    scheduler = lr_scheduler.LambdaLR(optimizer, schedule.__getitem__)
    hd = HypergradientLR(optimizer, "additive", hypergrad_lr=1e-3)
    mine: list[float] = []

    def after(step: int) -> None:
        mine.append(hd.lrs[0])
        if step < 39:
            scheduler.step()

    run(network, optimizer, range(40), after)
    assert hd.scales[0] > 1.1
    np.testing.assert_allclose(mine, expected, rtol=1e-10)


def test_hypergradient_under_a_schedule_is_the_finite_difference_in_the_scale() -> None:
    def loss_after(scale: float) -> float:
        network = reference.torch_network()
        optimizer = SGD(network.parameters(), lr=0.1 * 0.5 * scale)  # the schedule has halved it
        run(network, optimizer, range(1))
        x, y = reference.torch_batches()[1]
        return float(reference.torch_loss(network, x, y).detach())

    network = reference.torch_network()
    optimizer = SGD(network.parameters(), lr=0.1)
    lr_scheduler.LambdaLR(optimizer, lambda _: 0.5)
    hd = HypergradientLR(optimizer, rule="additive", hypergrad_lr=0)
    run(network, optimizer, range(2))
    assert hd.lrs == [0.05]
    difference = (loss_after(1 + 1e-5) - loss_after(1 - 1e-5)) / (2 * 1e-5 * 0.1)
    assert observed(hd).hypergradient == pytest.approx(difference, rel=1e-6)


def test_a_schedule_of_a_zero_rate_is_told() -> None:
    network = reference.torch_network()
    optimizer = SGD(network.parameters(), lr=0.0)
    lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    HypergradientLR(optimizer)
    with pytest.warns(RuntimeWarning, match="the scheduled learning rate is 0"):
        run(network, optimizer, range(2))


def test_a_removed_group_is_named() -> None:
    a, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = SGD([{"params": [a]}, {"params": [b]}], lr=0.1)
    HypergradientLR(optimizer)
    del optimizer.param_groups[1]
    a.grad = torch.ones(1)
    with pytest.raises(RuntimeError, match="groups can be added but not removed"):
        optimizer.step()


def test_groups_with_rates_of_their_own_must_not_share_a_tensor() -> None:
    groups = [{"params": [nn.Parameter(torch.ones(1))]} for _ in range(2)]
    with pytest.raises(ValueError, match="scope='group' needs a learning rate of its own for each group"):
        HypergradientLR(Adam(groups, lr=torch.tensor(0.1)), scope="group")


DAMAGED: list[tuple[str, Any]] = [
    ("step_count", -3),
    ("nonfinite_steps", 0.5),
    ("view", 5),
    ("view.memory", None),
    ("view.memory", torch.zeros(3)),
    ("view.parameters.0.size", 7.5),
    ("view.parameters.0.updated", 1),
    ("rates", None),
    ("rates.scheduled", "False"),
    ("rates.scopes", []),
    ("rates.scopes.0.lr", math.nan),
    ("rates.scopes.0.used", None),
    ("rates.scopes.0.reference", "0.1"),
    ("rates.scopes.0.reference", 0),
    ("rates.scopes.0.tuned", 0),
    ("rates.scopes.0.moved", None),
    ("rates.scopes.0.vanished", -1),
    ("rates.scopes.0.rule.brake.left", math.inf),
    ("rates.scopes.0.rule.brake.variance", -1.0),
    ("rates.scopes.0.rule.brake.mean", math.nan),
    ("rates.scopes.0.rule.backoffs", 1.5),
    ("rates.groups.0.lr", 10**400),
    ("rates.groups.0.join", 0.0),
    ("rates.groups.0.base", "no"),
    ("rates.groups.0.held", None),
    ("rates.trajectories.0.points", [math.nan]),
    ("rates.trajectories.0.stride", 0),
    ("nonlinear", 1),
]


@pytest.mark.parametrize(("path", "value"), DAMAGED)
def test_a_damaged_state_is_refused_and_changes_nothing(path: str, value: Any) -> None:
    check_damage("auto", path, value)


def check_damage(rule: Any, path: str, value: Any) -> None:
    hds = []
    for _ in range(2):
        network = reference.torch_network()
        optimizer = SGD(network.parameters(), lr=0.1)
        hds.append(HypergradientLR(optimizer, rule))
        run(network, optimizer, range(3))
    saved = copy.deepcopy(hds[0].state_dict())
    *way, last = path.split(".")
    place: Any = saved
    for key in way:
        place = place[int(key) if key.isdigit() else key]
    place[int(last) if last.isdigit() else last] = value
    with pytest.raises(ValueError, match=r"the saved state is damaged"):
        hds[0].load_state_dict(saved)
    assert differences(hds[0].state_dict(), hds[1].state_dict()) == 0


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("view", 5),
        ("view.groups.0.weight", math.inf),
        ("view.groups.0.moved", [-1]),
        ("view.groups.0.direction", {"family": "Gradient", "momentum": 1}),
    ],
)
def test_a_damaged_state_of_a_paper_rule_is_refused_and_changes_nothing(path: str, value: Any) -> None:
    check_damage("additive", path, value)


def test_a_damaged_rule_of_one_group_leaves_those_of_the_others() -> None:
    p = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    hd = HypergradientLR(SGD([{"params": [q]} for q in p], lr=0.1), scope="group")
    before = hd.state_dict()
    saved = copy.deepcopy(before)
    saved["rates"]["scopes"][0]["rule"]["brake"]["count"] = 7
    saved["rates"]["scopes"][1]["rule"]["brake"]["count"] = -1
    with pytest.raises(ValueError, match=r"brake\.count must not be negative"):
        hd.load_state_dict(saved)
    assert differences(hd.state_dict(), before) == 0


def test_a_tensor_rate_that_groups_share_under_a_schedule() -> None:
    ends = []
    for shared in (True, False):
        p = [nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(2)]
        lr = torch.tensor(0.1, dtype=torch.float64)
        groups = [{"params": [q], **({} if shared else {"lr": lr.clone()})} for q in p]
        optimizer = Adam(groups, lr=lr)
        scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
        hd = HypergradientLR(optimizer, "multiplicative", hypergrad_lr=0.1)
        rows = []
        for _ in range(6):
            for q in p:
                q.grad = torch.ones_like(q)
            optimizer.step()
            rows.append([*hd.lrs, *hd.scales, *(float(g["lr"]) for g in optimizer.param_groups)])
            scheduler.step()
        ends.append(rows)
    assert ends[0] == ends[1]
    assert ends[0][-1][-1] == pytest.approx(0.1 * 0.9**5)


@pytest.mark.parametrize("scheduled", [False, True])
def test_a_clamp_is_left_as_soon_as_the_hypergradient_turns(scheduled: bool) -> None:
    p = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = SGD([p], lr=0.1)
    if scheduled:
        lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    hd = HypergradientLR(optimizer, "multiplicative", hypergrad_lr=0.2, min_lr=0.01)
    alternate(p, optimizer, [1, -1] * 40)
    assert hd.lrs == pytest.approx([0.01])
    alternate(p, optimizer, [1, 1, 1])
    assert hd.lrs == pytest.approx([0.01 * 1.2**2])


def test_a_schedule_at_zero_does_not_let_the_scale_go_below_the_clamp() -> None:
    p = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = SGD([p], lr=0.1)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda t: 1.0 if t < 2 else 0.0)
    hd = HypergradientLR(optimizer, "additive", hypergrad_lr=1.0)
    for sign in (1, 1, -1, -1):
        alternate(p, optimizer, [sign])
        assert hd.scales[0] >= 0
        scheduler.step()


def test_a_negative_clamp_holds_for_every_group() -> None:
    p = [nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(2)]
    optimizer = SGD([{"params": [p[0]], "lr": 0.1}, {"params": [p[1]], "lr": 0.01}], lr=1.0)
    hd = HypergradientLR(optimizer, "additive", hypergrad_lr=1.0, min_lr=-0.05)
    for sign in [1.0, -1.0] * 5:
        p[1].grad = torch.zeros(1, dtype=torch.float64)
        alternate(p[0], optimizer, [sign])
    assert hd.lrs == [-0.05, -0.05]


def test_a_clamped_group_does_not_move_with_the_scope() -> None:
    a, b = (nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(2))
    optimizer = SGD([{"params": [a], "lr": 0.1}, {"params": [b], "lr": 1.0}], lr=1.0)
    hd = HypergradientLR(optimizer, rule="additive", hypergrad_lr=0, max_lr=0.2)
    for _ in range(2):
        b.grad = torch.ones_like(b)
        alternate(a, optimizer, [1.0])
    assert hd.lrs == [0.1, 0.2]
    assert observed(hd).hypergradient == pytest.approx(-0.1)  # α is 1.0: only the first group follows it, at a tenth


def test_a_group_configured_at_zero_stays_there() -> None:
    a, b = (nn.Parameter(torch.ones(1)) for _ in range(2))
    optimizer = SGD([{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.0}], lr=1.0)
    hd = HypergradientLR(optimizer, rule="additive", min_lr=0.01)
    b.grad = torch.ones(1)
    alternate(a, optimizer, [1.0, 1.0])
    assert hd.lrs[1] == 0
    assert b.item() == 1


def test_a_group_added_to_one_configured_at_zero_joins_at_its_own_rate() -> None:
    a, b = (nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(2))
    optimizer = SGD([a], lr=0.0)
    hd = HypergradientLR(optimizer, rule="additive", hypergrad_lr=0)
    alternate(a, optimizer, [1.0, 1.0])
    optimizer.add_param_group({"params": [b], "lr": 0.5})
    b.grad = torch.ones_like(b)
    alternate(a, optimizer, [1.0])
    assert hd.lrs == [0.0, 0.5]
    assert b.item() == 0.5


@pytest.mark.parametrize("event", ["nothing", "group added", "rate written"])
def test_a_scope_that_touches_the_clamp_comes_back_as_a_whole(event: str) -> None:
    a, b, c = (nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(3))
    optimizer = SGD([{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.2}], lr=1.0)
    hd = HypergradientLR(optimizer, rule="additive", hypergrad_lr=0.5)
    for sign in (1.0, -1.0):
        b.grad = torch.full_like(b, sign)
        alternate(a, optimizer, [sign])
    assert hd.lrs == [0.0, 0.0]
    if event == "group added":
        optimizer.add_param_group({"params": [c], "lr": 0.3})
    if event == "rate written":
        optimizer.param_groups[0]["lr"] = 0.01
    for _ in range(3):
        b.grad = torch.full_like(b, -0.1)
        alternate(a, optimizer, [-0.1])
    assert hd.lrs[1] == pytest.approx(2 * hd.lrs[0])
    assert hd.lrs[0] > (0.01 if event == "rate written" else 0)
    if event == "group added":
        assert hd.lrs[2] == pytest.approx(3 * hd.lrs[0])


def test_a_rate_written_into_one_of_several_groups_leaves_the_others() -> None:
    network = reference.torch_network()
    p = list(network.parameters())
    optimizer = SGD([{"params": p[:2], "lr": 0.01}, {"params": p[2:], "lr": 0.02}], lr=1.0)
    hd = HypergradientLR(optimizer, "multiplicative", hypergrad_lr=0.1)
    run(network, optimizer, range(5))
    first, second = hd.lrs
    optimizer.param_groups[0]["lr"] = 0.3
    run(network, optimizer, range(5, 6))
    factor = 1 + 0.1 * observed(hd).cosine
    assert hd.lrs == [pytest.approx(0.3 * factor), pytest.approx(second * factor)]
    assert first != 0.01


@pytest.mark.parametrize("limits", [{"min_lr": 0.01}, {"max_lr": 0.05}, {"min_lr": 0.01, "max_lr": 0.05}])
@pytest.mark.parametrize(
    "make",
    [
        lambda o: lr_scheduler.LambdaLR(o, lambda t: min(1.0, t / 5)),
        lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=15),
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=7),
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=30),
    ],
)
def test_clamps_cut_a_schedule_off_and_leave_its_scale(make: Callable[[Any], Any], limits: dict[str, Any]) -> None:
    network = reference.torch_network()
    optimizer = SGD(network.parameters(), lr=0.1)
    scheduler = make(optimizer)
    hd = HypergradientLR(optimizer, rule="additive", hypergrad_lr=0, **limits)
    for step in range(29):
        scheduled = optimizer.param_groups[0]["lr"]
        run(network, optimizer, range(step, step + 1))
        expected = min(max(scheduled, limits.get("min_lr", 0.0)), limits.get("max_lr", math.inf))
        assert hd.lrs == [expected]
        assert hd.scales == [1.0]
        scheduler.step()


def test_a_schedule_does_not_thaw_a_group_configured_at_zero() -> None:
    a, b = (nn.Parameter(torch.ones(1)) for _ in range(2))
    optimizer = SGD([{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.0}], lr=1.0)
    lr_scheduler.ExponentialLR(optimizer, 0.9)
    hd = HypergradientLR(optimizer, rule="additive", hypergrad_lr=0, min_lr=0.01)
    b.grad = torch.ones(1)
    alternate(a, optimizer, [1.0])
    assert hd.lrs == [0.1, 0.0]


def test_the_transition_under_a_rising_schedule_ends_at_the_limit_at_its_peak() -> None:
    network = reference.torch_network()
    optimizer = SGD(network.parameters(), lr=0.1)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda t: min(1 + t, 5) if t < 10 else 2.5)
    hd = HypergradientLR(optimizer, Additive(0.0, limit_lr=0.05))
    lrs = []
    for step in range(12):
        run(network, optimizer, range(step, step + 1))
        lrs += hd.lrs
        scheduler.step()
    peaks = [0.1 * min(t, 5) for t in range(1, 13)]
    schedule = [*peaks[:10], 0.25, 0.25]
    assert lrs == pytest.approx(
        [
            s / peak * (peak / t**2 + 0.05 * (1 - 1 / t**2))
            for t, (s, peak) in enumerate(zip(schedule, peaks, strict=True), start=1)
        ]
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("scheduled", [False, True])
def test_a_rate_that_is_not_finite_is_refused_at_every_step(scheduled: bool, value: float) -> None:
    a, b = (nn.Parameter(torch.ones(1)) for _ in range(2))
    optimizer = SGD([a], lr=0.1)
    if scheduled:
        lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    hd = HypergradientLR(optimizer, rule="additive")
    alternate(a, optimizer, [1.0])
    optimizer.add_param_group({"params": [b], "lr": value})
    b.grad = torch.ones(1)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"lr of SGD param_groups\[1\] must be a finite number"):
            optimizer.step()
    assert hd.lrs[0] == 0.1
    assert b.item() == 1


def test_resuming_with_a_scheduler_that_leaves_no_mark() -> None:
    def build() -> tuple[nn.Module, Optimizer, HypergradientLR]:
        network = reference.torch_network()
        optimizer = SGD(network.parameters(), lr=0.01)
        return network, optimizer, HypergradientLR(optimizer, "multiplicative", hypergrad_lr=0.1, scheduled=True)

    check_resuming(build)


def test_a_schedule_that_starts_at_zero_and_rises() -> None:
    network = reference.torch_network()
    optimizer = SGD(network.parameters(), lr=0.0)
    scheduler = lr_scheduler.CyclicLR(optimizer, base_lr=0.0, max_lr=0.1, step_size_up=5, cycle_momentum=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hd = HypergradientLR(optimizer, rule="additive", hypergrad_lr=0)
        for step in range(10):
            scheduled = optimizer.param_groups[0]["lr"]
            run(network, optimizer, range(step, step + 1))
            assert hd.lrs == [scheduled]
            scheduler.step()
    assert hd.scales == [1.0]


# ---------------------------------------------------------------------- groups that are frozen by a rate of 0


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("scope", ["global", "group"])
@pytest.mark.parametrize("rule", ["auto", "additive", "multiplicative"])
def test_a_group_at_0_stays_frozen_beside_others_until_a_rate_is_written(
    rule: Any, scope: Any, scheduled: bool
) -> None:
    frozen, free = (nn.Parameter(torch.ones(3)) for _ in range(2))
    groups: list[dict[str, Any]] = [{"params": [frozen], "lr": 0.0}, {"params": [free]}]
    optimizer = Adam(groups, lr=0.01)
    scheduler = lr_scheduler.ConstantLR(optimizer, factor=1.0) if scheduled else None
    hd = HypergradientLR(optimizer, rule, scope=scope)

    def train(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            (frozen.square() + free.square()).sum().backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()

    train(20)
    assert torch.equal(frozen, torch.ones(3))
    assert hd.lrs[0] == 0 < hd.lrs[1]
    assert not torch.equal(free, torch.ones(3))
    if scheduler is None:
        optimizer.param_groups[0]["lr"] = hd.lrs[1]
        train(5)
        assert not torch.equal(frozen, torch.ones(3))
        assert hd.lrs[0] > 0


@pytest.mark.parametrize("scope", ["global", "group"])
@pytest.mark.parametrize("rule", ["auto", "additive"])
def test_groups_that_are_all_at_0_start_from_there(rule: Any, scope: Any) -> None:
    parameters = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = SGD([{"params": [p]} for p in parameters], lr=0.0)
    hd = HypergradientLR(optimizer, rule, scope=scope)
    for _ in range(5):
        optimizer.zero_grad()
        sum(p.square().sum() for p in parameters).backward()  # type: ignore[union-attr]
        optimizer.step()
    assert all(lr > 0 for lr in hd.lrs)


# ---------------------------------------------------------------------- rates that were written before a checkpoint


@pytest.mark.parametrize("written", ["before saving", "into the saved state", "after loading", "never"])
@pytest.mark.parametrize("optimizer_first", [True, False])
@pytest.mark.parametrize("tensor", [False, True])
def test_a_written_rate_survives_loading_in_either_order(written: str, optimizer_first: bool, tensor: bool) -> None:
    def fresh() -> tuple[nn.Parameter, Optimizer, HypergradientLR]:
        w = nn.Parameter(torch.ones(3))
        lr: Any = torch.tensor(0.1, dtype=torch.float64) if tensor else 0.1
        optimizer = Adam([w], lr=lr)
        return w, optimizer, HypergradientLR(optimizer, "multiplicative")

    def train(w: nn.Parameter, optimizer: Optimizer) -> None:
        optimizer.zero_grad()
        w.square().sum().backward()
        optimizer.step()

    def write(settings: dict[str, Any]) -> None:
        settings["lr"] = torch.tensor(0.01, dtype=torch.float64) if tensor else 0.01

    w, optimizer, hd = fresh()
    for _ in range(3):
        train(w, optimizer)
    learned = hd.lrs[0]
    if written == "before saving":
        write(optimizer.param_groups[0])
    saved, own = copy.deepcopy((optimizer.state_dict(), hd.state_dict()))
    if written == "into the saved state":
        write(saved["param_groups"][0])
    w, optimizer, hd = fresh()
    for mine in (False, True) if optimizer_first else (True, False):
        if mine:
            hd.load_state_dict(own)
        else:
            optimizer.load_state_dict(saved)
    if written == "after loading":
        write(optimizer.param_groups[0])
    assert float(optimizer.param_groups[0]["lr"]) == (learned if written == "never" else 0.01)
    train(w, optimizer)
    assert hd.lrs[0] == pytest.approx(learned if written == "never" else 0.01, rel=0.11)


# ---------------------------------------------------------------------- what a checkpoint must hold, or must not change


def two_groups(**arguments: Any) -> tuple[list[nn.Parameter], Optimizer, HypergradientLR]:
    parameters = [nn.Parameter(torch.linspace(-1, 1, 5) * k) for k in (1, 3)]
    optimizer = SGD([{"params": parameters[:1], "lr": 0.1}, {"params": parameters[1:], "lr": 0.01}], momentum=0.9)
    return parameters, optimizer, HypergradientLR(optimizer, **arguments)


def steps_of(
    parameters: list[nn.Parameter], optimizer: Optimizer, hd: HypergradientLR, count: int
) -> list[list[float]]:
    lrs = []
    for _ in range(count):
        optimizer.zero_grad()
        torch.stack([(p - 0.3).square().sum() * k for k, p in enumerate(parameters, 1)]).sum().backward()
        optimizer.step()
        lrs.append(hd.lrs)
    return lrs


def test_a_group_at_a_clamp_resumes_exactly() -> None:
    parameters, optimizer, hd = two_groups(max_lr=0.01)
    steps_of(parameters, optimizer, hd, 30)
    saved = copy.deepcopy(([p.detach() for p in parameters], optimizer.state_dict(), hd.state_dict()))
    assert hd.lrs[0] == 0.01 > hd.lrs[1]
    again = two_groups(max_lr=0.01)
    for p, data in zip(again[0], saved[0], strict=True):
        p.data.copy_(data)
    again[1].load_state_dict(saved[1])
    again[2].load_state_dict(saved[2])
    assert steps_of(parameters, optimizer, hd, 20) == steps_of(*again, 20)


@pytest.mark.parametrize("added", [0, 3])
@pytest.mark.parametrize("scope", ["global", "group"])
@pytest.mark.parametrize("rule", ["auto", "additive", "multiplicative"])
def test_a_state_that_is_saved_after_a_group_was_added_resumes_exactly(rule: Any, scope: Any, added: int) -> None:
    def grow() -> tuple[list[nn.Parameter], Optimizer, HypergradientLR]:
        parameters = [nn.Parameter(torch.linspace(-1, 1, 5) * k) for k in (1, 3)]
        optimizer = SGD(parameters[:1], lr=0.01, momentum=0.9)
        return parameters, optimizer, HypergradientLR(optimizer, rule, scope=scope)

    parameters, optimizer, hd = grow()
    steps_of(parameters, optimizer, hd, 12)
    optimizer.add_param_group({"params": parameters[1:], "lr": 0.002})
    steps_of(parameters, optimizer, hd, added)
    saved = copy.deepcopy(([p.detach() for p in parameters], optimizer.state_dict(), hd.state_dict()))
    again = grow()
    again[1].add_param_group({"params": again[0][1:], "lr": 0.002})
    for p, data in zip(again[0], saved[0], strict=True):
        p.data.copy_(data)
    again[1].load_state_dict(saved[1])
    again[2].load_state_dict(saved[2])
    assert steps_of(parameters, optimizer, hd, 20) == steps_of(*again, 20)


@pytest.mark.parametrize("damaged", [[], {}, [{}, {}]])
def test_a_state_without_all_trajectories_is_refused(damaged: Any) -> None:
    state = two_groups()[2].state_dict()
    state["rates"]["trajectories"] = damaged
    with pytest.raises(ValueError, match="damaged"):
        two_groups()[2].load_state_dict(state)


@pytest.mark.parametrize("key", ["optimizer", "rule", "scope"])
def test_a_state_whose_kind_is_no_word_is_refused(key: str) -> None:
    hd = two_groups()[2]
    with pytest.raises(ValueError, match="the state is not what"):
        hd.load_state_dict({**hd.state_dict(), key: []})


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("rule", ["auto", "additive"])
def test_paused_steps_keep_the_learned_scale_under_a_scheduler(rule: Any, closure: bool) -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = SGD([p], lr=1.0)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
    hd = HypergradientLR(optimizer, rule, hypergrad_lr=1.0 if rule == "additive" else None)

    def step() -> float:
        """Take a step, and return the rate that it had."""

        def backward() -> torch.Tensor:
            optimizer.zero_grad()
            loss = 0.05 * p.square().sum()
            loss.backward()
            return loss

        before = p.detach().clone()
        if closure:
            optimizer.step(backward)  # type: ignore[arg-type]
        else:
            backward()
            optimizer.step()
        scheduler.step()
        return ((before - p.detach()) / (0.1 * before)).mean().item()

    for _ in range(10):
        step()
    scale, held = hd.scales[0], optimizer.param_groups[0]["lr"]
    assert abs(math.log(scale)) > 0.01
    hd.paused = True
    for n in range(3):
        assert step() == pytest.approx(scale * held * 0.9**n, rel=1e-4)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(held * 0.9**3), "between steps it is the scheduler's own"
    assert hd.scales == [scale]
    assert hd.step_count == 10


@pytest.mark.parametrize("broken", ["looks", "view", "rates", "step_count"])
def test_a_state_that_cannot_be_loaded_changes_nothing(broken: str) -> None:
    parameters, optimizer, hd = two_groups()
    steps_of(parameters, optimizer, hd, 20)
    bad = {**hd.state_dict(), broken: "damaged"}
    fresh, untouched = two_groups(), two_groups()
    with pytest.raises(ValueError, match="damaged"):
        fresh[2].load_state_dict(bad)
    assert differences(fresh[2].state_dict(), untouched[2].state_dict()) == 0
    assert steps_of(*fresh, 5) == steps_of(*untouched, 5)


# ---------------------------------------------------------------------- losses that are reported


def test_a_reported_loss_is_the_one_of_then_and_only_counts_while_tuning() -> None:
    parameters, optimizer, hd = two_groups()
    buffer = torch.zeros(())
    for loss in (1.0, 2.0, 6.0):
        hd.observe(buffer.fill_(loss))
    assert hd.state_dict()["looks"]["reported"] == [1.0, 2.0, 6.0]
    steps_of(parameters, optimizer, hd, 1)
    hd.paused = True
    hd.observe(1.0)
    hd.paused = False
    assert hd.state_dict()["looks"]["reported"] == []
    with pytest.raises(TypeError, match="loss must be a real number"):
        hd.observe(torch.zeros((), device="meta"))
    hd.detach()
    hd.observe(1.0)
    assert hd.state_dict()["looks"]["reported"] == []
