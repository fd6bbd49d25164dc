"""Looks: which steps are looked at, when their numbers are read, and what makes each step be looked at again."""

import copy
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from lightning_hd import HypergradientLR
from lightning_hd.engine.rates import Rates
from lightning_hd.engine.step import Tuning
from lightning_hd.hypergradient import Displacement
from tests.benchmarks.cost import counted
from tests.distributed.processes import run

APART = 1000
"""After so many steps without an event, looks are eight steps apart."""


class Loop:
    """A regression with noise, whose rate is tuned. In full batches, so no gradient leaps."""

    def __init__(
        self, seed: int = 0, freeze: bool = False, optimizer: Callable[..., Optimizer] = Adam, **arguments: Any
    ) -> None:
        torch.manual_seed(seed)
        self.body = nn.Linear(5, 16)
        self.network = nn.Sequential(self.body, nn.Tanh(), nn.Linear(16, 1)).double()
        self.body.requires_grad_(not freeze)
        self.optimizer = optimizer(self.network.parameters(), lr=1e-3)
        # The clamp is so low that gradients neither leap nor vanish.
        self.hd = HypergradientLR(self.optimizer, max_lr=1e-5, **arguments)
        self.step_count = 0

    def step(self, scale: float = 1.0) -> list[float]:
        x = torch.randn(32, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.optimizer.zero_grad()
        loss = (self.network(x) - x[:, :1].sin()).square().mean() + self.network(x).square().mean()
        (scale * loss).backward()
        self.optimizer.step()
        self.step_count += 1
        return self.hd.lrs

    def steps(self, count: int) -> list[list[float]]:
        return [self.step() for _ in range(count)]

    def resumed(self, **arguments: Any) -> "Loop":
        """Another run that goes on from here."""
        saved = copy.deepcopy((self.network.state_dict(), self.optimizer.state_dict(), self.hd.state_dict()))
        again = Loop(seed=1, optimizer=type(self.optimizer), **arguments)
        again.network.load_state_dict(saved[0])
        again.optimizer.load_state_dict(saved[1])
        again.hd.load_state_dict(saved[2])
        again.step_count = self.step_count
        return again


@pytest.fixture(scope="module")
def calm() -> Loop:
    """A run whose looks are seven steps apart. It must not be changed."""
    loop = Loop()
    loop.steps(APART + 20)
    return loop


@pytest.fixture
def looked() -> Iterator[list[int]]:
    """For each look, the number of the call of ``observe``."""
    found: list[int] = []
    observe = Displacement.observe

    def counting(self: Displacement, *arguments: Any) -> Tensor:
        found.append(1)
        return observe(self, *arguments)

    with mock.patch.object(Displacement, "observe", counting):
        yield found


def looks(loop: Loop, looked: list[int], count: int) -> list[int]:
    """Which of the next steps are looked at."""
    places = []
    for i in range(count):
        before = len(looked)
        loop.step()
        places += [i] * (len(looked) - before)
    return places


def test_looks_are_further_apart_the_longer_nothing_has_happened(looked: list[int]) -> None:
    loop = Loop()
    places = looks(loop, looked, APART + 50)
    assert loop.hd.stats.backoffs == (0,), "the test needs a run without events"
    distances = [b - a for a, b in pairwise(places)]
    assert distances == sorted(distances)
    assert set(distances) == {1, 4, 8}
    assert 498 <= distances.index(4) <= 502, "each step is looked at before"


def test_between_looks_nothing_is_computed_or_read(calm: Loop) -> None:
    loop = copy.deepcopy(calm)
    loop.step()
    plain = [p.detach().clone().requires_grad_() for p in loop.network.parameters()]
    for p, q in zip(plain, loop.network.parameters(), strict=True):
        p.grad = q.grad
    alone = Adam(plain)
    alone.step()
    alone_operations, alone_reads = counted(alone.step)
    steps = [counted(loop.optimizer.step) for _ in range(33)]
    own, reads = [n - alone_operations for n, _ in steps], [n - alone_reads for _, n in steps]
    look = own.index(max(own))
    assert max(own) <= 30
    assert 0 < own[look + 7] <= 12, "gradients and parameters are noted in the step before the next look"
    assert own[look + 1 : look + 7] == [0] * 6, "else, only the optimizer works"
    assert sum(reads) == 4
    assert reads[look : look + 2] == [0, 1], "the numbers are read in the step after the look"


@pytest.fixture(scope="module")
def calm_sgd() -> Loop:
    """The same with an optimizer that has no state."""
    loop = Loop(optimizer=SGD)
    loop.steps(APART + 20)
    return loop


@pytest.mark.parametrize("what", ["gradient", "parameters"])
@pytest.mark.parametrize("phase", range(8))
def test_what_was_not_finite_is_overcome_wherever_looks_are(calm_sgd: Loop, phase: int, what: str) -> None:
    loop = copy.deepcopy(calm_sgd)
    loop.steps(phase)
    before = [p.detach().clone() for p in loop.network.parameters()]
    if what == "parameters":
        loop.body.weight.data[0, 0] = math.nan
    loop.step(math.inf)
    for p, value in zip(loop.network.parameters(), before, strict=True):
        p.data.copy_(value)  # so that nothing is known of the write
    loop.steps(20)
    assert loop.hd.stats.nonfinite_steps <= 2
    (seen,) = loop.hd.last
    assert seen is not None
    assert all(map(math.isfinite, seen))


@pytest.mark.parametrize("event", ["write", "group", "backoff", "not finite"])
def test_after_an_event_each_step_is_looked_at(calm: Loop, looked: list[int], event: str) -> None:
    loop = copy.deepcopy(calm)
    if event == "write":
        loop.optimizer.param_groups[0]["lr"] = 5e-3
    if event == "group":
        loop.steps(8)  # so that the copy has looked once
        loop.optimizer.add_param_group({"params": nn.Parameter(torch.ones(3, dtype=torch.float64))})
    if event in ("backoff", "not finite"):
        for _ in range(9):  # the look must not miss it
            p = next(loop.network.parameters())
            before = copy.deepcopy((loop.network.state_dict(), loop.optimizer.state_dict()["state"]))
            loop.step(1e4 if event == "backoff" else float("nan"))
            with torch.no_grad():  # as if only the gradient had been off
                loop.network.load_state_dict(before[0])
            loop.optimizer.load_state_dict({**loop.optimizer.state_dict(), "state": before[1]})
            assert p.isfinite().all()
    first, *others = looks(loop, looked, 30)
    assert first <= (0 if event == "group" else 1), "new parameters are looked at in their first step"
    assert others == list(range(first + 1, 30))
    assert all(p.isfinite().all() for p in loop.network.parameters())


@pytest.mark.parametrize("way", ["frozen", "without a gradient"])
def test_parameters_that_come_to_life_are_not_moved_at_the_old_rate(way: str) -> None:
    loop = Loop(freeze=way == "frozen")
    handles = []
    if way != "frozen":
        for p in loop.body.parameters():
            handles.append(p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None)))  # type: ignore[no-untyped-call]
    loop.steps(APART + 20)
    assert loop.hd.state_dict()["looks"]["stride"] == 8
    if way == "frozen":
        loop.body.requires_grad_(True)
    else:
        for handle in handles:
            handle.remove()
    loop.step()
    (scope,) = loop.hd.state_dict()["rates"]["scopes"]
    assert scope["since"] == APART + 20, "the rate starts anew in this very step"


