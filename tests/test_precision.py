"""Every precision of the Trainer on CPU, and GradScaler in plain loops: the rates are nearly those of float64."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from lightning_hd import HypergradientDescent, HypergradientLR
from lightning_hd.hypergradient.buckets import squared_norm
from lightning_hd.hypergradient.last_step import products
from tests import reference
from tests.pairs import covering
from tests.test_callback import Digits, make_trainer
from tests.test_checkpoints import differences

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]

STEPS = 20
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (SGD, {"lr": 0.05}),
    "heavy ball": (SGD, {"lr": 0.01, "momentum": 0.9}),
    "Nesterov": (SGD, {"lr": 0.01, "momentum": 0.9, "nesterov": True}),
    "Adam": (Adam, {"lr": 1e-3}),
    "AdamW": (AdamW, {"lr": 1e-3, "weight_decay": 0.1}),
    "RMSprop": (RMSprop, {"lr": 1e-3}),
}
ADAPTIVE = ("Adam", "AdamW", "RMSprop")
ROUNDING = {"32-true": 2.0**-24, "bf16-mixed": 2.0**-8, "bf16-true": 2.0**-8, "16-true": 2.0**-11}
"""The largest relative error of rounding to the dtype of the gradients."""


def beta(name: str, rule: Any) -> float | None:
    return {"auto": None, "multiplicative": 0.1, "additive": 1e-7 if name in ADAPTIVE else 1e-3}[rule]


def fit(path: Path, name: str, rule: Any, precision: str, *callbacks: Callback) -> tuple[HypergradientDescent, Digits]:
    cls, settings = OPTIMIZERS[name]
    module, hd = Digits(cls, **settings), HypergradientDescent(rule, hypergrad_lr=beta(name, rule), cooldown=0)
    make_trainer(path, hd, *callbacks, precision=precision, limit_train_batches=STEPS).fit(module)
    return hd, module


def rates(hd: HypergradientDescent) -> list[float]:
    (lrs,) = hd.lrs.values()
    assert len(lrs) == hd.engines[0].step_count == STEPS
    assert np.isfinite(lrs).all()
    return lrs


# ---------------------------------------------------------------------- through a Trainer


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        pytest.param(name, rule, marks=() if rule == "auto" or i % 2 == j else pytest.mark.slow)
        for i, name in enumerate(OPTIMIZERS)
        for j, rule in enumerate(("multiplicative", "additive", "auto"))
    ],
)
def test_rates_are_nearly_those_of_float64(name: str, rule: Any, tmp_path: Path) -> None:
    expected = rates(fit(tmp_path, name, rule, "64-true")[0])
    for precision, rounding in ROUNDING.items():
        if precision == "16-true" and name in ADAPTIVE:
            continue
        tolerance = STEPS * rounding  # each step's gradients are rounded once more
        if rule == "auto" and precision.endswith("-true"):
            # Moves are measured, and the first ones are 1e-4 of the parameters: each element is off by 1e4 roundings
            # and, 2410 of them being off at random, their dot product by 1e4 / 49 roundings. The rate adds up those of
            # the first nine steps, at random: three times that.
            tolerance = 3e4 / 49 * rounding
        hd, _ = fit(tmp_path, name, rule, precision)
        start = 0
        if tolerance > 0.5:  # most steps of the climb vanish in bfloat16, and each that does raises the rate by the cap
            assert np.all(np.abs(np.log(np.divide(rates(hd), expected))) < 2 * 0.5), "two steps ahead at most"
            start, tolerance = 15, 0.3
        np.testing.assert_allclose(rates(hd)[start:], expected[start:], rtol=tolerance, err_msg=precision)
        assert len(set(rates(hd))) > STEPS // 2
        assert hd.engines[0].stats.nonfinite_steps == 0


@pytest.mark.filterwarnings("ignore:.*not a finite number.*")
@pytest.mark.parametrize("rule", ["auto", "multiplicative", "additive"])
@pytest.mark.parametrize("name", ADAPTIVE)
def test_an_optimizer_that_fails_by_itself_in_float16_leaves_a_finite_rate(
    name: str, rule: Any, tmp_path: Path
) -> None:
    cls, settings = OPTIMIZERS[name]
    alone = Digits(cls, **settings)
    make_trainer(tmp_path, precision="16-true", limit_train_batches=STEPS).fit(alone)
    assert math.isnan(alone.losses[-1]), "the squares of its gradients and its eps vanish in float16"
    hd, _ = fit(tmp_path, name, rule, "16-true")
    assert rates(hd)[2:] == [rates(hd)[-1]] * (STEPS - 2)
    assert hd.engines[0].stats.nonfinite_steps >= STEPS - 2


def test_16_mixed_is_bf16_mixed_on_cpu(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="bf16-mixed"):
        hd, module = fit(tmp_path, "SGD", "auto", "16-mixed")
    other, _ = fit(tmp_path, "SGD", "auto", "bf16-mixed")
    assert rates(hd) == rates(other)
    assert module.losses[-1] < module.losses[0]


class Recorder(Callback):
    """Compares what each step told with its gradients and the last directions, in float64."""

    def __init__(self, name: str, rule: Any) -> None:
        self.name, self.rule = name, rule
        self.d: list[Tensor] = []
        self.g: list[Tensor] = []
        self.errors: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Optimizer) -> None:
        self.before = [p.detach().double() for p in module.parameters()]
        self.g = [p.grad.double() for p in module.parameters()]

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        (optimizer,) = trainer.optimizers
        (engine,) = trainer.callbacks[0].engines
        (seen,) = engine.last
        if self.rule == "auto" and self.d:  # r, from which the parameters have moved by E
            self.d = [r.view_as(p) - p for r, p in zip(self.d, self.before, strict=True)]
        if self.d:
            dot = sum(float((g * d).sum()) for g, d in zip(self.g, self.d, strict=True))
            norms = [math.sqrt(sum(float(x.square().sum()) for x in xs)) for xs in (self.g, self.d)]
            self.errors += [abs(seen.hypergradient + dot) / math.prod(norms)]  # d is -E for a long horizon
            self.errors += [abs(a / b - 1) for a, b in zip(seen[1:3], norms, strict=True)]
        self.d = []
        if self.rule == "auto":
            memory = engine.state_dict()["view"]["memory"]
            assert memory.dtype == torch.promote_types(next(module.parameters()).dtype, torch.float32)
            mean = memory[3].double() - memory[0].double()
            self.d = list(torch.split(mean, [p.numel() for p in module.parameters()]))
            return
        for p, before, g in zip(module.parameters(), self.before, self.g, strict=True):
            state = optimizer.state[p]
            momentum = state["momentum_buffer"].double() if "momentum_buffer" in state else 0.0
            if self.name == "heavy ball":
                d = momentum
            elif self.name in ("SGD", "Nesterov"):
                d = g + 0.9 * momentum
            else:
                d = (before - p.detach().double()) / engine.lrs[0]
            self.d.append(torch.as_tensor(d))


@pytest.mark.parametrize(
    ("name", "rule", "precision"),
    covering(["SGD", "heavy ball", "Nesterov", "RMSprop"], ["auto", "multiplicative"], ROUNDING),
)
def test_products_and_norms_have_the_digits_of_float32(name: str, rule: Any, precision: str, tmp_path: Path) -> None:
    if precision == "16-true" and name in ADAPTIVE:
        return  # it fails by itself
    recorder = Recorder(name, rule)
    fit(tmp_path, name, rule, precision, recorder)
    assert len(recorder.errors) == 3 * (STEPS - 1)
    copied = rule != "auto" and name in ("Nesterov", "RMSprop") and precision.endswith("-true")
    assert max(recorder.errors) < (ROUNDING[precision] if copied else 0) + 1e-6, "a copy has the parameter's dtype"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_more_elements_than_float32_can_count(dtype: torch.dtype) -> None:
    g = torch.tensor(1000.0, dtype=dtype).expand(20_000_000)  # more than 2 ** 24
    assert squared_norm(g).item() == pytest.approx(2e13, rel=1e-15)
    assert [number.item() for number in products(g, g)] == pytest.approx([2e13] * 3, rel=1e-6)


# ---------------------------------------------------------------------- GradScaler


BATCHES = [(x.float(), y.float()) for x, y in reference.torch_batches()]
SCALED: list[tuple[Any, dict[str, Any]]] = [
    (SGD, {}),
    (SGD, {"momentum": 0.9}),
    (SGD, {"momentum": 0.9, "nesterov": True}),
    (Adam, {}),
    (AdamW, {"weight_decay": 0.1}),
]


class Scaled:
    """A training in float16 autocast, with and without a scaler, whose scale is a power of two: it rounds nothing."""

    def __init__(self, cls: Any, settings: dict[str, Any], rule: Any = "auto", scaled: bool = True) -> None:
        self.network = reference.torch_network().float()
        self.optimizer: Optimizer = cls(self.network.parameters(), lr=0.01, **settings)
        self.hd = HypergradientLR(self.optimizer, rule, hypergrad_lr=None if rule == "auto" else 0.02)
        self.scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=1024.0)

    def backward(self, step: int, spoil: bool = False) -> None:
        x, y = BATCHES[step]
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = reference.torch_loss(self.network, x, y)
        self.scaler.scale(loss).backward()
        if spoil:
            next(self.network.parameters()).grad.fill_(math.inf)  # type: ignore[union-attr]

    def state(self) -> dict[str, Any]:
        return copy.deepcopy({"hd": self.hd.state_dict(), "optimizer": self.optimizer.state_dict()})

    def run(self, clip: float = math.inf) -> list[float]:
        lrs = []
        for step in range(STEPS):
            self.backward(step)
            if clip < math.inf:
                self.scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self.network.parameters(), clip)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            lrs += self.hd.lrs
            (seen,) = self.hd.last
            assert seen is None or seen.grad_norm <= clip * (1 + 1e-6)
        return lrs


@pytest.mark.parametrize(("optimizer", "rule", "clip"), covering(SCALED, ["auto", "multiplicative"], [math.inf, 0.3]))
def test_neither_a_scaler_nor_a_fused_step_matters(
    optimizer: tuple[Any, dict[str, Any]], rule: Any, clip: float
) -> None:
    cls, settings = optimizer
    expected = Scaled(cls, settings, rule, scaled=False).run(clip)
    for fused in (False, True):
        lrs = Scaled(cls, {**settings, "fused": fused}, rule).run(clip)
        # what float32 rounds otherwise can tip a rounding to float16
        np.testing.assert_allclose(lrs, expected, rtol=2.0**-11)
        assert len(set(lrs)) > STEPS // 2


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("cls", "settings"), SCALED)
def test_a_skipped_step_changes_neither_rate_nor_direction(cls: Any, settings: dict[str, Any], fused: bool) -> None:
    run = Scaled(cls, {**settings, "fused": fused})
    for step in range(8):
        run.backward(step, spoil=step in (4, 5))
        before = run.state()
        run.scaler.step(run.optimizer)
        run.scaler.update()
        if step in (4, 5):
            assert differences(run.state(), before) == 0
    assert (run.hd.step_count, run.hd.stats.nonfinite_steps) == (6, 0)


@pytest.mark.parametrize("fused", [False, True])
def test_two_optimizers_with_one_scaler_skip_apart(fused: bool) -> None:
    a, b = Scaled(SGD, {"fused": fused}), Scaled(Adam, {"fused": fused})
    b.scaler = a.scaler
    alone = Scaled(Adam, {"fused": fused})
    for step in range(8):
        a.backward(step, spoil=step == 4)
        for run in (b, alone):
            run.backward(step)
            run.scaler.step(run.optimizer)
        a.scaler.step(a.optimizer)
        a.scaler.update()
        alone.scaler.update()
        assert b.hd.lrs == alone.hd.lrs
    assert (a.hd.step_count, b.hd.step_count) == (7, 8)
    assert a.scaler.get_scale() < alone.scaler.get_scale()
