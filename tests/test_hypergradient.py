"""HypergradientLR in plain loops: against the NumPy reference, and against the same training without it."""

import contextlib
import copy
import gc
import math
import pickle
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop, lr_scheduler

from lightning_hd import Additive, Auto, Context, HypergradientLR, Multiplicative, Observation, Rule
from lightning_hd.rules import make_rule
from tests import reference
from tests.pairs import covering, pairwise
from tests.test_directions import CLASSES, REFUSED, CautiousAdam, SignDescent

PAPER = {
    "sgd": (SGD, {}, 1e-3),
    "sgdn": (SGD, {"momentum": 0.9, "nesterov": True}, 1e-3),
    "heavy_ball": (SGD, {"momentum": 0.9, "dampening": 0.3}, 1e-3),
    "adam": (Adam, {}, 1e-5),
}
FAMILIES: list[tuple[Any, dict[str, Any]]] = [
    (SGD, {}),
    (SGD, {"momentum": 0.9, "weight_decay": 0.01}),
    (SGD, {"momentum": 0.9, "nesterov": True}),
    (Adam, {"amsgrad": True}),
    (AdamW, {"weight_decay": 0.1}),
    (RMSprop, {"momentum": 0.5}),
    (SignDescent, {}),
]

BETAS = {"additive": 1e-5, "multiplicative": 0.02, "auto": None}


class Standing(Auto):
    def update(self, lr: float, seen: Observation, context: Context) -> float:
        return lr

    def watch(self, lr: float, loss: float, context: Context) -> float:
        return lr


STANDING = [Additive(hypergrad_lr=0), Standing(start="configured")]
"""Rules that leave the rate where it is configured."""


def run(network: nn.Module, optimizer: Optimizer, steps: range, after: Callable[[int], None] = lambda _: None) -> None:
    batches = reference.torch_batches()
    dtype = next(network.parameters()).dtype
    for step in steps:
        x, y = batches[step]
        optimizer.zero_grad()
        reference.torch_loss(network, x.to(dtype), y.to(dtype)).backward()
        optimizer.step()
        after(step)


def trajectory(network: nn.Module, optimizer: Optimizer, hd: HypergradientLR, steps: range) -> list[list[float]]:
    lrs: list[list[float]] = []
    run(network, optimizer, steps, lambda _: lrs.append(hd.lrs))
    return lrs


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def observed(hd: HypergradientLR, scope: int = 0) -> Observation:
    seen = hd.last[scope]
    assert seen is not None
    return seen


# ---------------------------------------------------------------------- the paper


@pytest.mark.parametrize(
    ("method", "rule", "with_closure"), covering(PAPER, ["additive", "multiplicative"], [False, True])
)
def test_trajectory_is_the_papers(method: str, rule: Any, with_closure: bool) -> None:
    cls, settings, beta = PAPER[method]
    beta = beta if rule == "additive" else 0.02
    lrs, parameters = reference.train(method, rule, 0.01, beta, settings)
    network = reference.torch_network()
    optimizer = cls(network.parameters(), lr=0.01, **settings)  # type: ignore[arg-type]
    hd = HypergradientLR(optimizer, rule, hypergrad_lr=beta, min_lr=None)
    mine = []
    for x, y in reference.torch_batches():

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = reference.torch_loss(network, x, y)
            loss.backward()
            return loss

        if with_closure:
            assert optimizer.step(closure).item() > 0  # type: ignore[arg-type, union-attr]
        else:
            closure()
            optimizer.step()
        mine += hd.lrs
    assert lrs[-1] > 1.1 * lrs[0], "the comparison needs a rate that moves"
    np.testing.assert_allclose(mine, lrs, rtol=1e-10)
    for p, expected in zip(network.parameters(), parameters, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=1e-10)


def test_additive_rule_goes_negative_only_without_a_clamp() -> None:
    ends = {}
    for min_lr in (None, 0.0):
        w = nn.Parameter(torch.ones(1, dtype=torch.float64))
        optimizer = SGD([w], lr=0.6)
        hd = HypergradientLR(optimizer, rule="additive", hypergrad_lr=0.5, min_lr=min_lr)
        for _ in range(2):  # f = w²: the first step overshoots, so the rate falls by 0.5 · 2 · 0.4
            optimizer.zero_grad()
            w.square().sum().backward()
            optimizer.step()
        ends[min_lr] = hd.lrs[0]
        assert optimizer.param_groups[0]["lr"] == hd.lrs[0]
    assert ends == {None: pytest.approx(0.6 - 0.5 * 2 * 0.4), 0.0: pytest.approx(0.2)}
    w = nn.Parameter(torch.ones(1))
    optimizer = SGD([w], lr=0.9)
    hd = HypergradientLR(optimizer, rule="additive", hypergrad_lr=1.0, min_lr=None)
    clamped = HypergradientLR(
        twin := SGD([v := nn.Parameter(torch.ones(1))], lr=0.9), rule="additive", hypergrad_lr=1.0
    )
    for _ in range(2):
        for p, o in ((w, optimizer), (v, twin)):
            o.zero_grad()
            p.square().sum().backward()
            o.step()
    assert hd.lrs[0] == pytest.approx(0.9 - 4 * 0.8)
    assert clamped.lrs == [0.0]


def test_transition_ends_at_the_limit_and_leaves_alpha_alone() -> None:
    network = reference.torch_network()
    optimizer = SGD(network.parameters(), lr=0.05)
    hd = HypergradientLR(optimizer, Additive(hypergrad_lr=0.0, limit_lr=0.01))
    lrs = [lr for (lr,) in trajectory(network, optimizer, hd, range(50))]
    assert lrs == pytest.approx([0.05 / t**2 + 0.01 * (1 - 1 / t**2) for t in range(1, 51)], rel=1e-12)


# ---------------------------------------------------------------------- variants that must agree


@pytest.mark.parametrize("rule", BETAS)
@pytest.mark.parametrize(
    ("cls", "settings"),
    [(SGD, {}), (SGD, {"momentum": 0.9}), (SGD, {"momentum": 0.9, "nesterov": True}), (Adam, {}), (AdamW, {})],
)
def test_foreach_fused_and_single_tensor_agree(cls: Any, settings: dict[str, Any], rule: Any) -> None:
    ends = []
    for variant in ({"foreach": False}, {"foreach": True}, {"fused": True}):
        network = reference.torch_network()
        optimizer = cls(network.parameters(), lr=0.01, **settings, **variant)
        hd = HypergradientLR(optimizer, rule, hypergrad_lr=BETAS[rule])
        ends.append(np.array(trajectory(network, optimizer, hd, range(20))))
    np.testing.assert_allclose(ends[1], ends[0], rtol=1e-10)
    np.testing.assert_allclose(ends[2], ends[0], rtol=1e-10)


