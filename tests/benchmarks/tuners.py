"""The methods: grids of rates, the rules of lightning_hd, and tuners from packages of others, used as they advise."""

import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_hd import HypergradientLR
from tests.benchmarks.gala import FIRST_RATE, GALA
from tests.benchmarks.osgm import ETA, ETA_BETA, OSGM, Oracle, flat_gradient
from tests.benchmarks.problems import Problem
from tests.benchmarks.schedules import warm_cooldown, warm_cosine

BASES: dict[str, Callable[..., Optimizer]] = {
    "SGD": SGD,
    "Nesterov": functools.partial(SGD, momentum=0.9, nesterov=True),
    "Adam": Adam,
}
"""A task with weight decay has AdamW in the place of Adam."""

RULE = "auto"
"""The rule under test."""
RULE_RATE = 1e-3
"""The rate that it is configured with, which should not matter."""
OTHER_RATES = (0.0, 1e-8, 1.0, 1e3)
"""Rates from which it should do the very same."""
PAPER_RATES = (1e-5, 1e-3, 1e-1)

GRID = {"SGD": (-5, 2), "Nesterov": (-7, 0), "Adam": (-7, -2)}
"""The range of each grid, by the index of the rate: see :func:`grid_rate`. The end is not in it."""


def grid_rate(index: int) -> float:
    """Rates a factor of √10 apart."""
    return float(10 ** (index / 2))


FREE_RATES = tuple(map(grid_rate, range(-7, -1)))
"""Those that Schedule-Free is tuned over: up to ten times as high as Adam's, as its authors recommend."""


@dataclass
class Tuning:
    """What a method gives the training loop."""

    optimizer: Optimizer
    rate: Callable[[], float]  # that of the last step
    after_step: Callable[[], object] = lambda: None
    observe: Callable[[Tensor], object] = lambda loss: None  # the loss, before the step
    evaluated: nn.Module | None = None  # validated in the place of the network that is trained


@dataclass(frozen=True)
class Method:
    """A way to set the learning rate.

    Args:
        start: Makes it for a network, a base optimizer, a configured rate, a decoupled weight decay, and a
            number of steps.
        rates: The rates to try for each base optimizer it is for; ``None``: the grid.
        package: Of the ``bench`` extra; by the name it is imported with.
        oldest: The first version of the package that has the method; ``None``: all have it.
        schedule: The schedule that goes on top, for an optimizer and a number of steps.
    """

    start: Callable[[nn.Module, str, float, float, int], Tuning]
    rates: Mapping[str, Sequence[float]] | None
    package: str | None = None
    oldest: str | None = None
    schedule: Callable[[Optimizer, int], LRScheduler] | None = None

    @property
    def optimizers(self) -> Sequence[str]:
        """The base optimizers that it is for."""
        return list(BASES) if self.rates is None else list(self.rates)

    def missing(self) -> list[str]:
        """Its package, if it is not installed or too old."""
        if self.package is None:
            return []
        there = importlib.util.find_spec(self.package) is not None
        if there and (self.oldest is None or Version(version(self.package)) >= Version(self.oldest)):
            return []
        return [self.package + (f">={self.oldest}" if self.oldest else "")]


def trainable(network: nn.Module) -> list[nn.Parameter]:
    """The parameters that are not frozen."""
    return [p for p in network.parameters() if p.requires_grad]


def plain(network: nn.Module, base: str, rate: float, decay: float) -> Optimizer:
    """The base optimizer itself."""
    if decay:
        return AdamW(trainable(network), lr=rate, weight_decay=decay)
    return BASES[base](trainable(network), lr=rate)


def constant(network: nn.Module, base: str, rate: float, decay: float, steps: int) -> Tuning:
    optimizer = plain(network, base, rate, decay)
    return Tuning(optimizer, lambda: float(optimizer.param_groups[0]["lr"]))


def hypergradient(
    network: nn.Module,
    base: str,
    rate: float,
    decay: float,
    steps: int,
    rule: Any,
    length: bool = False,
    told: bool = True,
) -> Tuning:
    """One of lightning_hd's rules, which may know the length of the run and the loss."""
    optimizer = plain(network, base, rate, decay)
    engine = HypergradientLR(optimizer, rule=rule, total_steps=steps if length else None)
    tuning = Tuning(optimizer, lambda: engine.lrs[0])
    return replace(tuning, observe=engine.observe) if told else tuning


