"""Properties that hold for any optimizer, parameter groups, tensors and sequence of steps, with cases of hypothesis."""

import io
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import ASGD, SGD, Adagrad, Adam, AdamW, NAdam, Optimizer, RAdam, RMSprop

from lightning_hd import HypergradientLR
from lightning_hd.hypergradient.last_step import products
from tests import reference
from tests.test_hypergradient import failing

SHAPES = [(), (0,), (3, 0), (1,), (5,), (2, 3), (2, 1, 3)]
LAYOUTS = ["contiguous", "transposed", "strided"]
SCALES = st.sampled_from([1.0, 1.0, 1.0, None, 0.0, 1e-3, 10.0])
RULES = ["additive", "multiplicative", "auto"]
CLAMPS = list(itertools.product([0.0, None, 2.0**-8, 2.0**-5], [None, 2.0**-4, 2.0**-2, 1.0]))
TOLERANCE = {torch.float64: 1e-9, torch.complex128: 1e-9, torch.float32: 1e-5}
"""Relative to the size of what is summed. Of float32: twelve steps of some ten operations that round by 6e-8 each."""


def examples(count: int, strategy: st.SearchStrategy[Any]) -> Callable[[Callable[[Any], None]], Callable[[int], None]]:
    """Try a property with so many examples, the same in every run, or with twice as many where it may be slow."""

    def decorate(check: Callable[[Any], None]) -> Callable[[int], None]:
        @pytest.mark.parametrize("tried", [count, pytest.param(2 * count, marks=pytest.mark.slow)])
        def test(tried: int) -> None:
            settings = hypothesis.settings(deadline=None, max_examples=tried, derandomize=True, database=None)
            settings(hypothesis.given(strategy)(check))()

        return test

    return decorate


@dataclass(frozen=True)
class Spec:
    """One parameter."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str

    def tensor(self, rng: np.random.Generator, scale: float = 1.0) -> Tensor:
        """Random numbers in this shape, dtype and layout."""
        real, imaginary = (torch.from_numpy(scale * rng.standard_normal((*self.shape, 1)))[..., 0] for _ in range(2))
        values = torch.complex(real, imaginary) if self.dtype.is_complex else real
        return lay_out(values.to(self.dtype), self.layout)


@dataclass(frozen=True)
class Case:
    """An optimizer, its parameter groups (rate, weight decay, parameters), and the arguments of its HypergradientLR."""

    cls: Any
    settings: dict[str, Any]
    groups: list[tuple[float, float, list[Spec]]]
    arguments: dict[str, Any]
    seed: int

    @property
    def specs(self) -> dict[tuple[int, int], Spec]:
        return {(i, j): spec for i, (_, _, specs) in enumerate(self.groups) for j, spec in enumerate(specs)}

    def build(self) -> tuple[dict[tuple[int, int], Tensor], Optimizer]:
        rng = np.random.default_rng(self.seed)
        params: dict[tuple[int, int], Tensor] = {k: nn.Parameter(spec.tensor(rng)) for k, spec in self.specs.items()}
        groups = [
            {"params": [p for key, p in params.items() if key[0] == i], "lr": lr, "weight_decay": weight_decay}
            for i, (lr, weight_decay, _) in enumerate(self.groups)
        ]
        return params, self.cls(groups, **self.settings)

    def gradients(self, step: int, scales: Sequence[float | None]) -> dict[tuple[int, int], Tensor]:
        """Random gradients in layouts of their own, none where the scale is ``None``.

        But torch's fused steps on CPU take any layout for contiguous, and its fused SGD fails where the momentum of a
        parameter starts later than that of another.
        """
        rng, fused = np.random.default_rng([self.seed, step]), self.settings.get("fused")
        drawn = {}
        for (key, spec), scale in zip(self.specs.items(), scales, strict=True):
            layout = str(rng.choice(LAYOUTS))
            gradient = Spec(spec.shape, spec.dtype, LAYOUTS[0] if fused else layout).tensor(rng, scale or 0.0)
            if scale is not None or (fused and step == 0):
                drawn[key] = gradient
        return drawn

    def transcription(self, params: dict[tuple[int, int], Tensor]) -> reference.Tuned:
        chosen, values = self.settings, {key: to_numpy(p) for key, p in params.items()}
        sgd = "sgdn" if chosen.get("nesterov") else "heavy_ball" if chosen.get("momentum") else "sgd"
        method, decoupled = sgd if self.cls is SGD else "adam", {"decoupled": self.cls is AdamW}
        return reference.Tuned(method, chosen | decoupled, [group[:2] for group in self.groups], values, self.arguments)


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The same numbers with other strides."""
    if layout == "transposed":
        backwards = list(reversed(range(tensor.dim())))
        return tensor.permute(backwards).contiguous().permute(backwards)
    return torch.stack([tensor, tensor], dim=-1)[..., 0] if layout == "strided" else tensor