@pytest.mark.parametrize("phase", range(8))
def test_a_run_resumes_exactly_between_looks(calm: Loop, phase: int) -> None:
    loop = copy.deepcopy(calm)
    loop.steps(phase)
    again = loop.resumed()
    assert loop.steps(30) == again.steps(30)


def write_a_rate(loop: Loop) -> None:
    loop.optimizer.param_groups[0]["lr"] *= 0.5


def write_it_back(loop: Loop) -> None:
    write_a_rate(loop)
    loop.step()
    loop.optimizer.param_groups[0]["lr"] = 1e-5


def add_a_group(loop: Loop) -> None:
    loop.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 1e-6})


def load_another_rate(loop: Loop) -> None:
    """The clamp hides it, so the groups hold what they held."""
    state = copy.deepcopy(loop.hd.state_dict())
    scopes = state["rates"]["scopes"]
    scopes[0]["lr"] *= 0.99
    scopes[0]["used"] *= 0.99
    loop.hd.load_state_dict(state)


def build_a_scheduler(loop: Loop) -> None:
    torch.optim.lr_scheduler.LambdaLR(loop.optimizer, lambda _: 0.7)


@pytest.mark.parametrize(
    ("event", "arguments"),
    [
        *((event, {}) for event in (write_a_rate, write_it_back, add_a_group, load_another_rate, build_a_scheduler)),
        (lambda _: None, {"total_steps": APART + 75, "cooldown": 0.02}),
        (lambda _: None, {"stop_after": APART + 33}),
    ],
)
def test_steps_in_which_nothing_is_new_repeat_the_last_one_bit_for_bit(
    calm: Loop, event: Callable[[Loop], None], arguments: dict[str, Any]
) -> None:
    repeating, deciding = calm.resumed(**arguments), calm.resumed(**arguments)
    with mock.patch.object(Rates, "decide", autospec=True, side_effect=Rates.decide) as decide:
        found = repeating.steps(12)
        assert decide.call_count <= 6, "the others repeat the last step"
        event(repeating)
        found += repeating.steps(50)
    with mock.patch.object(Tuning, "_repeated", return_value=None):
        decided = deciding.steps(12)
        event(deciding)
        decided += deciding.steps(50)
    assert found == decided
    states = repeating.hd.state_dict(), deciding.hd.state_dict()
    torch.testing.assert_close(*(state.pop("view")["memory"] for state in states), rtol=0, atol=0)
    assert states[0] == states[1]