def prodigy(
    network: nn.Module, base: str, rate: float, decay: float, steps: int, safeguard_warmup: bool = False
) -> Tuning:
    """Its authors ask for the safeguard under a warm-up."""
    from prodigyopt import Prodigy

    optimizer: Optimizer = Prodigy(trainable(network), lr=rate, weight_decay=decay, safeguard_warmup=safeguard_warmup)
    (group,) = optimizer.param_groups
    return Tuning(optimizer, lambda: float(group["d"] * group["lr"]))


def prodigy_plus(network: nn.Module, base: str, rate: float, decay: float, steps: int) -> Tuning:
    """Prodigy's estimate, Schedule-Free's average."""
    from prodigyplus.prodigy_plus_schedulefree import ProdigyPlusScheduleFree

    optimizer: Optimizer = ProdigyPlusScheduleFree(trainable(network), lr=rate, weight_decay=decay)
    (group,) = optimizer.param_groups
    return Tuning(optimizer, lambda: float(group["d"] * group["effective_lr"]))


def greedy(network: nn.Module, base: str, rate: float, decay: float, steps: int) -> Tuning:
    """GreedyLR, as in its authors' example for a loop, but told the loss of each step."""
    from transformers.optimization import GreedyLR

    tuning = constant(network, base, rate, decay, steps)
    scheduler = GreedyLR(tuning.optimizer, factor=0.99, patience=10, min_lr=1e-5, smooth=True, window_size=50)
    return replace(tuning, observe=lambda loss: scheduler.step(loss.item()))


def d_adaptation(network: nn.Module, base: str, rate: float, decay: float, steps: int) -> Tuning:
    from dadaptation import DAdaptAdam, DAdaptSGD

    makers: dict[str, Callable[..., Optimizer]] = {
        "SGD": DAdaptSGD,
        "Nesterov": functools.partial(DAdaptSGD, momentum=0.9),
        "Adam": DAdaptAdam,
    }
    optimizer = makers[base](
        trainable(network), lr=rate, **({"weight_decay": decay, "decouple": True} if decay else {})
    )
    (group,) = optimizer.param_groups
    return Tuning(optimizer, lambda: float(group["d"] * group["lr"] / group.get("g0_norm", 1.0)))


def mechanic(network: nn.Module, base: str, rate: float, decay: float, steps: int) -> Tuning:
    from mechanic_pytorch import mechanize

    # It derives a class from the optimizer's, so it takes the class itself.
    settings: dict[str, Any] = {"momentum": 0.9, "nesterov": True} if base == "Nesterov" else {}
    settings |= {"weight_decay": decay} if decay else {}
    optimizer_class = SGD if base != "Adam" else AdamW if decay else Adam
    optimizer: Optimizer = mechanize(optimizer_class)(trainable(network), lr=rate, **settings)
    (group,) = optimizer.param_groups
    state: Mapping[Any, Any] = optimizer.state
    return Tuning(optimizer, lambda: float(state["_mechanic"]["s"].sum() * group["lr"]))


def dog(network: nn.Module, base: str, rate: float, decay: float, steps: int) -> Tuning:
    """Validated, as the package asks, by its average of the iterates."""
    from dog import DoG, PolynomialDecayAverager

    optimizer: Optimizer = DoG(trainable(network), lr=rate, weight_decay=decay)
    averager = PolynomialDecayAverager(network)
    (group,) = optimizer.param_groups
    return Tuning(optimizer, lambda: float(group["eta"][0]), averager.step, evaluated=averager.averaged_model)


def schedule_free(network: nn.Module, base: str, rate: float, decay: float, steps: int, warm_up: float = 0.0) -> Tuning:
    """Its authors recommend a warm-up, over a part of the steps."""
    from schedulefree import AdamWScheduleFree, SGDScheduleFree

    makers: dict[str, Callable[..., Optimizer]] = {"SGD": SGDScheduleFree, "Adam": AdamWScheduleFree}
    optimizer = makers[base](trainable(network), lr=rate, weight_decay=decay, warmup_steps=round(warm_up * steps))
    (group,) = optimizer.param_groups
    return Tuning(optimizer, lambda: float(group["scheduled_lr"]))


