"""States at awkward moments: what is saved can be loaded, and the run goes on as if it had not been interrupted."""

import copy
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import SGD, Adafactor, Adagrad, Adam, AdamW, NAdam, Optimizer, RMSprop
from torch.optim.lr_scheduler import ConstantLR, ExponentialLR

from lightning_hd import HypergradientLR


def fail(*_: Any) -> None:
    raise MemoryError


LATE = 1050
"""After so many steps, looks are eight steps apart."""


class Loop:
    """Trains two layers, of which the first may be frozen."""

    def __init__(self, cls: Any = Adam, frozen: bool = False, channels_last: bool = False, **settings: Any) -> None:
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Conv2d(2, 8, 3), nn.Tanh(), nn.Conv2d(8, 2, 3))
        if channels_last:
            self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.network[0].requires_grad_(not frozen)
        self.optimizer: Optimizer = cls(self.network.parameters(), **settings)
        self.hd = HypergradientLR(self.optimizer)

    def steps(self, numbers: Iterable[int], factor: Callable[[int], float] = lambda number: 1.0) -> list[float]:
        rates = []
        for number in numbers:
            x = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(number))
            self.optimizer.zero_grad()
            loss = (self.network(x) - x[:, :, 2:-2, 2:-2].flip(1)).square().mean() * factor(number)
            loss.backward()
            self.hd.observe(loss)
            self.optimizer.step()
            rates.append(self.hd.lrs[0])
        return rates

    def save(self) -> list[Any]:
        return copy.deepcopy([part.state_dict() for part in (self.network, self.optimizer, self.hd)])

    def load(self, states: list[Any]) -> "Loop":
        parts: list[Any] = [self.network, self.optimizer, self.hd]
        for part, state in zip(parts, states, strict=True):
            part.load_state_dict(state)
        return self


def looks_apart(loop: Loop) -> bool:
    return bool(loop.hd.state_dict()["looks"]["stride"] == 8)


@pytest.mark.parametrize("steps", [30, LATE])
def test_layers_that_join_after_a_checkpoint_start_anew_as_without_it(steps: int) -> None:
    loop = Loop(frozen=True)
    loop.steps(range(steps))
    assert looks_apart(loop) == (steps == LATE)
    loop.network[0].requires_grad_(True)
    states = loop.save()
    after = range(steps, steps + 30)
    assert Loop().load(states).steps(after) == (rates := loop.steps(after))
    assert rates[0] < 1e-3, "the rate starts anew"


@pytest.mark.parametrize("steps", [30, LATE])
def test_groups_that_are_added_before_a_checkpoint_start_anew_as_without_it(steps: int) -> None:
    def build() -> Loop:
        loop = Loop()
        loop.optimizer = Adam(loop.network[2].parameters())
        loop.hd.detach()
        loop.hd = HypergradientLR(loop.optimizer)
        return loop

    loop, resumed = build(), build()
    loop.steps(range(steps))
    assert looks_apart(loop) == (steps == LATE)
    for one in (loop, resumed):
        one.optimizer.add_param_group({"params": list(one.network[0].parameters())})
    resumed.load(loop.save())
    after = range(steps, steps + 30)
    assert resumed.steps(after) == loop.steps(after)


def test_a_group_of_which_nothing_is_known_yet_can_be_saved() -> None:
    a, b = nn.Linear(3, 3), nn.Linear(3, 1)
    optimizer = Adam([{"params": a.parameters()}, {"params": b.parameters()}])
    hd = HypergradientLR(optimizer, scope="group")
    b.requires_grad_(False)
    for step in range(4):
        if step == 3:
            b.requires_grad_(True)
        optimizer.zero_grad()
        b(a(torch.ones(2, 3))).sum().backward()
        if step == 3:
            assert b.weight.grad is not None
            b.weight.grad.fill_(math.inf)
            with pytest.warns(RuntimeWarning, match="is not a finite number"):
                optimizer.step()
        else:
            optimizer.step()
    hd.load_state_dict(state := hd.state_dict())
    assert [own["known"] for own in state["view"]["parameters"]] == [True, True, False, False]
    assert hd.state_dict()["view"]["parameters"] == state["view"]["parameters"]
    assert torch.equal(hd.state_dict()["view"]["memory"], state["view"]["memory"])