@pytest.mark.parametrize(("family", "lr", "rule"), covering(FAMILIES, [0.01, 0.0], ["additive", "auto"]))
def test_one_group_or_three_make_the_same_trajectory(family: tuple[Any, dict[str, Any]], lr: float, rule: Any) -> None:
    cls, settings = family
    runs = []
    for split in (False, True):
        network = reference.torch_network()
        p = list(network.parameters())
        groups = [{"params": p[:1]}, {"params": p[1:3]}, {"params": p[3:]}] if split else p
        optimizer = cls(groups, lr=lr, **settings)
        hd = HypergradientLR(optimizer, rule, hypergrad_lr=1e-4 if rule == "additive" else None)
        runs.append((trajectory(network, optimizer, hd, range(30)), network))
    assert [lrs[0] for lrs in runs[0][0]] == [lrs[0] for lrs in runs[1][0]]
    assert all(len(set(lrs)) == 1 for lrs in runs[1][0])
    assert runs[0][0][-1] != [lr], "the rate moved"
    assert same(runs[0][1], runs[1][1])


@pytest.mark.parametrize("lr", [0.01, 0.0])
@pytest.mark.parametrize("name", [name for name in CLASSES if name not in REFUSED])
def test_without_hypergrad_lr_training_is_the_same_bit_for_bit(name: str, lr: float) -> None:
    networks = []
    for attached in (False, True):
        network = nn.Sequential(nn.Linear(5, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False))
        with torch.no_grad():
            for p in network.parameters():
                p.copy_(torch.linspace(-1, 1, p.numel()).view_as(p))
        optimizer = CLASSES[name](network.parameters(), lr=lr)  # type: ignore[call-arg]
        if attached:
            HypergradientLR(optimizer, rule="additive", hypergrad_lr=0)
        run(network, optimizer, range(20))
        networks.append(network)
    assert same(*networks)


@pytest.mark.parametrize(("cls", "settings"), [family for family in FAMILIES if family[0] is not SignDescent])
def test_a_complex_parameter_is_two_real_ones(cls: Any, settings: dict[str, Any]) -> None:
    ends = []
    start = torch.linspace(-1, 1, 8, dtype=torch.float64).view(4, 2)
    target = torch.linspace(2, -1, 8, dtype=torch.float64).view(4, 2)
    for make in (torch.view_as_complex, lambda x: x):
        p = nn.Parameter(make(start.clone()))
        optimizer = cls([p], lr=0.01, **settings)
        hd = HypergradientLR(optimizer, "multiplicative", hypergrad_lr=0.05)
        lrs = []
        for _ in range(20):
            optimizer.zero_grad()
            real = torch.view_as_real(p) if p.is_complex() else p
            ((real - target).square() * torch.arange(1, 9).view(4, 2)).sum().backward()
            optimizer.step()
            lrs += hd.lrs
        ends.append(lrs)
    np.testing.assert_allclose(ends[0], ends[1], rtol=1e-12)
    assert ends[0][-1] > 0.011


# ---------------------------------------------------------------------- parameters and groups that come and go


@pytest.mark.parametrize(("cls", "settings"), FAMILIES)
def test_a_parameter_without_a_gradient_contributes_nothing(cls: Any, settings: dict[str, Any]) -> None:
    a, b, b_alone = (nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64)) for _ in range(3))
    optimizer, alone = cls([a, b], lr=0.01, **settings), cls([b_alone], lr=0.01, **settings)
    hd, hd_alone = (
        HypergradientLR(optimizer, rule="additive", hypergrad_lr=0),
        HypergradientLR(alone, rule="additive", hypergrad_lr=0),
    )

    def step(*with_gradient: Tensor) -> None:
        for p in (a, b, b_alone):
            p.grad = 2 * p.detach() if any(p is other for other in with_gradient) else None
        optimizer.step()
        alone.step()

    step(a, b, b_alone)
    step(a, b, b_alone)
    resting = a.detach().clone()
    step(b, b_alone)
    assert torch.equal(a, resting)
    step(a, b, b_alone)  # only b moved in the step before
    assert observed(hd).hypergradient == observed(hd_alone).hypergradient < 0
    assert observed(hd).direction_norm == observed(hd_alone).direction_norm
    assert observed(hd).grad_norm > observed(hd_alone).grad_norm
    step(a, b, b_alone)
    assert observed(hd).hypergradient < 1.5 * observed(hd_alone).hypergradient, "a counts again"
    step(a)
    step(b)
    assert hd.last == [None], "the one that moved has no gradient, the one with a gradient did not move"


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_step_with_rates_and_gradients_of_0_counts_where_the_optimizer_has_a_state(momentum: float) -> None:
    w = nn.Parameter(torch.zeros(()))
    optimizer = SGD([w], lr=0.0, momentum=momentum)
    hd = HypergradientLR(optimizer, "additive", hypergrad_lr=1e-3, min_lr=None)
    counts = []
    for gradient in (0.0, 1.0, 0.0, 1.0):
        w.grad = torch.full((), gradient)
        optimizer.step()
        counts.append(hd.step_count)
    assert counts == ([0, 1, 2, 3] if momentum else [0, 1, 1, 2])


def test_a_step_without_any_gradient_changes_nothing() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = SGD([p], lr=0.1)
    hd = HypergradientLR(optimizer, rule="additive")
    optimizer.step()
    optimizer.step()
    assert hd.lrs == [0.1]
    assert hd.last == [None]