def to_numpy(tensor: Tensor) -> reference.Array:
    """Its numbers, complex ones as two, in float64."""
    tensor = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    array: reference.Array = tensor.double().numpy().copy()
    return array


@st.composite
def optimizers(draw: st.DrawFn) -> tuple[Any, dict[str, Any]]:
    """Those of which the directions have a formula."""
    cls = draw(st.sampled_from([SGD, Adam, AdamW]))
    chosen: dict[str, Any] = {"maximize": draw(st.booleans())}
    chosen |= draw(st.sampled_from([{}, {"foreach": True}, {"foreach": False}, {"fused": True}]))
    if cls is SGD:
        momentum = [{}, {"momentum": 0.9}, {"momentum": 0.5, "dampening": 0.3}, {"momentum": 0.9, "nesterov": True}]
        return cls, chosen | draw(st.sampled_from(momentum))
    chosen |= {"betas": draw(st.sampled_from([(0.9, 0.999), (0.5, 0.8), (0.0, 0.9)]))}
    return cls, chosen | {"amsgrad": draw(st.booleans()), "eps": draw(st.sampled_from([1e-8, 1e-3]))}


Clamps = Sequence[tuple[float | None, float | None]]


@st.composite
def cases(draw: st.DrawFn, kinds: Any, rules: Sequence[str], dtypes: Sequence[torch.dtype], clamps: Clamps) -> Case:
    """Rates and clamps are powers of two: their products are exact, so that all agree on whether a rate is clamped."""
    cls, chosen = draw(kinds)
    fused = chosen.get("fused", False)  # see Case.gradients; nor are there fused steps for complex numbers
    specs = st.builds(
        Spec,
        st.sampled_from(SHAPES),
        st.sampled_from([dtype for dtype in dtypes if not (fused and dtype.is_complex)]),
        st.sampled_from(LAYOUTS[:1] if fused else LAYOUTS),
    )
    rule, scope = draw(st.sampled_from(rules)), draw(st.sampled_from(["global", "group"]))
    rates = draw(st.lists(st.sampled_from([2.0**-3, 2.0**-1, 2.0**-6, 2.0**-10, 0.0]), min_size=1, max_size=3))
    if rule == "multiplicative":  # it cannot start from 0
        rates = [lr or 0.5 for lr in rates] if scope == "group" else [rates[0] or 0.5, *rates[1:]]
    lists = st.lists(specs, min_size=1, max_size=4)
    groups = [(lr, draw(st.sampled_from([0.0, 0.01, 0.1])), draw(lists)) for lr in rates]
    low, high = draw(st.sampled_from(clamps))
    arguments: dict[str, Any] = {"rule": rule, "scope": scope, "min_lr": low, "max_lr": high}
    if rule != "auto":
        choices = [1e-4, 1e-5, 1e-3] if rule == "additive" else [0.1, 0.02, 0.3]
        arguments["hypergrad_lr"] = draw(st.sampled_from(choices))
    return Case(cls, chosen, groups, arguments, draw(st.integers(0, 2**16)))


@examples(100, st.data())
def test_any_run_is_that_of_the_formulas(data: st.DataObject) -> None:
    case = data.draw(cases(optimizers(), RULES, list(TOLERANCE), CLAMPS))
    count = len(case.specs)
    pattern = data.draw(st.lists(st.lists(SCALES, min_size=count, max_size=count), min_size=3, max_size=12))
    params, optimizer = case.build()
    hd = HypergradientLR(optimizer, **case.arguments)
    expected = case.transcription(params)
    tolerance = max(TOLERANCE[p.dtype] for p in params.values())
    for step, scales in enumerate(pattern):
        gradients = case.gradients(step, scales)
        expected.step({key: to_numpy(g) for key, g in gradients.items()})
        for key, p in params.items():
            p.grad = gradients.get(key)
        optimizer.step()
        for i, (lr, other) in enumerate(zip(hd.lrs, expected.lrs, strict=True)):
            assert lr == pytest.approx(other, rel=tolerance, abs=tolerance * expected.error(i))
        assert [seen is None for seen in hd.last] == [seen is None for seen in expected.seen]
        for mine, seen, sizes in zip(hd.last, expected.seen, expected.seen_sizes, strict=True):
            for number, another, size in zip(mine or (), seen or (), sizes, strict=False):
                assert number == pytest.approx(another, rel=0, abs=tolerance * size)
        for key, p in params.items():
            np.testing.assert_allclose(to_numpy(p), expected.values[key], rtol=0, atol=tolerance * expected.sizes[key])
    assert hd.step_count == expected.steps
    assert hd.stats.nonfinite_steps == 0


