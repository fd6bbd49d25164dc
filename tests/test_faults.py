"""What can go wrong in a training, with HypergradientDescent in the Trainer: it works, or says clearly why not."""

import copy
import math
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer, RMSprop

from lightning_hd import HypergradientDescent, HypergradientLR
from tests.pairs import covering
from tests.test_callback import Interrupting, Reference, make_trainer, same
from tests.test_loops import Manual

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]

RULES = ["additive", "multiplicative", "auto"]
FAMILIES: list[tuple[Any, dict[str, Any]]] = [
    (SGD, {}),
    (SGD, {"momentum": 0.9}),
    (SGD, {"momentum": 0.9, "nesterov": True}),
    (RMSprop, {}),
    (Adam, {}),
]


def one(batch_idx: int) -> float:
    return 1.0


class Network(Reference):
    """The reference problem for any optimizer, any dtype, and with a factor in the loss of each batch."""

    def __init__(self, cls: Any = SGD, lr: Any = 0.01, factor: Callable[[int], float] = one, **settings: Any) -> None:
        super().__init__(lambda network: cls(network.parameters(), lr=lr, **settings))
        self.factor = factor

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        dtype = next(self.parameters()).dtype
        return super().training_step([x.to(dtype) for x in batch], batch_idx) * self.factor(batch_idx)


class Before(Callback):
    """Does something to the module before some batches."""

    def __init__(self, batches: range, change: Callable[[Any], object]) -> None:
        self.batches = batches
        self.change = change

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx in self.batches:
            self.change(pl_module)


def fit(path: Path, module: LightningModule, *callbacks: Callback) -> Trainer:
    trainer = make_trainer(path, *callbacks, limit_train_batches=20)
    trainer.fit(module)
    return trainer


def rates(hd: HypergradientDescent) -> list[float]:
    (lrs,) = hd.lrs.values()
    return lrs


def is_released(optimizer: Optimizer) -> bool:
    return not any(hooks for name, hooks in vars(optimizer).items() if name.endswith("_hooks"))


# ---------------------------------------------------------------------- gradients


@pytest.mark.parametrize(("family", "rule", "bad"), covering([FAMILIES[1], FAMILIES[4]], RULES, [math.nan, math.inf]))
def test_a_bad_gradient_and_a_return_to_before_it_cost_one_step(
    family: tuple[Any, dict[str, Any]], rule: Any, bad: float, tmp_path: Path
) -> None:
    cls, settings = family

    class Spoiled(Network):
        def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
            if self.global_step == 8:
                saved.extend(copy.deepcopy([self.state_dict(), optimizer.state_dict()]))
                next(self.parameters()).grad.view(-1)[0] = bad  # type: ignore[union-attr]

        def on_train_batch_end(self, *_: Any) -> None:
            if self.global_step == 9:
                self.load_state_dict(saved[0])
                self.trainer.optimizers[0].load_state_dict(saved[1])

    saved: list[Any] = []
    hd, module = HypergradientDescent(rule), Spoiled(cls, **settings)
    with pytest.warns(RuntimeWarning, match="step 9: .* is not a finite number; the learning rate stays at"):
        fit(tmp_path, module, hd)
    lrs = rates(hd)
    assert lrs[8] == lrs[7]
    assert len(set(lrs)) == 19
    assert all(map(math.isfinite, lrs))
    assert hd.engines[0].stats.nonfinite_steps == 1
    assert all(p.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("rule", RULES)
def test_a_loss_of_inf_from_the_start_leaves_the_configured_rate(rule: Any, tmp_path: Path) -> None:
    hd, module = HypergradientDescent(rule, cooldown=0), Network(factor=lambda _: math.inf)
    before = copy.deepcopy(module)
    step = 1 if rule == "auto" else 2
    with pytest.warns(RuntimeWarning, match=f"step {step}: .* is not a finite number"):
        fit(tmp_path, module, hd)
    assert set(rates(hd)) == {0.01}
    assert hd.engines[0].stats.nonfinite_steps == 21 - step
    assert same(module, before) == (rule == "auto"), "auto takes no first step that is not finite"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("cls", "settings"), FAMILIES)