@functools.cache
def late() -> Loop:
    """A loop of SGD that has taken so many steps. It must not be changed."""
    loop = Loop(SGD, lr=0.1)
    loop.steps(range(LATE))
    assert looks_apart(loop)
    return loop


@pytest.mark.parametrize("number", range(LATE, LATE + 4))
def test_a_gradient_that_is_not_finite_between_two_looks_does_not_matter_to_a_resumed_run(number: int) -> None:
    def go(loop: Loop, numbers: range) -> list[float]:
        rates = []
        for i in numbers:
            before = copy.deepcopy([p.data for p in loop.network.parameters()])
            rates += loop.steps([i], lambda step: math.inf if step == number else 1.0)
            if i == number:
                for p, data in zip(loop.network.parameters(), before, strict=True):
                    p.data.copy_(data)
        return rates

    loop = copy.deepcopy(late())
    go(loop, range(LATE, number + 1))
    states = loop.save()
    after = range(number + 1, number + 40)
    resumed = Loop(SGD, lr=0.1).load(states)
    assert go(resumed, after) == go(loop, after)
    assert resumed.hd.stats.nonfinite_steps == loop.hd.stats.nonfinite_steps


def test_a_checkpoint_before_the_first_step_of_a_warm_start_keeps_the_places_apart() -> None:
    first, loop = Loop(), Loop()
    first.steps(range(40))
    with torch.no_grad():
        for p in loop.network.parameters():
            p.add_(1.0)
    loop.hd.load_state_dict(first.hd.state_dict(), warm_start=True)
    resumed = Loop().load(loop.save())
    assert resumed.steps(range(40, 60)) == loop.steps(range(40, 60))


@pytest.mark.parametrize("factor", [1e-20, 1e20])
def test_a_step_that_failed_leaves_no_trace(factor: float) -> None:
    rates = []
    for fails in (False, True):
        loop = Loop(AdamW)
        loop.steps(range(20))
        if fails:
            handle = loop.optimizer.register_step_pre_hook(fail)
            with pytest.raises(MemoryError):
                loop.steps([20], lambda number: factor)
            handle.remove()
        loop.hd._tuning.looks.losses.reported.clear()
        rates.append(loop.steps(range(20, 40), lambda number: factor if number == 20 else 1.0))
    assert rates[0] == rates[1]


def failed(scheduled: bool = False) -> tuple[Optimizer, HypergradientLR, Any]:
    """An optimizer whose step has failed."""
    p = nn.Parameter(torch.ones(2))
    optimizer = SGD([p], lr=0.1)
    hd = HypergradientLR(optimizer, "additive", hypergrad_lr=0.0)
    scheduler = ExponentialLR(optimizer, 0.5) if scheduled else None
    p.grad = torch.ones(2)
    handle = optimizer.register_step_pre_hook(fail)
    with pytest.raises(MemoryError):
        optimizer.step()
    handle.remove()
    return optimizer, hd, scheduler


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*before.*optimizer.step")
def test_what_others_change_after_a_step_that_failed_is_saved() -> None:
    optimizer, hd, _ = failed()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.3})
    assert [group["lr"] for group in optimizer.state_dict()["param_groups"]] == [0.1, 0.3]
    assert [group["held"] for group in hd.state_dict()["rates"]["groups"]] == [0.1, 0.3]
    optimizer, hd, _ = failed()
    optimizer.param_groups[0]["lr"] = 0.001
    assert optimizer.state_dict()["param_groups"][0]["lr"] == 0.001
    assert hd.state_dict()["rates"]["groups"][0]["held"] == 0.001
    optimizer, hd, scheduler = failed(scheduled=True)
    scheduler.step()
    assert optimizer.state_dict()["param_groups"][0]["lr"] == optimizer.param_groups[0]["lr"] == 0.05
    assert hd.state_dict()["rates"]["groups"][0]["held"] == 0.05


