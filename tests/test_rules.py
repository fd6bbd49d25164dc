"""The rules alone: on floats, on 0-dim tensors, and what they refuse."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from lightning_hd import Additive, Auto, Context, Multiplicative, Observation, Rule
from lightning_hd.rules import make_rule

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