# ---------------------------------------------------------------------- a GradScaler, and steps that do not happen


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("rule", ["multiplicative", "auto"])
@pytest.mark.parametrize(("cls", "settings"), [(SGD, {}), (SGD, {"momentum": 0.9, "nesterov": True}), (Adam, {})])
def test_a_grad_scaler_changes_nothing_and_its_skipped_steps_count_for_nothing(
    cls: Any, settings: dict[str, Any], rule: Any, fused: bool
) -> None:
    # torch's fused SGD (2.13) leaves its momentum buffer uninitialized where its very first step is skipped
    skipped = (10,) if fused and "momentum" in settings else (0, 10)

    def train(scaled: bool) -> tuple[list[float], nn.Module]:
        network = reference.torch_network().float()
        optimizer = cls(network.parameters(), lr=0.01, fused=fused, **settings)
        hd = HypergradientLR(optimizer, rule, hypergrad_lr=BETAS[rule])
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=1024.0, growth_interval=7)
        lrs = []
        for step, (x, y) in enumerate(reference.torch_batches()[:20]):
            for spoiled in (True, False) if scaled and step in skipped else (False,):
                optimizer.zero_grad()
                scaler.scale(reference.torch_loss(network, x.float(), y.float())).backward()
                if spoiled:
                    next(network.parameters()).grad.fill_(math.inf)  # type: ignore[union-attr]
                before = hd.lrs, hd.step_count
                scaler.step(optimizer)
                scaler.update()
                if spoiled:
                    assert (hd.lrs, hd.step_count) == before
            lrs += hd.lrs
        assert hd.stats.nonfinite_steps == 0
        return lrs, network

    plain, network = train(False)
    scaled, other = train(True)
    np.testing.assert_allclose(scaled, plain, rtol=1e-6)
    for p, q in zip(network.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rule", ["additive", "multiplicative", "auto"])
@pytest.mark.parametrize("cls", [SGD, Adam, RMSprop])
def test_a_number_that_is_not_finite_leaves_the_rate_and_is_reported_once(cls: Any, rule: Any, bad: float) -> None:
    p = nn.Parameter(torch.ones(4))
    optimizer = cls([p], lr=0.01)
    hd = HypergradientLR(optimizer, rule, hypergrad_lr=None if rule == "auto" else 1e-3)
    for _ in range(3):
        p.grad = p.detach() + 1
        optimizer.step()
    before = hd.lrs
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            p.grad = torch.tensor([1.0, bad, 1.0, 1.0])
            optimizer.step()
            assert hd.lrs == before
    assert [w.category for w in caught] == [RuntimeWarning]
    assert "not a finite number" in str(caught[0].message)
    assert hd.stats.nonfinite_steps == 3


def test_a_rate_that_would_overflow_stays() -> None:
    p = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = SGD([p], lr=1.0)
    hd = HypergradientLR(optimizer, rule="additive", hypergrad_lr=1e300)
    for grad in (1e10, 1e10):
        p.grad = torch.full_like(p, grad)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
    assert hd.lrs == [1.0]
    assert hd.stats.nonfinite_steps == 1


def test_a_step_that_is_not_finite_is_counted_once_for_all_scopes() -> None:
    p = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    optimizer = SGD([{"params": [q]} for q in p], lr=0.01)
    hd = HypergradientLR(optimizer, "additive", scope="group")
    for grad in (1.0, math.nan, 1.0):
        for q in p:
            q.grad = torch.full_like(q, grad)
            q.data.nan_to_num_(1.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
    assert hd.stats.nonfinite_steps == 2, "the gradient, and the direction that it became"


def failing(*_: Any, **__: Any) -> float:
    raise OSError("gone")


def fail_in_update(optimizer: Optimizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step whose update fails, after the rate was set for it."""
    cls = type(optimizer)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[cls.__module__], cls.__name__.lower(), failing)
        with pytest.raises(OSError, match="gone"):
            optimizer.step()


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("cls", [SGD, Adam, RMSprop])
def test_a_step_that_raises_leaves_the_rate_of_the_default_rule(
    cls: Any, scheduled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    for fails in (False, True):
        network = reference.torch_network()
        optimizer = cls(network.parameters(), lr=0.01)
        if scheduled:
            lr_scheduler.LambdaLR(optimizer, lambda _: 0.5)
        hd = HypergradientLR(optimizer)
        for step in range(6):
            if fails and step in (0, 3):
                learned = hd.lrs, hd.state_dict()["rates"]
                with pytest.raises(OSError, match="gone"):
                    optimizer.step(failing)  # the backward pass fails, so nothing has happened
                assert (hd.lrs, hd.state_dict()["rates"]) == learned
            run(network, optimizer, range(step, step + 1))
        runs.append((hd.lrs, network))
    assert runs[0][0] == runs[1][0]
    assert same(runs[0][1], runs[1][1])

    before = hd.lrs, hd.step_count
    written = optimizer.param_groups[0]["lr"]
    fail_in_update(optimizer, monkeypatch)
    assert (hd.lrs, hd.step_count) == before
    run(network, optimizer, range(6, 7))
    assert abs(math.log(hd.lrs[0] / before[0][0])) <= 0.5, "the step counts from the rate before the failed one"
    assert (optimizer.param_groups[0]["lr"] == written) == scheduled


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("cls", [SGD, Adam, RMSprop])
def test_a_step_that_raises_leaves_the_rate(cls: Any, scheduled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    network = reference.torch_network()
    optimizer = cls(network.parameters(), lr=0.01)
    if scheduled:
        lr_scheduler.LambdaLR(optimizer, lambda _: 0.5)
    hd = HypergradientLR(optimizer, "multiplicative", hypergrad_lr=0.1)
    run(network, optimizer, range(5))
    before = hd.lrs, hd.step_count
    written = optimizer.param_groups[0]["lr"]

    with pytest.raises(OSError, match="gone"):
        optimizer.step(failing)  # the backward pass fails, so nothing has happened
    assert (hd.lrs, hd.step_count) == before
    run(network, optimizer, range(5, 6))
    assert hd.lrs[0] == pytest.approx(before[0][0] * (1 + 0.1 * observed(hd).cosine), rel=1e-12)

    before = hd.lrs, hd.step_count
    fail_in_update(optimizer, monkeypatch)
    assert (hd.lrs, hd.step_count) == before
    run(network, optimizer, range(6, 7))
    assert (hd.lrs, hd.last) == (before[0], [None]), "what the failed update did is not known"
    run(network, optimizer, range(7, 8))
    assert hd.lrs[0] == pytest.approx(before[0][0] * (1 + 0.1 * observed(hd).cosine), rel=1e-12)
    if scheduled:
        assert optimizer.param_groups[0]["lr"] == written


def test_a_step_in_which_it_is_detached_is_that_of_the_optimizer_alone() -> None:
    ends = []
    for tuned in (False, True):
        p = nn.Parameter(torch.ones(3))
        optimizer = SGD([p], lr=1e-3)
        hd = HypergradientLR(optimizer) if tuned else None

        def closure(p: nn.Parameter = p, hd: HypergradientLR | None = hd) -> float:
            p.grad = 20 * p.detach()
            if hd:
                hd.detach()
            return 1.0

        optimizer.step(closure)
        ends.append((p.tolist(), optimizer.param_groups[0]["lr"]))
    assert ends[0] == ends[1]


class Counting(Rule):
    """Counts its updates; one of them fails."""

    def __init__(self) -> None:
        self.updates = 0

    def update(self, lr: float, seen: Observation, context: Context) -> float:
        self.updates += 1
        if seen.grad_norm > 10:
            raise OSError("gone")
        return lr


def test_a_rule_that_fails_for_one_group_has_observed_nothing_in_the_others() -> None:
    p = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = SGD([{"params": [q]} for q in p], lr=0.01)
    hd = HypergradientLR(optimizer, Counting(), scope="group")
    for grad in (1.0, 1.0, 100.0):
        p[0].grad, p[1].grad = torch.ones(2), torch.full((2,), grad)
        with pytest.raises(OSError, match="gone") if grad > 10 else contextlib.nullcontext():
            optimizer.step()
    assert hd.step_count == 2
    with pytest.raises(OSError, match="gone"):
        optimizer.step()
    assert [scope["rule"] for scope in hd.state_dict()["rates"]["scopes"]] == [{"updates": 1}] * 2


def test_a_subclass_that_calls_its_parents_step_is_tuned_once() -> None:
    Adam([nn.Parameter(torch.ones(1))])  # its class is hooked as well from now on
    network = reference.torch_network()
    optimizer = CautiousAdam(network.parameters(), lr=0.01)
    hd = HypergradientLR(optimizer, "multiplicative", hypergrad_lr=0.02)
    run(network, optimizer, range(10))
    assert hd.step_count == 10


def test_a_closure_that_is_evaluated_twice_is_tuned_once() -> None:
    class Twice(SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            with torch.enable_grad():
                closure()
                loss = closure()
            super().step()
            return loss

    p = nn.Parameter(torch.ones(2))
    optimizer = Twice([p], lr=0.1)
    hd = HypergradientLR(optimizer, "multiplicative", hypergrad_lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert hd.lrs == [pytest.approx(0.1 * 1.1**2)]


# ---------------------------------------------------------------------- attaching and detaching


@pytest.mark.parametrize(("cls", "settings"), FAMILIES)
@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("rule", STANDING)
def test_detach_leaves_no_trace(cls: Any, settings: dict[str, Any], scheduled: bool, rule: Rule) -> None:
    def build() -> tuple[nn.Module, Optimizer]:
        network = reference.torch_network()
        optimizer: Optimizer = cls(network.parameters(), lr=0.01, **settings)
        if scheduled:
            lr_scheduler.LambdaLR(optimizer, lambda _: 0.5)
        return network, optimizer

    network, optimizer = build()
    hd = HypergradientLR(optimizer, rule)
    run(network, optimizer, range(5))
    hd.detach()
    hd.detach()  # once more does no harm
    plain, twin = build()
    run(plain, twin, range(5))
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert str(optimizer.state_dict()) == str(twin.state_dict())
    assert len(optimizer.state) == len(twin.state)
    run(network, optimizer, range(5, 10))
    run(plain, twin, range(5, 10))
    assert same(network, plain)
    HypergradientLR(optimizer)  # can be attached anew


@pytest.mark.parametrize(
    ("cls", "settings", "copies"),
    [
        (SGD, {}, 1),
        (SGD, {"momentum": 0.9}, 0),
        (SGD, {"momentum": 0.9, "nesterov": True}, 1),
        (Adam, {}, 0),
        (Adam, {"amsgrad": True}, 0),
        (AdamW, {"weight_decay": 0.1}, 0),
        (RMSprop, {}, 1),
        (SignDescent, {}, 1),
    ],
)
@pytest.mark.parametrize("rule", ["additive", "multiplicative", "auto"])
def test_parameter_sized_copies(cls: Any, settings: dict[str, Any], copies: int, rule: Any) -> None:
    network = reference.torch_network()
    optimizer = cls(network.parameters(), lr=0.01, **settings)
    HypergradientLR(optimizer, rule)

    def count(_: int) -> None:
        assert not any(key.startswith("hd_") for state in optimizer.state.values() for key in state)
        saved = optimizer.state_dict()["state"]
        for i, p in enumerate(network.parameters()):
            extra = [t for key, t in saved.get(i, {}).items() if key.startswith("hd_")]
            assert [t.shape for t in extra] == [p.shape] * (0 if rule == "auto" else copies)

    run(network, optimizer, range(5), count)


def test_the_engine_dies_with_its_optimizer() -> None:
    network = reference.torch_network()
    optimizer = SGD(network.parameters(), lr=0.01)
    hd = HypergradientLR(optimizer)
    run(network, optimizer, range(2))
    ghost = weakref.ref(hd)
    del hd, optimizer
    gc.collect()
    assert ghost() is None


def test_a_second_engine_on_the_same_optimizer_is_an_error() -> None:
    optimizer = SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    first = HypergradientLR(optimizer)
    with pytest.raises(RuntimeError, match="this SGD is tuned by a HypergradientLR"):
        HypergradientLR(optimizer)
    other = SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    HypergradientLR(other)  # another optimizer may have its own
    first.detach()
    HypergradientLR(optimizer)


# ---------------------------------------------------------------------- saving and loading


Build = Callable[[], tuple[nn.Module, Optimizer, HypergradientLR]]


def check_resuming(
    build: Build, prepare: Callable[[HypergradientLR], None] = lambda _: None, engine_first: bool = False
) -> None:
    """Ten steps in one go, or five, a checkpoint, everything built anew, and five more: the same, bit for bit."""
    network, optimizer, hd = build()
    prepare(hd)
    run(network, optimizer, range(5))
    saved = copy.deepcopy((network.state_dict(), optimizer.state_dict(), hd.state_dict()))
    expected = trajectory(network, optimizer, hd, range(5, 10))
    resumed, other, engine = build()
    resumed.load_state_dict(saved[0])
    if engine_first:
        engine.load_state_dict(saved[2])
    other.load_state_dict(saved[1])
    if not engine_first:
        engine.load_state_dict(saved[2])
    assert trajectory(resumed, other, engine, range(5, 10)) == expected
    assert len({tuple(lrs) for lrs in expected}) > 1, "the rate moved"
    assert same(network, resumed)
    assert engine.step_count == 10


@pytest.mark.parametrize(
    ("family", "rule", "scope", "engine_first"),
    pairwise(
        FAMILIES,
        ["additive", "multiplicative", "long horizon", "auto", "auto, configured"],
        ["global", "group"],
        [False, True],
    ),
)
def test_resuming_is_exact(family: tuple[Any, dict[str, Any]], rule: Any, scope: Any, engine_first: bool) -> None:
    cls, settings = family

    def build() -> tuple[nn.Module, Optimizer, HypergradientLR]:
        network = reference.torch_network()
        p = list(network.parameters())
        optimizer = cls([{"params": p[:2], "lr": 0.01}, {"params": p[2:], "lr": 0.02}], lr=1.0, **settings)
        rules = {"long horizon": LongHorizon(), "auto": Auto(), "auto, configured": Auto(start="configured")}
        chosen = rules.get(rule) or make_rule(rule, 1e-4)
        return network, optimizer, HypergradientLR(optimizer, chosen, scope=scope)

    check_resuming(build, engine_first=engine_first)


def test_a_state_of_another_layout_is_refused() -> None:
    def engine(groups: int = 1, **arguments: Any) -> HypergradientLR:
        return HypergradientLR(
            SGD([{"params": [nn.Parameter(torch.ones(1))]} for _ in range(groups)], lr=0.1),
            **{"rule": "additive", **arguments},
        )

    saved = engine().state_dict()
    with pytest.raises(ValueError, match="rule='additive', now it is 'multiplicative'"):
        engine(rule="multiplicative").load_state_dict(saved)
    with pytest.raises(ValueError, match="rule='additive', now it is 'auto'"):
        engine(rule="auto").load_state_dict(saved)
    with pytest.raises(ValueError, match="scope='global', now it is 'group'"):
        engine(scope="group").load_state_dict(saved)
    with pytest.raises(ValueError, match="1 parameter groups, the optimizer 2"):
        engine(groups=2).load_state_dict(saved)
    with pytest.raises(ValueError, match="damaged"):
        engine().load_state_dict({**saved, "rates": {"scopes": [], "groups": [{"lr": 0.1}]}})
    with pytest.raises(ValueError, match="optimizer='SGD', now it is 'Adam'"):
        HypergradientLR(Adam([nn.Parameter(torch.ones(1))])).load_state_dict(saved)
    for other in ({}, None, SGD([nn.Parameter(torch.ones(1))]).state_dict()):
        with pytest.raises(ValueError, match=r"not what HypergradientLR\.state_dict"):
            engine().load_state_dict(other)  # type: ignore[arg-type]


def test_a_lost_direction_costs_one_observation_and_is_told() -> None:
    network = reference.torch_network()
    optimizer = SGD(network.parameters(), lr=0.01, momentum=0.9)
    hd = HypergradientLR(optimizer, "multiplicative", hypergrad_lr=0.1)
    run(network, optimizer, range(3))
    before = hd.lrs
    optimizer.state.clear()
    with pytest.warns(RuntimeWarning, match="lost the last direction"):
        run(network, optimizer, range(3, 4))
    assert hd.lrs == before
    run(network, optimizer, range(4, 5))
    assert hd.lrs != before


class Plain(Optimizer):
    """Gradient descent, of which the directions are measured."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad)


@pytest.mark.filterwarnings("ignore:.*without which no first step is taken.*")
def test_a_trial_that_overflows_is_followed_by_shorter_ones() -> None:
    p = nn.Parameter(torch.full((3,), 100.0, dtype=torch.float16))
    hd = HypergradientLR(Plain([p], 0.1))
    for gradient in (*[6e-8] * 3, *[1.0] * 20):
        p.grad = torch.full_like(p, gradient)
        hd._optimizer.step()
    assert hd.stats.nonfinite_steps <= 3
    assert bool((p < 100).all() and (p > 0).all())


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize(("rule", "lr"), [("auto", 0.1), ("auto", 0.0), ("additive", 0.0)])
def test_gradients_whose_first_step_vanishes_in_rounding_are_tried_with_longer_ones(rule: Any, lr: float) -> None:
    p = nn.Parameter(torch.ones(4))
    hd = HypergradientLR(Plain([p], lr), rule, hypergrad_lr=None if rule == "auto" else 1e26)
    begun = []
    for _ in range(20):
        p.grad = 1e-9 * p.detach()
        hd._optimizer.step()
        begun.append(bool((p != 1).all()))
    assert begun == [False] * begun.index(True) + [True] * (20 - begun.index(True))
    assert begun.index(True) <= 5
    (seen,) = hd.last
    assert seen is not None
    assert seen.cosine > 0.9
    assert torch.all((p > 0) & (p < 1))


def test_a_step_that_vanishes_in_rounding_is_told() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = RMSprop([p], lr=1e-12)
    HypergradientLR(optimizer, rule="additive")
    p.grad = torch.ones(3)
    optimizer.step()
    with pytest.warns(RuntimeWarning, match="left no trace in the parameters.* too small for the precision"):
        optimizer.step()


# ---------------------------------------------------------------------- what the Rule interface carries


@dataclass
class LongHorizon(Rule):
    """Remembers moves, less and less of them, and has a first rate of its own."""

    long_horizon = True
    picks_start = True

    def discount(self, lr: float, context: Context) -> float:
        return 1 - 1 / (context.step + 1)

    def first_lr(self, param_norm: float, direction_norm: float) -> float:
        return 0.01 * param_norm / direction_norm

    def update(self, lr: float, seen: Observation, context: Context) -> float:
        return lr * (1 + 0.1 * seen.cosine)


@pytest.mark.parametrize("method", PAPER)
@pytest.mark.parametrize("lr", [0.0, 1e-6, 3.0])
def test_a_rule_with_a_long_horizon_and_its_own_start(method: str, lr: float) -> None:
    # NumPy: E_t = φ_{t-1} E_{t-1} + (θ_t - θ_{t-1}), h_t = g_t · E_t, α_1 = 0.01 ‖θ_1‖ / ‖d_1‖.
    cls, settings, _ = PAPER[method]
    parameters = reference.initial_parameters()
    direction = reference.directions(method, settings)
    next(direction)
    moves = [np.zeros_like(p) for p in parameters]
    alpha, expected = 0.0, []
    for t, (x, y) in enumerate(reference.batches()[:60], start=1):
        _, g = reference.network_loss(parameters, x, y)
        if t > 1:
            alpha *= 1 - 0.1 * reference.dot(g, moves) / (reference.norm(g) * reference.norm(moves))
        d = direction.send(g)
        if t == 1:
            alpha = 0.01 * math.sqrt(reference.dot(parameters, parameters) / reference.dot(d, d))
        moves = [(1 - 1 / (t + 1)) * e - alpha * x for e, x in zip(moves, d, strict=True)]
        parameters = [p - alpha * x for p, x in zip(parameters, d, strict=True)]
        expected.append(alpha)
    network = reference.torch_network()
    optimizer = cls(network.parameters(), lr=lr, **settings)  # type: ignore[arg-type]
    hd = HypergradientLR(optimizer, LongHorizon())
    mine = [lr for (lr,) in trajectory(network, optimizer, hd, range(60))]
    np.testing.assert_allclose(mine, expected, rtol=1e-10)
    for p, value in zip(network.parameters(), parameters, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), value, rtol=1e-9)
        assert not any(key.startswith("hd_") for key in optimizer.state[p])


@pytest.mark.parametrize(("cls", "settings"), [*FAMILIES, (AdamW, {"weight_decay": 0.1, "amsgrad": True})])
def test_a_start_of_its_own_does_not_depend_on_the_configured_rate(cls: Any, settings: dict[str, Any]) -> None:
    ends = []
    for lr in (0.0, 1e-8, 1.0, 1e3):
        network = reference.torch_network()
        optimizer = cls(network.parameters(), lr=lr, **settings)
        hd = HypergradientLR(optimizer, LongHorizon())
        ends.append((trajectory(network, optimizer, hd, range(20)), network))
    for lrs, network in ends[1:]:
        assert lrs == ends[0][0]
        assert same(network, ends[0][1])


@pytest.mark.parametrize(("second", "expected"), [(1.0, 0.01 * 1.1), (0.0, 0.005)])
def test_a_start_of_its_own_waits_for_a_schedule_and_for_a_direction(second: float, expected: float) -> None:
    p = nn.Parameter(torch.ones(4, dtype=torch.float64))
    optimizer = SGD([p], lr=7.0)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda t: min(t, 1))
    hd = HypergradientLR(optimizer, LongHorizon())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for gradient in (1.0, second, 2.0):  # the schedule is 0 in the first step
            p.grad = torch.full_like(p, gradient)
            optimizer.step()
            scheduler.step()
    assert hd.lrs == [pytest.approx(expected)]


@pytest.mark.parametrize("value", [math.nan, "0.1"])
def test_a_start_that_is_no_number_is_named_and_nothing_moves(value: Any) -> None:
    class Broken(LongHorizon):
        def first_lr(self, param_norm: float, direction_norm: float) -> float:
            return value  # type: ignore[no-any-return]

    p = nn.Parameter(torch.ones(4))
    optimizer = SGD([p], lr=0.1)
    HypergradientLR(optimizer, Broken())
    p.grad = torch.ones(4)
    with pytest.raises((ValueError, TypeError), match=r"Broken\.first_lr must return a"):
        optimizer.step()
    assert torch.equal(p, torch.ones(4))
    assert optimizer.param_groups[0]["lr"] == 0.1


class Cooling(Rule):
    """A rule that learns a number."""

    def __init__(self) -> None:
        self.count = 0

    def update(self, lr: float, seen: Observation, context: Context) -> float:
        self.count += 1
        return lr * (1 + 0.1 * seen.cosine / self.count)


def test_the_numbers_of_a_rule_of_ones_own_are_saved() -> None:
    def build() -> tuple[nn.Module, Optimizer, HypergradientLR]:
        network = reference.torch_network()
        optimizer = Adam(network.parameters(), lr=0.01)
        return network, optimizer, HypergradientLR(optimizer, Cooling())

    check_resuming(build)


@pytest.mark.parametrize("value", [None, "0.1", [0.1]])
def test_a_rule_that_returns_no_number_is_named(value: Any) -> None:
    class Broken(Rule):
        def update(self, lr: float, seen: Observation, context: Context) -> float:
            return value  # type: ignore[no-any-return]

    network = reference.torch_network()
    optimizer = SGD(network.parameters(), lr=0.01)
    HypergradientLR(optimizer, Broken())
    with pytest.raises(TypeError, match=r"Broken\.update must return a number"):
        run(network, optimizer, range(2))


# ---------------------------------------------------------------------- bad input


def optimizers_to_refuse() -> Iterator[Any]:
    p = [nn.Parameter(torch.ones(2))]
    yield pytest.param(torch.optim.LBFGS(p), TypeError, "LBFGS has no learning rate to tune", id="LBFGS")
    zero = type("ZeroRedundancyOptimizer", (SGD,), {})
    yield pytest.param(zero(p), TypeError, "its checkpoints lack what is not its own", id="ZeRO")
    late = SGD.__new__(SGD)
    yield pytest.param(late, TypeError, r"was not initialized: its class must call super\(\)", id="not initialized")
    twice = SGD(p, lr=0.1)
    twice.param_groups[0]["params"] *= 2
    yield pytest.param(twice, ValueError, r"has a parameter twice in param_groups\[0\]", id="twice")
    yield pytest.param(torch.optim.Rprop(p), TypeError, "Rprop has no learning rate to tune", id="Rprop")
    yield pytest.param(torch.optim.SparseAdam(p), TypeError, "sparse gradients are not supported", id="SparseAdam")
    without_lr = SGD(p, lr=0.1)
    del without_lr.param_groups[0]["lr"]
    yield pytest.param(without_lr, ValueError, r"no 'lr' in param_groups\[0\]", id="no lr")
    for lr in (math.nan, math.inf, -0.1):
        bad = SGD(p, lr=0.1)
        bad.param_groups[0]["lr"] = lr
        yield pytest.param(bad, ValueError, r"lr of SGD param_groups\[0\] must be a finite number", id=f"lr {lr}")
    yield pytest.param(nn.Linear(1, 1), TypeError, "must be a torch.optim.Optimizer, got Linear", id="no optimizer")
    yield pytest.param(None, TypeError, "must be a torch.optim.Optimizer, got NoneType", id="None")


@pytest.mark.parametrize(("optimizer", "error", "words"), list(optimizers_to_refuse()))
def test_an_optimizer_that_cannot_be_tuned_is_refused(optimizer: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        HypergradientLR(optimizer)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"rule": "best"}, ValueError, "rule must be one of .*'auto', 'additive', 'multiplicative'.* got 'best'"),
        ({"rule": 3}, TypeError, "rule must be one of"),
        ({"rule": Additive}, TypeError, "rule must be one of"),
        ({"hypergrad_lr": -1e-3}, ValueError, "hypergrad_lr must be a finite number of at least 0"),
        ({"hypergrad_lr": math.nan}, ValueError, "hypergrad_lr must be a finite number"),
        ({"hypergrad_lr": "1e-3"}, TypeError, "hypergrad_lr must be a number"),
        ({"hypergrad_lr": True}, TypeError, "hypergrad_lr must be a number"),
        ({"rule": Additive(), "hypergrad_lr": 0.1}, ValueError, "hypergrad_lr=0.1 beside a rule object"),
        ({"rule": "auto", "hypergrad_lr": 0.1}, ValueError, "hypergrad_lr=0.1 has no effect on rule='auto'"),
        ({"scope": "layer"}, ValueError, "scope must be 'global' or 'group', got 'layer'"),
        ({"min_lr": 0.1, "max_lr": 0.01}, ValueError, "min_lr must not be above max_lr"),
        ({"min_lr": math.inf}, ValueError, "min_lr must be a finite number"),
        ({"max_lr": "big"}, TypeError, "max_lr must be a number"),
        ({"max_lr": b"1"}, TypeError, "max_lr must be a number, got b'1'"),
        ({"min_lr": bytearray(b"1")}, TypeError, "min_lr must be a number"),
        ({"process_group": np.ones(2)}, TypeError, "process_group must be a torch.distributed.ProcessGroup or None"),
        ({"rule": "auto", "stop_after": 0}, ValueError, "stop_after must be at least 1 with a rule that picks"),
        ({"stop_after": 10**400}, ValueError, "stop_after is too large a number"),
        ({"max_lr": -1.0}, ValueError, "max_lr must be above 0"),
        ({"max_lr": 0}, ValueError, "max_lr must be above 0"),
        ({"scheduled": "yes"}, TypeError, "scheduled must be True or False"),
    ],
)
def test_a_bad_argument_is_named(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    optimizer = SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(error, match=words):
        HypergradientLR(optimizer, **{"rule": "additive", **arguments})
    assert not optimizer._optimizer_step_pre_hooks
    HypergradientLR(optimizer)  # nothing was left behind


def test_the_multiplicative_rule_refuses_to_start_from_zero() -> None:
    with pytest.raises(ValueError, match="cannot leave a learning rate of 0"):
        HypergradientLR(SGD([nn.Parameter(torch.ones(1))], lr=0.0), Multiplicative())


def test_a_sparse_gradient_is_refused_before_the_first_update() -> None:
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = SGD(table.parameters(), lr=0.1)
    HypergradientLR(optimizer)
    before = table.weight.detach().clone()
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match=r"shape \(5, 3\) .* sparse gradients are not supported"):
        optimizer.step()
    assert torch.equal(table.weight, before)