def test_a_load_that_fails_takes_nothing_over() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = SGD([p], lr=0.1)
    hd = HypergradientLR(optimizer, "additive")
    told = []
    for lr in (0.1, 0.05, 0.04):
        optimizer.param_groups[0]["lr"] = lr
        before = hd.lrs
        with pytest.raises(ValueError, match="the state is not what HypergradientLR"):
            hd.load_state_dict({})
        assert hd.lrs == before
        p.grad = p.detach().clone()
        if lr == 0.04:
            with pytest.warns(RuntimeWarning, match="written into the parameter groups again"):
                optimizer.step()
        else:
            optimizer.step()
        told.append(hd.stats.writes)
    assert told == [0, 1, 2]


def test_a_load_that_fails_late_takes_nothing_over_either() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = SGD([p], lr=0.1)
    hd = HypergradientLR(optimizer, "additive")
    for _ in range(2):
        p.grad = p.detach().clone()
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.05
    before = hd.lrs
    for warm_start in (False, True):
        with pytest.raises(ValueError, match="damaged"):
            hd.load_state_dict({**hd.state_dict(), "looks": {}}, warm_start=warm_start)
        assert hd.lrs == before
        assert hd.stats.writes == 0


def test_a_group_with_a_rate_of_its_own_can_be_added_while_a_look_is_on_its_way() -> None:
    def build() -> Loop:
        loop = Loop()
        loop.hd.detach()
        loop.hd = HypergradientLR(loop.optimizer, scope="group")
        return loop

    def add(loop: Loop) -> None:
        loop.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})

    loop = build()
    loop.steps(range(LATE))
    assert looks_apart(loop)
    for number in range(LATE, LATE + 10):
        loop.steps([number])
        network, optimizer, hd = copy.deepcopy((loop.network, loop.optimizer, loop.hd))
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
        resumed = build()
        add(resumed)
        resumed.load([part.state_dict() for part in (network, optimizer, hd)])
        assert resumed.hd.step_count == number + 1


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*before.*optimizer.step")
@pytest.mark.parametrize("saved", [False, True])
def test_a_first_step_that_fails_under_a_schedule_leaves_the_scale(saved: bool) -> None:
    p = nn.Parameter(torch.zeros(1))
    optimizer = SGD([p], lr=0.01)
    ConstantLR(optimizer, 0.3, 4)
    hd, states = HypergradientLR(optimizer), list[Any]()

    def save(*_: Any) -> None:
        states.append(hd.state_dict())
        raise MemoryError

    p.grad = torch.ones(1)
    handle = optimizer.register_step_pre_hook(save)
    with pytest.raises(MemoryError):
        optimizer.step()
    handle.remove()
    if saved:
        hd.load_state_dict(states[0])
    hd.paused = True
    optimizer.step()
    assert p.item() == pytest.approx(-0.003)


@pytest.mark.parametrize("saves", [False, True])
def test_a_rate_that_is_written_into_all_groups_is_the_new_one_also_where_one_was_added(saves: bool) -> None:
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = SGD([p], lr=0.1)
    hd = HypergradientLR(optimizer, "additive")

    def step() -> None:
        for x in (p, q):
            x.grad = x.detach().clone()
        optimizer.step()

    step()
    step()
    optimizer.add_param_group({"params": [q], "lr": 0.1})
    if saves:
        hd.state_dict()
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    step()
    assert hd.lrs == pytest.approx([0.01218] * 2, rel=1e-3)


@pytest.mark.parametrize("engine_first", [False, True])
def test_torch_s_own_functions_load_before_the_engine_or_after_it(engine_first: bool) -> None:
    loop, resumed = Loop(), Loop()
    loop.steps(range(6))
    model, optimizer = copy.deepcopy(get_state_dict(loop.network, loop.optimizer))
    state = loop.hd.state_dict()
    if engine_first:
        resumed.hd.load_state_dict(state)
    set_state_dict(resumed.network, resumed.optimizer, model_state_dict=model, optim_state_dict=optimizer)
    if not engine_first:
        resumed.hd.load_state_dict(state)
    assert resumed.steps(range(6, 20)) == loop.steps(range(6, 20))


def test_what_is_remembered_in_another_order_of_memory_is_dropped() -> None:
    loop = Loop()
    loop.steps(range(40))
    resumed = Loop(channels_last=True).load(loop.save())
    for name in ("0.bias", "2.bias"):  # these have one dimension, so they are known in any order
        resumed.network.get_parameter(name).requires_grad_(False)
    with pytest.warns(RuntimeWarning, match="the memory of former steps starts anew"):
        resumed.steps([40])
    same = Loop(channels_last=True)
    same.steps(range(40))
    again = Loop(channels_last=True).load(same.save())
    assert again.steps(range(40, 60)) == same.steps(range(40, 60))