def test_a_step_that_fails_leaves_no_trace_between_looks(calm: Loop) -> None:
    whole, broken = copy.deepcopy(calm), copy.deepcopy(calm)
    expected, found = whole.steps(20), []
    for _ in range(20):
        with mock.patch.object(Adam, "_init_group", side_effect=OSError), pytest.raises(OSError):  # noqa: PT011
            broken.step()
        found.append(broken.step())
    assert found == expected


@pytest.mark.parametrize("pending", [[0.0], ["x"] * 15, 1])
def test_a_damaged_state_is_refused(calm: Loop, pending: object) -> None:
    state = calm.hd.state_dict()
    state["looks"] = {**state["looks"], "pending": pending}
    with pytest.raises(ValueError, match="damaged"):
        copy.deepcopy(calm).hd.load_state_dict(state)


# ---------------------------------------------------------------------- several processes


def train_together() -> tuple[list[list[float]], list[int]]:
    """The rates of all steps, and how many looks there were in the 100 before an event on one rank, and after it."""
    loop, made = Loop(), []
    observe = Displacement.observe

    def counting(self: Displacement, *arguments: Any) -> Tensor:
        made.append(loop.step_count)
        return observe(self, *arguments)

    with mock.patch.object(Displacement, "observe", counting):
        lrs = loop.steps(APART + 120)
        if dist.get_rank() == 0:
            loop.optimizer.param_groups[0]["lr"] = 5e-3
        lrs += loop.steps(100)
    event = APART + 120
    return lrs, [sum(first <= step < first + 100 for step in made) for first in (event - 100, event)]


@pytest.fixture(scope="module")
def together() -> list[tuple[list[list[float]], list[int]]]:
    """The processes are started once for both tests."""
    return run(train_together, 2)


def test_processes_look_at_the_same_steps_and_agree(together: list[tuple[list[list[float]], list[int]]]) -> None:
    expected = Loop().steps(APART + 120)
    for lrs, (before, _) in together:
        torch.testing.assert_close(lrs[: APART + 120], expected, rtol=1e-9, atol=0.0)
        assert before in (12, 13)


def test_an_event_on_one_process_wakes_all(together: list[tuple[list[list[float]], list[int]]]) -> None:
    (_, (_, first)), (_, (_, second)) = together
    assert first == second > 60