@pytest.mark.parametrize("rule", ["auto", "additive"])
def test_parameters_without_numbers_are_refused_before_the_first_update(rule: Any) -> None:
    p = nn.Parameter(torch.ones(2, 3, device="meta"))
    optimizer = SGD([p], lr=0.1)
    HypergradientLR(optimizer, rule)
    p.grad = torch.ones_like(p)
    with pytest.raises(TypeError, match=r"a parameter of shape \(2, 3\) is on the meta device"):
        optimizer.step()


def test_a_configured_rate_that_does_not_count_may_be_of_any_size() -> None:
    w = nn.Parameter(torch.ones(2))
    hd = HypergradientLR(optimizer := SGD([w], lr=1e40))
    w.grad = torch.ones(2)
    optimizer.step()  # without a warning
    assert hd.lrs == [pytest.approx(1e-4)]
    assert hd.stats.nonfinite_steps == 0
    assert repr(hd) == f"HypergradientLR(SGD, rule='auto', lrs={hd.lrs})"


def test_an_optimizer_that_moves_before_its_closure_is_refused() -> None:
    class SharpnessAware(Optimizer):
        @torch.no_grad()
        def step(self, closure: Any) -> None:  # type: ignore[override]
            for p in self.param_groups[0]["params"]:
                p.add_(0.1)
            with torch.enable_grad():
                closure()
            for p in self.param_groups[0]["params"]:
                p.sub_(0.1).sub_(p.grad, alpha=self.param_groups[0]["lr"])

    p = nn.Parameter(torch.ones(2))
    optimizer = SharpnessAware([p], {"lr": 0.1})
    HypergradientLR(optimizer)
    with pytest.raises(TypeError, match="SharpnessAware moves the parameters before it evaluates its closure"):
        optimizer.step(lambda: None)


