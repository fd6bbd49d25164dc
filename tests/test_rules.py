"""The rules alone: on floats, on 0-dim tensors, and what they refuse."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from lightning_hd import Additive, Auto, Context, Multiplicative, Observation, Rule
from lightning_hd.rules import make_rule
from lightning_hd.rules.bounds import Greedy
from tests import reference

SEEN = Observation(hypergradient=-6.0, grad_norm=4.0, direction_norm=3.0)


def test_additive() -> None:
    assert Additive(0.1).update(1.0, SEEN, Context(2)) == 1.0 + 0.1 * 6.0


def test_multiplicative() -> None:
    assert SEEN.cosine == 0.5
    assert Multiplicative(0.1).update(2.0, SEEN, Context(2)) == 2.0 * (1 + 0.1 * 0.5)


@pytest.mark.parametrize("rule", [Additive(0.1), Multiplicative(0.1), Additive(0.1, limit_lr=0.3)])
def test_rules_compute_with_0_dim_tensors_as_with_floats(rule: Any) -> None:
    tensors: Any = [torch.tensor(x, dtype=torch.float64) for x in SEEN]
    seen = Observation(*tensors)
    two: Any = torch.tensor(2.0, dtype=torch.float64)
    lr: Any = rule.update(two, seen, Context(2))
    assert torch.is_tensor(lr)
    assert float(lr) == rule.update(2.0, SEEN, Context(2))
    assert float(rule.used(lr, Context(3))) == pytest.approx(rule.used(float(lr), Context(3)), rel=1e-15)


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_the_cosine_of_a_zero_vector_is_zero(kind: Any) -> None:
    assert float(Observation(kind(0.0), kind(0.0), kind(3.0)).cosine) == 0
    assert float(Observation(kind(0.0), kind(2.0), kind(0.0)).cosine) == 0


def test_defaults_of_beta() -> None:
    def beta(rule: Any, normalized: bool) -> float:
        return float(rule.bind(normalized).hypergrad_lr)

    assert (beta(Additive(), False), beta(Additive(), True)) == (1e-3, 1e-7)
    assert (beta(Multiplicative(), False), beta(Multiplicative(), True)) == (0.1, 0.1)
    assert beta(Additive(0.0), True) == 0


def test_bind_copies() -> None:
    rule = Additive()
    rule.bind(normalized=True)
    assert rule.hypergrad_lr is None


def test_the_transition_of_section_5() -> None:
    rule = Additive(0.1, limit_lr=0.5)
    assert rule.used(2.0, Context(1)) == 2.0
    assert rule.used(2.0, Context(4)) == pytest.approx(2.0 / 16 + 0.5 * 15 / 16)
    linear = Multiplicative(0.1, limit_lr=0.5, weight=lambda step: max(0.0, 1 - (step - 1) / 10))
    assert linear.used(2.0, Context(6)) == pytest.approx(1.25)
    assert linear.used(2.0, Context(50)) == 0.5


def test_make_rule() -> None:
    assert make_rule("auto", None) == Auto()
    assert make_rule("additive", None) == Additive()
    assert make_rule("multiplicative", 0.3) == Multiplicative(0.3)
    own = Additive(0.1)
    assert make_rule(own, None) is own
    with pytest.raises(TypeError, match=r"did you mean Additive\(\)\?"):
        make_rule(Additive, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got 'Auto'; did you mean 'auto'\?"):
        make_rule("Auto", None)


def test_numbers_of_numpy_are_saved_as_plain_ones() -> None:
    class Own(Rule):
        def __init__(self) -> None:
            self.mean, self.on, self.count, self.x = np.float64(0.5), True, 3, torch.ones(2, requires_grad=True)

        def update(self, lr: float, seen: Observation, context: Context) -> float:
            return lr

    saved = Own().state_dict()
    assert {name: type(value) for name, value in saved.items()} == {
        "mean": float,
        "on": bool,
        "count": int,
        "x": torch.Tensor,
    }
    assert saved["mean"] == 0.5
    assert not saved["x"].requires_grad


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"hypergrad_lr": -1.0}, ValueError, "hypergrad_lr must be a finite number of at least 0, got -1.0"),
        ({"hypergrad_lr": math.inf}, ValueError, "hypergrad_lr must be a finite number"),
        ({"hypergrad_lr": [1]}, TypeError, "hypergrad_lr must be a number"),
        ({"hypergrad_lr": np.ones(2)}, TypeError, "hypergrad_lr must be a number"),
        ({"hypergrad_lr": torch.tensor(1.0)}, TypeError, "hypergrad_lr must be a number"),
        ({"limit_lr": math.nan}, ValueError, "limit_lr must be a finite number"),
        ({"weight": 0.5}, TypeError, "weight must be a function of the step"),
    ],
)
@pytest.mark.parametrize("rule", [Additive, Multiplicative])
def test_a_bad_argument_is_named(rule: Any, arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        rule(**arguments)


def test_a_rule_that_promises_more_must_keep_it() -> None:
    class Promise(Rule):
        long_horizon = True
        picks_start = True

        def update(self, lr: Any, seen: Observation, context: Context) -> Any:
            return lr

    with pytest.raises(NotImplementedError, match="Promise has a long horizon"):
        Promise().discount(0.1, Context(1))
    with pytest.raises(NotImplementedError, match="Promise picks its first rate"):
        Promise().first_lr(1.0, 1.0)


def signals(seed: int, steps: int, leaps: float) -> Iterator[tuple[reference.Shown, float]]:
    """What a run may show, in phases of 50 steps, and its losses; norms leap with this probability, and elsewhere."""
    rng = np.random.default_rng(seed)
    for t in range(steps):
        if t % 50 == 0:
            cosine, greedy = rng.choice([-0.3, 0.05, 0.3]), rng.choice([-0.1, 0.0, 0.4])
            turn, growth = rng.choice([-0.9, 0, 0.95]), rng.choice([1.0, 1.0, 1.6])
            level, loss = rng.choice([0.01, 1.0, 10.0]) if leaps > 0.01 else 1.0, rng.choice([0.5, 1.0, 2.0])
            param_norm = 300.0 if t < 200 else rng.choice([0.3, 3.0, 300.0])
        leap = growth ** max(t % 50 - 40, 0) * rng.choice([1.0, 8.0], p=[1 - leaps, leaps])
        norm = level * leap * np.exp(0.2 * rng.standard_normal()) * rng.choice([1.0, 0.0], p=[0.99, 0.01])
        move, moves = rng.choice([1.0, 0.0], p=[0.98, 0.02]), rng.choice([2.0, 0.0], p=[0.98, 0.02])
        noise = 0.2 * rng.standard_normal(3)
        products = (cosine + noise[:2]) * norm * moves
        slope = -(greedy + noise[2]) * norm * move
        turned = turn + 0.05 * rng.standard_normal()
        shown = reference.Shown(products[0], norm, moves, products[1], turned, slope, move, param_norm)
        yield shown, loss + 0.05 * rng.standard_normal()


@pytest.mark.parametrize(("seed", "leaps"), [(3, 0.03), (0, 0.002)])
def test_whatever_auto_sees_its_rates_are_those_of_the_formula(seed: int, leaps: float) -> None:
    rule, formula = Auto(), reference.AutoRule()
    mine, expected = rule.first_lr(3.0, 7.0), formula.first_lr(3.0, 7.0)
    assert rule.discount(mine, Context(1, 600.0)) == formula.part_kept(expected, 1)
    for t, (shown, loss) in enumerate(signals(seed, 1200, leaps), start=2):
        context = Context(t, 600.0)
        weight = 1 / max(1.0, min(0.05 * 600, t / 5))  # of the newest in the running mean
        before = (shown.late - weight * shown.product) / (1 - weight) if weight < 1 else 0.0  # type: ignore[operator]
        product, g_norm, d_norm, _, *others = shown
        mine = rule.update(mine, Observation(-product, g_norm, d_norm, -before, *others), context)
        expected = formula.next_lr(expected, t, shown._replace(late=product) if weight == 1 else shown)
        assert mine == pytest.approx(expected, rel=1e-9), t
        mine, expected = rule.watch(mine, loss, context), formula.held_back(expected, t, loss, shown.slope)
        assert mine == pytest.approx(expected, rel=1e-9), t
        assert rule.used(mine, context) == pytest.approx(expected * np.exp(-formula.brake), rel=1e-9), t
        assert rule.discount(mine, context) == pytest.approx(formula.part_kept(expected, t), rel=1e-9), t
    assert rule.backoffs == len(formula.braked) + len(formula.retreats)
    assert min(map(len, (formula.braked, formula.retreats, formula.undone))) > 0, "the comparison needs all of them"


def test_at_a_rate_of_0_auto_learns_nothing_and_goes_on() -> None:
    rule, seen = Auto(), Observation(-1.0, 1.0, 1.0)
    lr = rule.first_lr(1.0, 1.0)
    rule.discount(lr, Context(1))
    assert rule.update(0.0, seen, Context(2)) == rule.watch(0.0, 1.0, Context(2)) == 0.0
    assert rule.discount(0.0, Context(2)) == rule.discount(lr, Context(3)) == 1 - 1 / 450
    fresh = Auto(start="configured")
    assert fresh.discount(0.0, Context(1)) == fresh.discount(0.1, Context(2)) == 1 - 1 / 450


def test_moves_before_the_first_rate_of_auto_do_not_count() -> None:
    late, fresh, rates = Auto(), Auto(), (1e-4, 3e-4, 3e-4, 9e-4)
    for step in range(1, 6):
        late.discount(0.3, Context(step))
    assert late.first_lr(1.0, 1.0) == fresh.first_lr(1.0, 1.0) == 1e-4
    kept = [[rule.discount(lr, Context(step)) for step, lr in enumerate(rates, start=6)] for rule in (late, fresh)]
    assert kept[0] == kept[1]


def test_where_the_step_is_not_linear_auto_forgets_nothing_and_moves_little() -> None:
    rule = Auto()
    lr = rule.first_lr(1.0, 1.0)
    contexts = [Context(step, nonlinear=True) for step in (1, 2, 3)]
    assert [rule.discount(rate, context) for context, rate in zip(contexts, (lr, 9 * lr, lr), strict=True)] == [1.0] * 3
    for sign in (1, -1):
        assert rule.update(lr, Observation(-100.0 * sign, 1.0, 1.0, -100.0 * sign), contexts[1]) == pytest.approx(
            lr * math.exp(0.02 * sign), rel=1e-12
        )


def test_a_rule_has_not_backed_off_at_first_and_what_is_not_observed_is_0() -> None:
    assert (Additive().backoffs, Auto().backoffs) == (0, 0)
    assert set(SEEN[3:]) == {0.0}


def test_cosines_that_are_all_the_same_are_as_sure_as_their_rounding() -> None:
    greedy = Greedy()
    for step in range(2, 7):
        greedy.see(0.25, Context(step))
    assert greedy.sigmas == pytest.approx(2**23 * math.sqrt(5), rel=1e-12)