def test_gradients_of_zero_teach_nothing(cls: Any, settings: dict[str, Any], rule: Any, tmp_path: Path) -> None:
    hd, module = HypergradientDescent(rule), Network(cls, factor=lambda i: float(i >= 10), **settings)
    before = copy.deepcopy(module)
    unmoved: list[bool] = []
    fit(tmp_path, module, hd, Before(range(11), lambda _: unmoved.append(same(module, before))))
    assert unmoved == [True] * 11
    assert set(rates(hd)[:10]) == {0.01}
    assert len(set(rates(hd)[10:])) >= 9, "it goes on once there is a slope"
    assert not same(module, before)
    assert hd.engines[0].stats.nonfinite_steps == 0


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("rule", ["multiplicative", "auto"])
@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e30])
def test_a_loss_of_any_scale_has_a_finite_hypergradient(scale: float, rule: Any, tmp_path: Path) -> None:
    hd, module = HypergradientDescent(rule), Network(lr=1e-4 / scale, factor=lambda _: scale)
    fit(tmp_path, module.float(), hd)
    assert hd.engines[0].stats.nonfinite_steps == 0
    assert all(map(math.isfinite, rates(hd)))


@pytest.mark.parametrize("frozen", [range(5, 10), range(10)])
@pytest.mark.parametrize(("cls", "settings"), FAMILIES)
def test_a_layer_that_is_frozen_for_a_while(cls: Any, settings: dict[str, Any], frozen: range, tmp_path: Path) -> None:
    freeze = Before(range(20), lambda m: m.network[0].requires_grad_(m.global_step not in frozen))
    plain, standing, learning = (Network(cls, **settings) for _ in range(3))
    rest, hd = HypergradientDescent("additive", hypergrad_lr=0), HypergradientDescent()
    for module, callbacks in ((plain, []), (standing, [rest]), (learning, [hd])):
        fit(tmp_path, module, *callbacks, freeze)
    assert same(plain, standing)
    assert len(set(rates(hd))) == len(rates(hd)) == 20
    assert hd.engines[0].stats.nonfinite_steps == 0


@pytest.mark.parametrize("how", ["module", "function"])
def test_sparse_gradients_are_refused_before_the_first_step(how: str, tmp_path: Path) -> None:
    class Sparse(Reference):
        def __init__(self) -> None:
            super().__init__(lambda _: SGD(self.parameters(), lr=0.1))
            self.bag = nn.EmbeddingBag(5, 3, mode="sum", sparse=how == "module")

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            rows: Tensor = nn.functional.embedding(torch.tensor([1, 2]), self.bag.weight, sparse=True)
            return rows.sum()

    module = Sparse()
    before = copy.deepcopy(module)
    name = "module 'bag'" if how == "module" else r"a parameter of shape \(5, 3\)"
    with pytest.raises(TypeError, match=f"{name} has .*sparse gradients.*build .* with sparse=False"):
        fit(tmp_path, module, HypergradientDescent())
    assert same(module, before)


# ---------------------------------------------------------------------- parameters


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("cls", "settings"), FAMILIES)
def test_a_single_number_is_learned_from_zero(cls: Any, settings: dict[str, Any], rule: Any, tmp_path: Path) -> None:
    class Number(Reference):
        def __init__(self) -> None:
            super().__init__(lambda _: cls([self.number], lr=0.01, **settings))
            self.number = nn.Parameter(torch.tensor(0.0))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss: Tensor = (self.number - 3).square()
            return loss

    module, hd = Number(), HypergradientDescent(rule)
    fit(tmp_path, module, hd)
    assert len(set(rates(hd))) == 20
    assert hd.engines[0].stats.nonfinite_steps == 0
    assert 0 < module.number.item() < 6


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scope", ["global", "group"])
def test_a_group_without_parameters_does_no_harm(scope: Any, rule: Any, tmp_path: Path) -> None:
    hd, alone = HypergradientDescent(rule, scope=scope), HypergradientDescent(rule)
    module, plain = (Network() for _ in range(2))
    groups: Any = [{"params": []}, {"params": module.network.parameters()}]
    module.configure = lambda _: SGD(groups, lr=0.01)
    fit(tmp_path, module, hd)
    fit(tmp_path, plain, alone)
    assert hd.lrs["lr-SGD/pg2"] == alone.lrs["lr-SGD"]
    assert same(module, plain)


def test_an_optimizer_without_parameters_does_nothing(tmp_path: Path) -> None:
    hd, module = HypergradientDescent(), Reference(lambda _: SGD([{"params": []}], lr=0.01))
    before = copy.deepcopy(module)
    trainer = fit(tmp_path, module, hd)
    assert hd.lrs == {}
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.01
    assert same(module, before)