# ---------------------------------------------------------------------- what others do to an optimizer


def alternate(p: Tensor, optimizer: Optimizer, signs: Sequence[float]) -> None:
    for sign in signs:
        p.grad = torch.full_like(p, sign)
        optimizer.step()


def test_an_error_in_one_group_leaves_the_schedule_of_all() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = SGD([{"params": [a]}, {"params": [b]}], lr=0.1)
    lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    HypergradientLR(optimizer, "multiplicative", hypergrad_lr=0.5)
    alternate(a, optimizer, [1, 1, 1])
    b.grad = torch.ones(2).to_sparse()
    with pytest.raises(TypeError, match="sparse gradients"):
        optimizer.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1]


def test_a_scheduler_that_goes_on_after_a_failed_update_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    network = reference.torch_network()
    optimizer = SGD(network.parameters(), lr=0.1)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    HypergradientLR(optimizer, "multiplicative", hypergrad_lr=0.5)
    run(network, optimizer, range(3))
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[SGD.__module__], "sgd", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            optimizer.step()
    scheduler.step()
    with pytest.warns(RuntimeWarning, match="its values may be off"):
        run(network, optimizer, range(3, 4))


@pytest.mark.parametrize("cls", [SGD, RMSprop])
def test_a_parameter_that_changes_its_shape(cls: Any) -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = cls([p], lr=0.1)
    hd = HypergradientLR(optimizer, rule="additive", hypergrad_lr=0)
    alternate(p, optimizer, [1.0, 1.0])
    p.grad = None
    p.data = torch.ones(5)
    if cls is RMSprop:
        optimizer.state[p].update(square_avg=torch.zeros(5))
    p.grad = torch.ones(5)
    optimizer.step()
    assert hd.last == [None]
    optimizer.step()
    assert observed(hd).hypergradient < 0