# ---------------------------------------------------------------------- what may happen between two steps

STEPS = ["step", "scaled", "nonfinite"]
NO_STEPS = ["empty", "skipped", "failing", "resume"]
Event = tuple[str, list[float | None]]


class Run:
    """A case, with or without its HypergradientLR, to which things happen."""

    def __init__(self, case: Case, attached: bool = True) -> None:
        self.case = case
        self.steps = 0
        self.params, self.optimizer = case.build()
        self.hd: Any = HypergradientLR(self.optimizer, **case.arguments) if attached else None

    def values(self) -> list[Any]:
        return [to_numpy(p).tolist() for p in self.params.values()]

    def state(self) -> str:
        """All that a step may change, to the last digit."""
        return repr((self.values(), self.hd.lrs, self.hd.state_dict()))

    def meet(self, event: str, scales: Sequence[float | None]) -> None:
        if event == "resume":
            self._resume()
        elif event == "anew" and self.hd is not None:
            self.hd.detach()
            saved = self.optimizer.state_dict()["state"].values()
            assert not any(key.startswith("hd_") for state in saved for key in state)
            self.hd = HypergradientLR(self.optimizer, **self.case.arguments)
        elif event == "failing":
            with pytest.raises(OSError, match="gone"):
                self.optimizer.step(failing)
        elif event != "anew":
            self._step(event, {} if event == "empty" else self.case.gradients(self.steps, scales))

    def _step(self, event: str, gradients: dict[tuple[int, int], Tensor]) -> None:
        self.steps += event in STEPS
        scaled = event in ("scaled", "skipped") and bool(gradients)
        for key, p in self.params.items():
            p.grad = gradients[key].mul_(1024.0 if scaled else 1.0) if key in gradients else None
        spoiled = next((g for g in gradients.values() if g.numel()), None)
        if event in ("nonfinite", "skipped") and spoiled is not None:
            spoiled[(0,) * spoiled.dim()] = [math.nan, math.inf, -math.inf][self.steps % 3]
        if not scaled:
            self.optimizer.step()
        elif event == "scaled" or (spoiled is not None and self.steps):  # see torch's fused SGD in test_hypergradient
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            scaler.scale(torch.zeros(()))
            scaler.step(self.optimizer)

    def repair(self) -> None:
        """Zero for what is not finite in the parameters and in what the optimizer itself has made of them."""
        for p in self.params.values():
            for key, x in [("", p.data), *self.optimizer.state.get(p, {}).items()]:
                if isinstance(x, Tensor) and not key.startswith("hd_"):
                    x.nan_to_num_(0.0, 0.0, 0.0)

    def _resume(self) -> None:
        """A checkpoint, everything built anew, and the checkpoint loaded."""
        file, other = io.BytesIO(), Run(self.case, self.hd is not None)
        states = [x.state_dict() for x in (self.optimizer, self.hd) if x is not None]
        torch.save(([p.detach() for p in self.params.values()], states), file)
        file.seek(0)
        values, states = torch.load(file, weights_only=True)
        pairs = list(zip((other.optimizer, other.hd), states, strict=False))
        for x, state in reversed(pairs) if self.steps % 2 else pairs:  # in either order
            x.load_state_dict(state)
        for p, value in zip(other.params.values(), values, strict=True):
            p.data.copy_(value)
        self.params, self.optimizer, self.hd = other.params, other.optimizer, other.hd


@st.composite
def stories(draw: st.DrawFn, rules: Sequence[str], clamps: Clamps) -> tuple[Case, list[Event]]:
    """Other optimizers have float32 parameters: torch itself does not resume NAdam and ASGD exactly in float64."""
    others = st.sampled_from([(RMSprop, {"momentum": 0.5}), (RAdam, {}), (NAdam, {}), (ASGD, {}), (Adagrad, {})])
    wide = cases(optimizers(), rules, [torch.float64, torch.float32], clamps)
    case = draw(wide | cases(others, rules, [torch.float32], clamps))
    events = st.sampled_from([*STEPS, *NO_STEPS, "anew", "step", "scaled"])
    scales = st.lists(SCALES, min_size=len(case.specs), max_size=len(case.specs))
    return case, draw(st.lists(st.tuples(events, scales), min_size=6, max_size=12))