@pytest.mark.parametrize("rule", ["multiplicative", "auto"])
@pytest.mark.parametrize(("cls", "settings"), FAMILIES[:4])  # torch's Adam does not allow it
def test_parameters_that_change_their_dtype_in_mid_training(
    cls: Any, settings: dict[str, Any], rule: Any, tmp_path: Path
) -> None:
    runs = []
    for dtype in (torch.float32, torch.float64):
        module, hd = Network(cls, **settings), HypergradientDescent(rule)
        fit(tmp_path, module.to(dtype), hd, Before(range(7, 8), lambda m: m.network.double()))
        assert hd.engines[0].stats.nonfinite_steps == 0
        runs.append(rates(hd))
    assert runs[0] == pytest.approx(runs[1], rel=1e-3)
    assert runs[0] != runs[1]


@pytest.mark.parametrize("same_optimizer", [False, True])
def test_parameters_that_change_their_dtype_between_two_fits(same_optimizer: bool, tmp_path: Path) -> None:
    module, hd = Network(momentum=0.9), HypergradientDescent()
    if same_optimizer:
        optimizer = SGD(module.parameters(), lr=0.01, momentum=0.9)
        module.configure = lambda _: optimizer
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        fit(tmp_path, module.to(dtype), hd)
        assert len(rates(hd)) == 20
        assert all(lr != before for before, lr in pairwise(rates(hd)))
        assert hd.engines[0].stats.nonfinite_steps == 0


# ---------------------------------------------------------------------- learning rates