def test_a_conjugate_gradient() -> None:
    p = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    optimizer = SGD([p], lr=0.1)
    hd = HypergradientLR(optimizer, rule="additive", hypergrad_lr=0)
    for _ in range(2):
        p.grad = torch.tensor([1 + 2j, 3j]).conj()
        assert p.grad.is_conj()
        optimizer.step()
    assert observed(hd).hypergradient == pytest.approx(-14)


def test_detach_from_an_optimizer_with_a_state_of_its_own_kind() -> None:
    class Counting(SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            self.state["steps"] = 7  # type: ignore[index]

    p = nn.Parameter(torch.ones(1))
    optimizer = Counting([p], lr=0.1)
    hd = HypergradientLR(optimizer)
    alternate(p, optimizer, [1.0, 1.0])
    hd.detach()
    assert dict(optimizer.state) == {"steps": 7}


def test_an_optimizer_that_makes_its_state_late() -> None:
    class Blockwise(Optimizer):
        """One parameter a step, each with a state that is made when its turn first comes."""

        turn = 0

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            params = self.param_groups[0]["params"]
            p = params[self.turn % len(params)]
            state = self.state[p]
            if len(state) == 0:
                state["buffer"] = torch.zeros_like(p)
            state["buffer"].add_(p.grad)
            p.sub_(state["buffer"], alpha=self.param_groups[0]["lr"])
            self.turn += 1

    params = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    optimizer = Blockwise(params, {"lr": 0.1})
    hd = HypergradientLR(optimizer, rule="additive", hypergrad_lr=0)
    for _ in range(6):
        for p in params:
            p.grad = torch.ones(2)
        optimizer.step()
    assert observed(hd).hypergradient == pytest.approx(
        -4, rel=1e-5
    )  # the second turn of the second: twice the gradient


@pytest.mark.parametrize("lr", [0.0, 0.5])
def test_an_optimizer_with_a_state_for_some_parameters_only(lr: float) -> None:
    class Mixed(Optimizer):
        """Momentum for the first parameter, none for the second."""

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            a, b = self.param_groups[0]["params"]
            self.state[a].setdefault("buffer", torch.zeros_like(a)).mul_(0.5).add_(a.grad)
            a.sub_(self.state[a]["buffer"], alpha=self.param_groups[0]["lr"])
            b.sub_(b.grad, alpha=self.param_groups[0]["lr"])

    params = [nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2)]
    optimizer = Mixed(params, {"lr": lr})
    hd = HypergradientLR(optimizer, rule="additive", hypergrad_lr=0)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert observed(hd).hypergradient == pytest.approx(-4)
    assert [p[0].item() for p in params] == [1 - 2.5 * lr, 1 - 2 * lr]


