"""Every scheduler of torch beside the callback: its values stay its own, and times the scale they are the rates."""

import copy
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from lightning.fabric import Fabric
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.optim import SGD, Optimizer, lr_scheduler
from torch.optim.swa_utils import SWALR

from lightning_hd import HypergradientDescent, HypergradientLR
from lightning_hd.rules import RuleName
from tests import reference
from tests.pairs import by_turns, covering
from tests.test_callback import Reference, make_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*The epoch parameter in `scheduler.step.*"),  # torch's own, in SequentialLR
]

EPOCHS, EPOCH = 5, 4

RULES: list[RuleName] = ["auto", "additive", "multiplicative"]

SCHEDULERS = [
    cls
    for name in lr_scheduler.__all__
    if inspect.isclass(cls := getattr(lr_scheduler, name)) and cls is not lr_scheduler.LRScheduler
] + [SWALR]

ARGUMENTS: dict[str, Callable[[Optimizer], dict[str, Any]]] = {
    "ChainedScheduler": lambda optimizer: {
        "schedulers": [lr_scheduler.LinearLR(optimizer, 0.5), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    },
    "ConstantLR": lambda _: {"total_iters": 3},
    "CosineAnnealingLR": lambda _: {"T_max": 5},
    "CosineAnnealingWarmRestarts": lambda _: {"T_0": 3},
    "CyclicLR": lambda _: {"base_lr": [0.01, 0.02], "max_lr": [0.03, 0.1], "step_size_up": 3},
    "ExponentialLR": lambda _: {"gamma": 0.9},
    "LambdaLR": lambda _: {"lr_lambda": [lambda n: min(1.0, n / 3), lambda n: min(1.0, n / 5)]},
    "MultiStepLR": lambda _: {"milestones": [2, 3]},
    "MultiplicativeLR": lambda _: {"lr_lambda": lambda n: 1 - 1 / (n + 2)},
    "OneCycleLR": lambda _: {"max_lr": [0.03, 0.1], "total_steps": EPOCHS * EPOCH},
    "ReduceLROnPlateau": lambda _: {"patience": 1, "factor": 0.5},
    "SWALR": lambda _: {"swa_lr": 0.005, "anneal_epochs": 4},
    "SequentialLR": lambda optimizer: {
        "schedulers": [lr_scheduler.LinearLR(optimizer, total_iters=2), lr_scheduler.StepLR(optimizer, 2)],
        "milestones": [2],
    },
    "StepLR": lambda _: {"step_size": 3},
}
"""Those that a scheduler needs, and some for its values to change within so few steps, by the name of its class."""


def build(cls: Any, optimizer: Optimizer) -> Any:
    parameters = inspect.signature(cls).parameters
    arguments = ARGUMENTS.get(cls.__name__, lambda _: {})(optimizer)
    if "optimizer" in parameters:
        arguments["optimizer"] = optimizer
    missing = [name for name, p in parameters.items() if p.default is p.empty and name not in arguments]
    assert not missing, f"{cls.__name__} needs {', '.join(missing)}: write what they are into ARGUMENTS of this file"
    return cls(**arguments)


def two_groups(network: nn.Module) -> Optimizer:
    p = list(network.parameters())
    return SGD([{"params": p[:2], "lr": 0.01}, {"params": p[2:], "lr": 0.02}], momentum=0.9)


@dataclass
class Run:
    """What was seen in each step, for each group: before it, and the engine's numbers after it."""

    scheduled: list[list[float]] = field(default_factory=list)
    last_lrs: list[list[float]] = field(default_factory=list)
    momenta: list[list[float]] = field(default_factory=list)
    lrs: list[list[float]] = field(default_factory=list)
    scales: list[list[float]] = field(default_factory=list)

    def before_step(self, optimizer: Optimizer, scheduler: Any) -> None:
        self.scheduled.append([group["lr"] for group in optimizer.param_groups])
        self.last_lrs.append(list(scheduler.get_last_lr()))
        self.momenta.append([group["momentum"] for group in optimizer.param_groups])

    def after_step(self, engine: HypergradientLR) -> None:
        self.lrs.append(engine.lrs)
        self.scales.append(engine.scales * (len(engine.lrs) // len(engine.scales)))

    def check(self, alone: "Run") -> None:
        assert (self.scheduled, self.last_lrs, self.momenta) == (alone.scheduled, alone.last_lrs, alone.momenta)
        assert len(self.lrs) == EPOCHS * EPOCH
        assert all(len({values[i] for values in self.scheduled}) > 1 for i in range(2)), "the schedule is no schedule"
        for lrs, scheduled, scales in zip(self.lrs, self.scheduled, self.scales, strict=True):
            assert lrs == pytest.approx([a * b for a, b in zip(scheduled, scales, strict=True)], rel=1e-12, abs=0)
        assert all(abs(scale - 1) > 0.01 for scale in self.scales[-1])


class Watch(Callback):
    def __init__(self, hd: HypergradientDescent | None) -> None:
        self.hd = hd
        self.run = Run()

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self.run.before_step(trainer.optimizers[0], trainer.lr_scheduler_configs[0].scheduler)

    def on_train_batch_end(self, *_: Any) -> None:
        if self.hd:
            self.run.after_step(self.hd.engines[0])


class Scheduled(Reference):
    """The reference problem with two groups, a scheduler, and a metric for it that training does not change."""

    def __init__(self, cls: Any, interval: str) -> None:
        super().__init__()
        self.cls, self.interval = cls, interval

    def configure_optimizers(self) -> Any:
        optimizer = two_groups(self.network)
        config = {"scheduler": build(self.cls, optimizer), "interval": self.interval, "monitor": "metric"}
        return {"optimizer": optimizer, "lr_scheduler": config}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("metric", 1.0)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(("cls", "interval"), by_turns(SCHEDULERS, ("step", "epoch"), every=2))
def test_schedulers_compose_in_a_trainer(tmp_path: Path, cls: Any, interval: str) -> None:
    """Rules take turns: each one meets both intervals."""
    rule, runs = RULES[(SCHEDULERS.index(cls) + (interval == "epoch")) % len(RULES)], []
    for hd in (None, HypergradientDescent(rule)):
        watch = Watch(hd)
        make_trainer(tmp_path, *([hd, watch] if hd else [watch]), max_epochs=EPOCHS, limit_train_batches=EPOCH).fit(
            Scheduled(cls, interval)
        )
        runs.append(watch.run)
    runs[1].check(alone=runs[0])


@pytest.mark.parametrize("cls", [lr_scheduler.LambdaLR, lr_scheduler.ExponentialLR])
def test_a_scheduler_that_is_stepped_in_a_hook_of_the_optimizer(tmp_path: Path, cls: Any) -> None:
    class Hooked(Reference):
        def configure_optimizers(self) -> Any:
            self.optimizer = two_groups(self.network)
            self.scheduler = build(cls, self.optimizer)
            self.optimizer.register_step_post_hook(lambda *_: self.scheduler.step())
            return self.optimizer

    runs = []
    for hd in (None, *map(HypergradientDescent, RULES)):
        run, module = Run(), Hooked()

        class Record(Callback):
            def on_train_batch_start(self, *_: Any, run: Run = run, module: Hooked = module) -> None:
                run.before_step(module.optimizer, module.scheduler)

            def on_train_batch_end(self, *_: Any, run: Run = run, hd: HypergradientDescent | None = hd) -> None:
                if hd:
                    run.after_step(hd.engines[0])

        make_trainer(tmp_path, *([hd] if hd else []), Record(), limit_train_batches=EPOCHS * EPOCH).fit(module)
        runs.append(run)
    for run in runs[1:]:
        run.check(alone=runs[0])


@pytest.mark.parametrize("rule", RULES)
def test_a_scheduler_that_comes_in_on_resuming_is_told(rule: Any) -> None:
    def train(optimizer: Optimizer, network: nn.Module, steps: slice) -> None:
        for batch in reference.torch_batches()[steps]:
            optimizer.zero_grad()
            reference.torch_loss(network, *batch).backward()
            optimizer.step()

    network, other = reference.torch_network(), reference.torch_network()
    optimizer = SGD(network.parameters(), lr=0.01)
    first = HypergradientLR(optimizer, rule)
    train(optimizer, network, slice(10))
    resumed = SGD(other.parameters(), lr=0.01)
    lr_scheduler.LambdaLR(resumed, lambda _: 1.0)
    second = HypergradientLR(resumed, rule)
    second.load_state_dict(first.state_dict())
    with pytest.warns(RuntimeWarning, match="training without a scheduler: the learned scale starts anew"):
        train(resumed, other, slice(10, 11))
    assert first.scales != [1.0]


def test_an_optimizer_that_changes_its_rate_in_a_step_does_so_under_a_schedule_as_well() -> None:
    class Fading(SGD):
        def step(self, closure: Any = None) -> Any:
            result = super().step(closure)
            self.param_groups[0]["lr"] *= 0.99
            return result

    runs: list[list[float]] = []
    for tuned in (False, True):
        network = reference.torch_network()
        optimizer = Fading(network.parameters(), lr=0.01)
        scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
        if tuned:
            HypergradientLR(optimizer, "multiplicative")
        runs.append([])
        for batch in reference.torch_batches()[:10]:
            optimizer.zero_grad()
            reference.torch_loss(network, *batch).backward()
            optimizer.step()
            scheduler.step()
            runs[-1].append(optimizer.param_groups[0]["lr"])
    assert runs[1] == pytest.approx(runs[0], rel=1e-12)


@pytest.mark.parametrize(
    ("cls", "order", "scope"), covering(SCHEDULERS, [("scheduler", 1), ("engine", EPOCH)], ["global", "group"])
)
def test_schedulers_compose_in_a_plain_loop(
    cls: Any, order: tuple[str, int], scope: Literal["global", "group"]
) -> None:
    """Where one of both is built first, and the scheduler is stepped after so many steps."""
    first, every = order

    def train(rule: Any | None) -> Run:
        run, network = Run(), reference.torch_network()
        optimizer = two_groups(network)
        scheduler = build(cls, optimizer) if first == "scheduler" else None
        plateau = cls is lr_scheduler.ReduceLROnPlateau
        engine = HypergradientLR(optimizer, rule, scope=scope, scheduled=plateau or None) if rule else None
        scheduler = scheduler or build(cls, optimizer)
        for t, batch in enumerate(reference.torch_batches()[: EPOCHS * EPOCH], start=1):
            run.before_step(optimizer, scheduler)
            optimizer.zero_grad()
            reference.torch_loss(network, *batch).backward()
            optimizer.step()
            if engine:
                run.after_step(engine)
            if t % every == 0:
                scheduler.step(*[1.0] * plateau)
        return run

    alone = train(None)
    for rule in RULES:
        train(rule).check(alone)


@pytest.mark.parametrize("rule", RULES)
def test_a_scale_that_no_longer_learns_stays_where_a_schedule_rises(rule: Any) -> None:
    network = reference.torch_network()
    optimizer = two_groups(network)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda t: 1 + t)
    hd, scales = HypergradientLR(optimizer, rule, stop_after=5), []
    for batch in reference.torch_batches()[:20]:
        optimizer.zero_grad()
        reference.torch_loss(network, *batch).backward()
        optimizer.step()
        scheduler.step()
        scales += hd.scales
    assert scales[4:] == pytest.approx([scales[4]] * 16)
    assert scales[4] != 1


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_a_loop_is_told_how_to_reach_the_rate_of_averaging(rule: Any, before: bool) -> None:
    network = reference.torch_network()
    optimizer = SGD(network.parameters(), lr=0.01)
    if before:
        lr_scheduler.ConstantLR(optimizer, 0.5)
    hd = HypergradientLR(optimizer, rule)

    def train(*steps: int) -> None:
        for i in steps:
            optimizer.zero_grad()
            reference.torch_loss(network, *reference.torch_batches()[i]).backward()
            optimizer.step()

    train(*range(10))
    learned = hd.lrs
    if before:
        SWALR(optimizer, swa_lr=0.05)
        with pytest.warns(RuntimeWarning, match=r"multiplies the rates of SWALR.*call detach\(\)"):
            train(10)
        learned = hd.lrs
    hd.detach()
    for group, lr in zip(optimizer.param_groups, learned, strict=True):
        group["lr"] = lr
    swa = SWALR(optimizer, swa_lr=0.05, anneal_epochs=5, anneal_strategy="linear")
    lrs = []
    for i in range(11, 18):
        lrs.append(optimizer.param_groups[0]["lr"])
        train(i)
        swa.step()
    assert lrs == pytest.approx([learned[0] + (0.05 - learned[0]) * min(1.0, n / 5) for n in range(7)])


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_scheduler_of_an_optimizer_that_fabric_wraps(wrapped: bool, late: bool) -> None:
    inner = SGD(reference.torch_network().parameters(), lr=0.01)
    optimizer = Fabric(accelerator="cpu", devices=1).setup_optimizers(inner)
    steps = [
        lambda: lr_scheduler.ExponentialLR(optimizer if wrapped else inner, 0.9),  # type: ignore[arg-type]
        lambda: HypergradientLR(optimizer),  # type: ignore[arg-type]
    ]
    made = [step() for step in steps[:: -1 if late else 1]]
    assert made[not late].scheduled  # type: ignore[attr-defined]


# ---------------------------------------------------------------------- schedulers that come and go on resuming


STEPS = 20


class Resumable:
    """A plain loop whose checkpoint holds the states of the model, the optimizer and the engine."""

    def __init__(self, scheduled: bool, rule: Any, order: str = "engine", state: dict[str, Any] | None = None) -> None:
        self.network = reference.torch_network()
        self.scheduler: lr_scheduler.LRScheduler | None = None
        self.optimizer = SGD(self.network.parameters(), lr=0.01, momentum=0.9)
        steps = {"scheduler": self.add_scheduler, "optimizer": self.load_optimizer, "engine": self.add_engine}
        orders = {"engine": "scheduler optimizer engine", "optimizer": "scheduler engine optimizer"}
        orders["scheduler"] = "optimizer engine scheduler"
        self.scheduled, self.rule, self.state = scheduled, rule, state
        for step in orders[order].split():
            steps[step]()
        if state is not None:
            self.network.load_state_dict(state["network"])
            self.hd.load_state_dict(state["hd"])

    def add_scheduler(self) -> None:
        if self.scheduled:
            self.scheduler = lr_scheduler.LinearLR(self.optimizer, 1.0, 0.5, total_iters=100)

    def load_optimizer(self) -> None:
        if self.state is not None:
            self.optimizer.load_state_dict(self.state["optimizer"])

    def add_engine(self) -> None:
        self.hd = HypergradientLR(self.optimizer, self.rule, total_steps=2 * STEPS, cooldown=0.25)

    def train(self) -> list[float]:
        lrs = []
        for batch in reference.torch_batches()[:STEPS]:
            self.optimizer.zero_grad()
            reference.torch_loss(self.network, *batch).backward()
            self.optimizer.step()
            if self.scheduler is not None:
                self.scheduler.step()
            lrs += self.hd.lrs
        return lrs

    def states(self) -> dict[str, Any]:
        parts = {"network": self.network, "optimizer": self.optimizer, "hd": self.hd}
        return {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}  # type: ignore[attr-defined]


def falls(lrs: list[float]) -> bool:
    """Whether the rates of the last steps are those of a cooldown to 0."""
    return lrs[-1] < 0.2 * lrs[-STEPS // 2]


@pytest.mark.parametrize("order", ["engine", "optimizer", "scheduler"])
@pytest.mark.parametrize("now", [False, True])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("rule", ["auto", "additive"])
def test_a_loop_is_scheduled_where_a_scheduler_was_built(rule: Any, before: bool, now: bool, order: str) -> None:
    if now and not before and order == "engine":
        pytest.skip("the state took away the only mark before the engine was built")
    first = Resumable(before, rule)
    lrs = first.train()
    resumed = Resumable(now, rule, order, first.states())
    assert resumed.hd.scheduled == now
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        later = resumed.train()
    assert falls(later) != now
    told = [str(warning.message) for warning in caught if "the saved state is of a training" in str(warning.message)]
    assert ["with a scheduler" in message for message in told] == [before] * (before != now)
    if not (now and not before):  # a scheduler starts from its own rate
        assert later[0] == pytest.approx(lrs[-1], rel=0.12)


def test_a_rate_that_is_written_in_the_place_of_a_scheduler_is_the_new_one() -> None:
    first = Resumable(True, "multiplicative")
    first.train()
    resumed = Resumable(False, "multiplicative", state=first.states())
    resumed.optimizer.param_groups[0]["lr"] = 0.003
    with pytest.warns(RuntimeWarning, match="there is none now"):
        assert resumed.train()[0] == pytest.approx(0.003, rel=0.12)


def test_a_copy_knows_of_the_scheduler() -> None:
    first = Resumable(True, "additive")
    first.train()
    both = copy.deepcopy((first.hd, first.scheduler))
    assert both[0].scheduled
    assert not copy.deepcopy(Resumable(False, "additive").hd).scheduled


class Loops(Reference):
    """The reference problem with a scheduler of the module, from somewhere."""

    def __init__(self, place: str, manual: bool) -> None:
        super().__init__()
        self.place = place
        self.scheduler: lr_scheduler.LRScheduler | None = None
        self.automatic_optimization = not manual

    def build(self, place: str, optimizer: Any) -> Any:
        if place == self.place and self.scheduler is None:
            self.scheduler = lr_scheduler.ExponentialLR(optimizer, 0.99)
        return self.scheduler

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=0.01)
        returned = self.build("returned", optimizer)
        self.build("kept", optimizer)
        scheduler = {"lr_scheduler": {"scheduler": returned, "interval": "step"}} if self.place == "returned" else {}
        return {"optimizer": optimizer, **scheduler}

    def on_fit_start(self) -> None:
        self.build("on_fit_start", self.optimizers())

    def on_train_start(self) -> None:
        self.build("on_train_start", self.optimizers())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.build("training_step", self.optimizers())
        loss = super().training_step(batch, batch_idx)
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        if self.scheduler is not None and (self.place != "returned" or not self.automatic_optimization):
            self.scheduler.step()


PLACES = ["returned", "kept", "on_fit_start", "on_train_start", "training_step"]


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint.*")
@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize(
    ("before", "now"), [("returned", place) for place in ["none", *PLACES]] + [("none", "returned")]
)
def test_a_trainer_is_scheduled_where_a_scheduler_was_built(
    tmp_path: Path, before: str, now: str, manual: bool
) -> None:
    def fit(
        place: str, scheduled: bool | None, epochs: int, *others: Callback, **arguments: Any
    ) -> HypergradientDescent:
        hd = HypergradientDescent(scheduled=scheduled)
        trainer = make_trainer(tmp_path, hd, *others, max_epochs=epochs, limit_train_batches=STEPS)
        trainer.fit(Loops(place, manual), **arguments)
        assert len(hd.lrs["lr-SGD"]) == STEPS
        return hd

    fit(before, None, 1, ModelCheckpoint(tmp_path, save_last=True))
    for scheduled in (None, True, False) if now in ("none", "returned", "training_step") else (None,):
        hd = fit(now, scheduled, 2, ckpt_path=tmp_path / "last.ckpt")
        under = now != "none" if scheduled is None else scheduled
        assert hd.engines[0].scheduled == under
        if not manual and scheduled is not False:
            assert falls(hd.lrs["lr-SGD"]) != under
        if scheduled is None:
            assert hd.engines[0].stats.writes == 0