# ---------------------------------------------------------------------- first steps of unknown direction


class Sign(Optimizer):
    """Moves by the sign of the gradient, and idles in its first steps."""

    def __init__(self, parameters: Any, lr: float = 0.01, idle: int = 0) -> None:
        self.count, self.idle = 0, idle
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.count += 1
        for p in self.param_groups[0]["params"]:
            if p.grad is not None and self.count > self.idle:
                p.sub_(p.grad.sign(), alpha=self.param_groups[0]["lr"])


def first_rate(cls: Any, scale: float, **settings: Any) -> float:
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    network = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer: Optimizer = cls(network.parameters(), lr=0.01, **settings)
    hd = HypergradientLR(optimizer)
    start: list[Tensor] = [p.detach().clone() for p in network.parameters()]
    for _ in range(40):
        optimizer.zero_grad()
        ((network(x) - x[:, :1]).square().mean() * scale).backward()
        optimizer.step()
        if not all(map(torch.equal, start, network.parameters())):
            return hd.lrs[0]
    return math.nan


@pytest.mark.parametrize("cls", [NAdam, Adafactor, Adagrad, RMSprop, Sign], ids=lambda cls: cls.__name__)
def test_the_first_rate_does_not_depend_on_the_scale_of_the_loss(cls: Any) -> None:
    """A trial step that was too short counts in the optimizer's averages, so the direction is not quite the same."""
    usual = first_rate(cls, 1.0)
    for scale in (1e3, 1e5, 1e7, 1e9, 1e12):
        assert 0.4 < first_rate(cls, scale) / usual < 2.5


@pytest.mark.parametrize("scale", [1.0, 1e7])
def test_an_optimizer_that_idles_gets_the_same_first_rate(scale: float) -> None:
    assert first_rate(Sign, scale, idle=12) == pytest.approx(first_rate(Sign, 1.0), rel=0.1)


class Projected(SGD):
    """Sets the norms of all rows to 1 at the end of each step."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p.sub_(p.grad, alpha=self.param_groups[0]["lr"])
                p.div_(p.norm(dim=-1, keepdim=True))


def test_a_projection_in_the_first_step_is_no_part_of_the_direction() -> None:
    torch.manual_seed(0)
    rates = []
    for cls in (SGD, Projected):
        w = nn.Parameter(torch.linspace(1, 4, 40).view(4, 10))
        hd = HypergradientLR(optimizer := cls([w], lr=0.01))
        w.grad = torch.linspace(-1, 2, 40).view(4, 10).sin()
        optimizer.step()
        rates += hd.lrs
    assert 0.5 < rates[1] / rates[0] < 30, "rows are some ten times as long as 1, so directions are as much shorter"


def test_an_optimizer_that_never_moves_is_reported() -> None:
    with pytest.warns(RuntimeWarning, match="the optimizer does not move in its first steps"):
        assert math.isnan(first_rate(Sign, 1.0, idle=1000))


def test_torch_s_own_optimizers_are_known_by_the_place_of_their_class(recwarn: pytest.WarningsRecorder) -> None:
    HypergradientLR(Adafactor([nn.Parameter(torch.ones(2))]))
    assert not recwarn.list


def test_a_mark_that_the_optimizer_has_left_itself_is_reported() -> None:
    class Marked(SGD):
        def __init__(self, parameters: Any, lr: float) -> None:
            super().__init__(parameters, lr=lr)
            for group in self.param_groups:
                group.setdefault("initial_lr", lr)

    with pytest.warns(
        RuntimeWarning, match=r"there is no cooldown. If there is no scheduler, pass HypergradientLR\(sched"
    ):
        assert HypergradientLR(Marked([nn.Parameter(torch.ones(2))], lr=0.1), total_steps=50).scheduled
    assert not HypergradientLR(Marked([nn.Parameter(torch.ones(2))], lr=0.1), total_steps=50, scheduled=False).scheduled