def check_step(run: Run, before: list[float], nonfinite_before: int) -> None:
    """Rates are in bounds after a step; where a number is not finite, they are as before, and the step is counted."""
    hd, low, high = run.hd, run.case.arguments["min_lr"], run.case.arguments["max_lr"]
    for i, (lr, (configured, _, _)) in enumerate(zip(hd.lrs, run.case.groups, strict=True)):
        assert math.isfinite(lr)
        assert low is None or lr >= low or (configured == lr == 0)
        assert high is None or lr <= high
        seen = hd.last[i if run.case.arguments["scope"] == "group" else 0]
        if seen is not None and not all(map(math.isfinite, seen)):
            assert lr == before[i]
            assert hd.stats.nonfinite_steps > nonfinite_before


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@examples(50, stories(RULES, CLAMPS))
def test_what_is_no_step_changes_nothing_and_rates_stay_in_bounds(story: tuple[Case, list[Event]]) -> None:
    case, events = story
    run, straight = Run(case), Run(case)
    for event, scales in events:
        if event == "anew" and not all(p.isfinite().all() for p in run.params.values()):
            continue
        before, steps, nonfinite_steps, state = run.hd.lrs, run.hd.step_count, run.hd.stats.nonfinite_steps, run.state()
        run.meet(event, scales)
        if event in NO_STEPS:
            assert run.state() == state
            continue
        straight.meet("step" if event == "scaled" else event, scales)
        assert run.state() == straight.state()
        if run.hd.step_count > steps:
            check_step(run, before, nonfinite_steps)
    assert run.hd.stats.nonfinite_steps == 0 or "nonfinite" in [event for event, _ in events]
    run.repair()
    for _ in range(3):
        run.meet("step", [1.0] * len(case.specs))
    assert all(map(math.isfinite, itertools.chain.from_iterable(seen or () for seen in run.hd.last)))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@examples(30, stories(["additive"], [(None, None)]))
def test_without_hypergrad_lr_any_run_is_that_of_the_optimizer_alone(story: tuple[Case, list[Event]]) -> None:
    case, events = story
    case.arguments["hypergrad_lr"] = 0.0
    run, alone = Run(case), Run(case, attached=False)
    at_zero = "maximize" not in case.settings and not all(lr for lr, _, _ in case.groups)
    for event, scales in events:
        if at_zero and event == "nonfinite":
            continue  # 0 times infinity: the optimizer makes it no number, but a measured step at a rate of 0 is undone
        run.meet(event, scales)
        alone.meet(event, scales)
        assert repr(run.values()) == repr(alone.values())


# ---------------------------------------------------------------------- reduction

EXPONENTS = {torch.float16: (-24, 15)} | dict.fromkeys([torch.bfloat16, torch.float32, torch.float64], (-122, 122))


@st.composite
def extremes(draw: st.DrawFn, shape: tuple[int, ...]) -> Tensor:
    """Numbers of any size, all alike or not."""
    dtype = draw(st.sampled_from(list(EXPONENTS)))
    low, high = EXPONENTS[dtype]
    top, spread = draw(st.integers(low, high)), draw(st.sampled_from([0, 3, 60, 1000]))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    mantissas = rng.choice([-1.0, 1.0], shape) * rng.uniform(1, 1.98, shape)
    values = np.asarray(np.ldexp(mantissas, rng.integers(max(low, top - spread), top + 1, shape)))
    return lay_out(torch.from_numpy(values).to(dtype), draw(st.sampled_from(LAYOUTS)))


def exactly(a: Tensor, b: Tensor) -> float:
    """Their product, summed without rounding."""
    pairs = zip(a.double().flatten().tolist(), b.double().flatten().tolist(), strict=True)
    return float(sum((Fraction(x) * Fraction(y) for x, y in pairs), Fraction(0)))


@examples(75, st.data())
def test_sums_are_exact_to_the_digits_of_the_products(data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from(SHAPES))
    g, d = (data.draw(extremes(shape)).flatten() for _ in range(2))
    dot, g_squared, d_squared = exactly(g, d), exactly(g, g), exactly(d, d)
    sums = torch.stack(products(g, d))
    assert sums.dtype == torch.float64
    assert sums[0].item() == pytest.approx(dot, rel=0, abs=2.0**-48 * math.sqrt(g_squared) * math.sqrt(d_squared))
    assert sums[1:].tolist() == pytest.approx([g_squared, d_squared], rel=2.0**-48, abs=0)