def test_a_wrapper_that_imitates_the_optimizer() -> None:
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    network = reference.torch_network()
    optimizer = SGD(network.parameters(), lr=0.1, momentum=0.9)
    module, wrapped = fabric.setup(network, optimizer)
    hd = HypergradientLR(wrapped, "multiplicative", hypergrad_lr=0.1)
    assert hd._optimizer is optimizer
    with pytest.raises(RuntimeError, match="already"):
        HypergradientLR(optimizer)
    for x, y in reference.torch_batches()[:3]:
        wrapped.zero_grad()
        fabric.backward(reference.torch_loss(module, x, y))
        wrapped.step()
    assert hd.step_count == 3
    assert not any(key.startswith("hd_") for state in optimizer.state.values() for key in state)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("rule", ["multiplicative", "auto"])
def test_a_copy_goes_on_as_the_original(how: str, rule: Any) -> None:
    network = reference.torch_network()
    optimizer = AdamW(network.parameters(), lr=0.01)
    hd = HypergradientLR(optimizer, rule)
    run(network, optimizer, range(5))
    everything = (network, optimizer, hd)
    twin, other, engine = copy.deepcopy(everything) if how == "deepcopy" else pickle.loads(pickle.dumps(everything))
    assert engine._optimizer is other
    assert engine._hooks is not None
    expected = trajectory(network, optimizer, hd, range(5, 10))
    assert trajectory(twin, other, engine, range(5, 10)) == expected
    assert same(network, twin)
    hd.detach()
    released = copy.deepcopy(hd)
    assert released._hooks is None
    released.detach()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cls", [SGD, AdamW, SignDescent])