@pytest.mark.parametrize(
    ("lr", "error"),
    [
        (-0.1, ValueError),
        (math.nan, ValueError),
        ("fast", TypeError),
        (torch.tensor([0.1, 0.2]), TypeError),
        (torch.tensor(0.1, device="meta"), TypeError),
        (torch.tensor(1), TypeError),  # there is no room in it for what is learned
    ],
)
@pytest.mark.parametrize("when", ["configured", "written"])
def test_a_rate_that_is_no_rate_is_named(when: str, lr: Any, error: type[Exception], tmp_path: Path) -> None:
    def configure(network: nn.Module) -> Optimizer:
        optimizer = SGD(network.parameters(), lr=0.01)
        if when == "configured":
            optimizer.param_groups[0]["lr"] = lr
        return optimizer

    def write(module: LightningModule) -> None:
        module.trainer.optimizers[0].param_groups[0]["lr"] = lr

    hd = HypergradientDescent()
    with pytest.raises(error, match=r"lr of SGD param_groups\[0\] must be .*, got"):
        fit(tmp_path, Reference(configure), hd, *([Before(range(5, 6), write)] if when == "written" else []))
    assert not hd._attachment.active


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tensor_rate_stays_the_tensor_that_it_is(dtype: torch.dtype, rule: Any, tmp_path: Path) -> None:
    lr = torch.tensor(0.01, dtype=dtype)
    tensor, number = HypergradientDescent(rule), HypergradientDescent(rule)
    trainer = fit(tmp_path, Network(Adam, lr), tensor)
    fit(tmp_path, Network(Adam), number)
    assert trainer.optimizers[0].param_groups[0]["lr"] is lr
    assert lr.item() == rates(tensor)[-1]
    assert rates(tensor) == pytest.approx(rates(number), rel=1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_two_optimizers_that_share_a_tensor_are_refused(rule: Any, tmp_path: Path) -> None:
    lr = torch.tensor(0.01)

    class Shared(Manual):
        def configure_optimizers(self) -> Any:
            return [SGD(self.parts[0].parameters(), lr=lr), Adam(self.parts[1].parameters(), lr=lr)]

    with pytest.raises(ValueError, match="two optimizers share one lr tensor, the second of them Adam"):
        fit(tmp_path, Shared(), HypergradientDescent(rule))


# ---------------------------------------------------------------------- optimizers that come and go


@pytest.mark.parametrize("when", ["on_train_start", "on_train_batch_end"])
def test_optimizers_that_are_replaced_are_tuned_and_it_is_told(when: str, tmp_path: Path) -> None:
    class Replace(Callback):
        def replace(self, trainer: Trainer, *_: Any) -> None:
            if when == "on_train_start" or trainer.global_step == 10:
                trainer.strategy.setup_optimizers(trainer)

    replace, hd = Replace(), HypergradientDescent("multiplicative")
    setattr(replace, when, replace.replace)
    with pytest.warns(UserWarning, match="optimizers were replaced in mid-training, so tuning .* from the beginning"):
        trainer = fit(tmp_path, Network(), hd, replace)
    lrs = rates(hd)
    assert len(lrs) == len(set(lrs)) == (20 if when == "on_train_start" else 10)
    assert lrs[0] == 0.01
    assert trainer.optimizers[0].param_groups[0]["lr"] == lrs[-1]
    assert is_released(trainer.optimizers[0])


def test_an_optimizer_whose_steps_are_not_seen_is_told(tmp_path: Path) -> None:
    class Aside(Network):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            optimizer.step = lambda closure: closure()
            return optimizer

    with pytest.warns(UserWarning, match="no step of SGD was tuned"):
        fit(tmp_path, Aside(), HypergradientDescent())


@pytest.mark.parametrize("frozen", [False, True])
def test_parameters_that_leave_a_group_do_not_spoil_the_checkpoint(frozen: bool, tmp_path: Path) -> None:
    module, hd = Network(momentum=0.0), HypergradientDescent("additive")
    next(module.parameters()).requires_grad_(not frozen)
    leave = Before(range(10, 11), lambda m: m.trainer.optimizers[0].param_groups[0]["params"].pop())
    trainer = fit(tmp_path, module, hd, leave)
    assert len(trainer.optimizers[0].state_dict()["state"]) == 3 - frozen
    assert len(set(rates(hd))) == 20


def test_a_callback_that_an_error_elsewhere_left_attached_serves_the_next_fit(tmp_path: Path) -> None:
    class Worse(Callback):
        def on_exception(self, *_: Any) -> None:
            raise OSError("worse")

    module, hd = Network(), HypergradientDescent()
    kept = SGD(module.parameters(), lr=0.01)
    module.configure = lambda _: kept
    failing = Before(range(5, 6), lambda _: 1 / 0)
    with pytest.raises(OSError, match="worse"):
        fit(tmp_path, module, Worse(), hd, failing)
    assert not is_released(kept)
    fit(tmp_path, module, hd)
    assert len(rates(hd)) == 20
    assert is_released(kept)


# ---------------------------------------------------------------------- errors of the user, and of others


class Duck:
    """All that Lightning asks of an optimizer, but no torch.optim.Optimizer."""

    def __init__(self) -> None:
        self.param_groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": 0.1}]
        self.defaults: dict[str, Any] = {}
        self.state: dict[Tensor, Any] = {}

    def step(self, *_: Any, **__: Any) -> None: ...

    zero_grad = state_dict = load_state_dict = step


@pytest.mark.parametrize("configured", ["SGD", [3], [SGD([nn.Parameter(torch.ones(1))]), "SGD"], Duck()])
def test_what_is_no_optimizer_is_named_and_the_next_fit_works(configured: Any, tmp_path: Path) -> None:
    hd = HypergradientDescent()
    error: type[Exception] = TypeError if isinstance(configured, Duck) else MisconfigurationException
    with pytest.raises(error, match=r"Unknown configuration for model optimizers|must be a .*Optimizer, got Duck"):
        fit(tmp_path, Reference(lambda _: configured), hd)
    fit(tmp_path, Reference(), hd)
    assert len(rates(hd)) == 20


class Broken(CSVLogger):
    def log_metrics(self, *_: Any, **__: Any) -> None:
        raise OSError("disk full")


class Unlucky(Manual):
    """Fails between the steps of a batch."""

    def learn(self, optimizer: Any, batch: Any) -> None:
        if self.global_step == 10:
            raise OSError("disk full")
        super().learn(optimizer, batch)


class Failing(Callback):
    """Fails in one of a callback's hooks."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, self.fail)

    def fail(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step >= 5:
            raise OSError("disk full")


ERRORS: dict[str, tuple[Callable[[], LightningModule], list[str]]] = {
    "in training_step": (lambda: Interrupting(OSError("disk full")), []),
    "between two steps": (Unlucky, []),
    "on a keyboard": (lambda: Interrupting(KeyboardInterrupt()), []),
    "in a logger": (Reference, []),
    "before a step": (Reference, ["on_before_optimizer_step"]),
    "after a batch": (Reference, ["on_train_batch_end"]),
    "at the end": (Reference, ["on_train_end"]),
}


@pytest.mark.parametrize("where", ERRORS)
def test_an_error_reaches_the_user_and_the_next_fit_works(where: str, tmp_path: Path) -> None:
    build, hooks = ERRORS[where]
    hd = HypergradientDescent("multiplicative", log_every_n_steps=5)
    logger = Broken(tmp_path) if where == "in a logger" else False
    trainer = make_trainer(tmp_path, *map(Failing, hooks), hd, limit_train_batches=20, logger=logger)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises((OSError, SystemExit), match="1" if where == "on a keyboard" else "disk full"):
        trainer.fit(build())
    signal.signal(signal.SIGINT, handler)  # Lightning ignores it after a KeyboardInterrupt
    for optimizer, lrs in zip(trainer.optimizers, hd.lrs.values(), strict=True):
        assert is_released(optimizer)
        assert optimizer.param_groups[0]["lr"] == lrs[-1] != lrs[0]

    fit(tmp_path, Network(Adam, 0.02), hd)
    assert rates(hd)[0] == 0.02
    assert len(set(rates(hd))) == 20


# ---------------------------------------------------------------------- what an error leaves behind


def hooks(optimizer: Optimizer) -> dict[str, int]:
    """How many hooks of each kind an optimizer has."""
    return {name: len(value) for name, value in vars(optimizer).items() if "hooks" in name and value}


@pytest.mark.parametrize(
    ("lr", "arguments"),
    [
        (0.0, {"rule": "multiplicative"}),
        (-0.1, {}),
        (math.nan, {"rule": "additive"}),
        (0.1, {"scope": "groups"}),
        (0.1, {"probe": 0}),
    ],
)
def test_an_engine_that_is_refused_leaves_no_hook(lr: float, arguments: dict[str, Any]) -> None:
    optimizer = SGD([nn.Parameter(torch.ones(3))], lr=0.1)
    optimizer.param_groups[0]["lr"] = lr
    with pytest.raises(ValueError, match=r"lr|learning rate|scope|probe"):
        HypergradientLR(optimizer, **arguments)
    assert hooks(optimizer) == {}


@pytest.mark.parametrize("second", RULES)
@pytest.mark.parametrize("first", RULES)
def test_a_second_engine_is_refused_and_does_not_disturb_the_first(first: Any, second: Any) -> None:
    def rates(disturbed: bool) -> list[float]:
        p = nn.Parameter(torch.ones(3))
        optimizer, found = SGD([p], lr=0.05), []
        hd = HypergradientLR(optimizer, first)
        for step in range(10):
            if disturbed and step == 5:
                with pytest.raises(RuntimeError, match="already"):
                    HypergradientLR(optimizer, second)
            optimizer.zero_grad()
            (p * torch.tensor([1.0, 2.0, 3.0])).square().sum().backward()
            optimizer.step()
            found += hd.lrs
        return found

    assert rates(True) == rates(False)


def test_a_shallow_copy_of_an_engine_is_refused_and_changes_nothing() -> None:
    optimizer = SGD([nn.Parameter(torch.ones(3))], lr=0.05)
    hd = HypergradientLR(optimizer, "additive")
    before = hooks(optimizer)
    with pytest.raises(RuntimeError, match="already"):
        copy.copy(hd)
    assert hooks(optimizer) == before


class Kept(Network):
    """A module that returns the same optimizer for each training."""

    def configure_optimizers(self) -> Any:
        self.kept = getattr(self, "kept", None) or super().configure_optimizers()
        return self.kept


def test_after_a_checkpoint_was_refused_the_same_optimizer_can_load_another(tmp_path: Path) -> None:
    for cls in (SGD, Adam):
        fit(tmp_path, Network(cls), HypergradientDescent()).save_checkpoint(tmp_path / f"{cls.__name__}.ckpt")
    module = Kept(Adam)

    def resume(name: str, **settings: Any) -> None:
        trainer = make_trainer(tmp_path, HypergradientDescent(**settings), max_epochs=2, limit_train_batches=20)
        trainer.fit(module, ckpt_path=tmp_path / f"{name}.ckpt")

    with pytest.raises(ValueError, match="optimizer='SGD'"):
        resume("SGD")
    assert hooks(module.kept) == {}
    resume("Adam")
    with pytest.warns(UserWarning, match="starts anew"):
        resume("SGD", on_mismatch="restart")
    assert hooks(module.kept) == {}


class Raising(Callback):
    """Raises an error in one of its hooks."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, self.fail)

    def fail(self, *_: Any) -> None:
        raise ZeroDivisionError


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start", "on_train_batch_end"])
@pytest.mark.parametrize("before", [True, False])
def test_an_error_of_another_callback_leaves_no_hook(hook: str, before: bool, tmp_path: Path) -> None:
    module, callbacks = Kept(SGD), [HypergradientDescent("additive"), Raising(hook)]
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, module, *(reversed(callbacks) if before else callbacks))
    assert hooks(module.kept) == {}


@pytest.mark.parametrize(("name", "value"), [("probe", np.array(0.5)), ("total_steps", np.array([1, 2]))])
def test_an_array_is_no_whole_number(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{name} must be a whole number"):
        HypergradientLR(SGD([nn.Parameter(torch.ones(3))], lr=0.1), **{name: value})


def test_a_number_of_steps_that_no_float_holds_is_refused() -> None:
    with pytest.raises(ValueError, match="total_steps is too large"):
        HypergradientLR(SGD([nn.Parameter(torch.ones(3))], lr=0.1), total_steps=10**400)