def oracle_of(make: Callable[[], Problem] | None) -> Oracle:
    """Evaluates the present batch again, elsewhere. It must be asked once per step.

    Args:
        make: Makes the problem anew, from the same seed: this twin draws the same batches.
    """
    assert make is not None, "the method needs a twin of the problem"
    twin = make()
    params = trainable(twin.network)
    drawn = torch.get_rng_state()  # for dropout, of which twins draw the same from here on

    def evaluate(point: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal drawn
        vector_to_parameters(point, params)
        twin.network.zero_grad()
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            torch.set_rng_state(drawn)
            loss = twin.train_loss()
            drawn = torch.get_rng_state()
            loss.backward()
        return loss.detach(), flat_gradient(params)

    return evaluate


def osgm(
    network: nn.Module, base: str, rate: float, decay: float, steps: int, make: Callable[[], Problem] | None
) -> Tuning:
    """Heavy ball in the place of Nesterov's momentum."""
    optimizer = OSGM(trainable(network), oracle_of(make), rate, eta_beta=ETA_BETA if base == "Nesterov" else None)
    return Tuning(optimizer, lambda: float(optimizer.step_size.value), observe=optimizer.observe)


def gala(
    network: nn.Module, base: str, rate: float, decay: float, steps: int, make: Callable[[], Problem] | None
) -> Tuning:
    optimizer = SGD(trainable(network))
    tuner = GALA(optimizer, oracle_of(make), rate)
    return Tuning(optimizer, lambda: tuner.rate)


def rule_method(
    rule: str,
    rates: Sequence[float],
    schedule: Callable[[Optimizer, int], LRScheduler] | None = None,
    cooldown: bool = False,
    told: bool = True,
) -> Method:
    """One of lightning_hd's rules, for all base optimizers; see ``hypergradient``."""
    start = functools.partial(hypergradient, rule=rule, length=cooldown or schedule is not None, told=told)
    return Method(start, dict.fromkeys(BASES, rates), schedule=schedule)


def methods(rule: str, make: Callable[[], Problem] | None = None) -> dict[str, Method]:
    """All methods by name; that of the rule under test is its own.

    Args:
        rule: The rule under test.
        make: Makes the problem, for methods that evaluate a batch twice; they cannot start without it.
    """
    one = dict.fromkeys(BASES, (1.0,))
    adam, sgd = {"Adam": (1.0,)}, {"SGD": (1.0,)}
    return {
        "constant": Method(constant, None),
        "cosine": Method(constant, None, schedule=warm_cosine),
        "cooldown": Method(constant, None, schedule=warm_cooldown),
        "additive": rule_method("additive", PAPER_RATES),
        "multiplicative": rule_method("multiplicative", PAPER_RATES),
        "prodigy": Method(prodigy, adam, "prodigyopt"),
        "prodigy+cosine": Method(
            functools.partial(prodigy, safeguard_warmup=True), adam, "prodigyopt", schedule=warm_cosine
        ),
        "prodigy-plus": Method(prodigy_plus, adam, "prodigyplus"),
        "mechanic": Method(mechanic, one, "mechanic_pytorch"),
        "mechanic+cosine": Method(mechanic, one, "mechanic_pytorch", schedule=warm_cosine),
        "d-adaptation": Method(d_adaptation, one, "dadaptation"),
        "d-adaptation+cosine": Method(d_adaptation, one, "dadaptation", schedule=warm_cosine),
        "dog": Method(dog, sgd, "dog"),
        "schedule-free": Method(schedule_free, {"SGD": (1.0,), "Adam": (0.0025,)}, "schedulefree"),
        "schedule-free tuned": Method(
            functools.partial(schedule_free, warm_up=0.05), {"Adam": FREE_RATES}, "schedulefree"
        ),
        "greedy": Method(greedy, {"Adam": (RULE_RATE,)}, "transformers", oldest="5.24"),
        "osgm": Method(functools.partial(osgm, make=make), {"SGD": (ETA,), "Nesterov": (ETA,)}),
        "gala": Method(functools.partial(gala, make=make), {"SGD": (FIRST_RATE,)}),
        **({} if rule in ("additive", "multiplicative") else {rule: rule_method(rule, (RULE_RATE,))}),
        f"{rule}+cooldown": rule_method(rule, (RULE_RATE,), cooldown=True),
        f"{rule}+cosine": rule_method(rule, (RULE_RATE,), schedule=warm_cosine),
        f"{rule}+untold": rule_method(rule, (RULE_RATE,), told=False),
    }


def check_rule(rule: Any) -> None:
    """Raise :class:`ValueError` where lightning_hd has no such rule."""
    HypergradientLR(SGD([torch.zeros(1, requires_grad=True)], lr=1.0), rule=rule).detach()