def test_narrow_parameters(cls: Any, dtype: torch.dtype) -> None:
    p = nn.Parameter(torch.zeros(4, dtype=dtype))
    optimizer = cls([p], lr=1e-5)
    hd = HypergradientLR(optimizer, rule="additive", hypergrad_lr=0)
    alternate(p, optimizer, [1.0] * 4)
    assert hd.stats.nonfinite_steps == 0
    assert observed(hd).cosine == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("rule", ["additive", "auto"])
def test_a_zero_gradient_is_no_vanished_step(rule: Any) -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = RMSprop([p], lr=0.1)
    HypergradientLR(optimizer, rule)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alternate(p, optimizer, [1.0, 1.0, 0.0, 1.0])


def test_a_step_without_gradients_forgets_nothing() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = SGD([p], lr=0.1)
    hd = HypergradientLR(optimizer, "multiplicative", hypergrad_lr=0.1)
    alternate(p, optimizer, [1.0, 1.0])
    p.grad = None
    optimizer.step()
    assert hd.step_count == 2
    alternate(p, optimizer, [1.0])
    assert hd.lrs == [pytest.approx(0.1 * 1.1**2)]


def test_whole_numbers_among_the_parameters_change_nothing() -> None:
    codes = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    w = nn.Parameter(torch.ones(3))
    hd = HypergradientLR(SGD([codes, w], lr=0.01), rule="additive")
    w.sum().backward()  # type: ignore[no-untyped-call]
    hd._optimizer.step()
    assert hd.step_count == 1
