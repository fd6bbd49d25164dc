"""The climb of the rule "auto" from its first rate: how fast it is, and how high it leads."""

import math
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import Adam

from lightning_hd import Auto, Context, HypergradientLR, Observation
from tests.benchmarks import tasks, training, tuners
from tests.test_auto import feed, trained, transcribed


def climb(
    moves: list[float], normalized: bool = True, param_norm: float = 1.0, length: float = math.inf
) -> list[float]:
    """The rates of steps that are all too short, with moves of this length; the first direction has norm 1."""
    rule = Auto().bind(normalized)
    first = rule.first_lr(1.0, 1.0)
    too_short = Observation(-0.5, 1.0, 1.0, turn=0.5, param_norm=param_norm)
    seen = [too_short._replace(slope=0.5 * move, move_norm=move) for move in moves]
    return [first, *feed(rule, seen, first, length=length)]


@pytest.mark.parametrize(
    ("moves", "careful"),
    [
        ([0.0059] * 9, False),
        ([0.0061] * 9, True),
        ([0.0061] * 6 + [0.001] * 3, False),  # the rate was not yet high when a move was long
        ([0.0] * 9, False),
        ([0.0] * 20, True),  # 300 times the first rate
    ],
)
def test_the_climb_is_careful_once_the_rate_is_high_and_moves_are_long(moves: list[float], careful: bool) -> None:
    lrs = climb(moves)
    assert lrs[6] < 30 * lrs[0] < lrs[-2]
    assert (math.log(lrs[-1] / lrs[-2]) < 0.051) == careful


@pytest.mark.parametrize(("length", "cap"), [(math.inf, 0.05), (200, 0.05), (125, 0.08), (100, 0.1), (29, 0.1)])
def test_the_climb_is_less_careful_in_a_run_that_is_known_to_be_short(length: float, cap: float) -> None:
    lrs = climb([0.0061] * 9, length=length)
    assert math.log(lrs[-1] / lrs[-2]) == pytest.approx(cap)


@pytest.mark.parametrize("method", ["adam", "sgdn"])
def test_a_short_run_is_that_of_the_formula(method: str) -> None:
    expected, _, rule = transcribed(method, steps=100, cooldown=0.2)
    lrs, _, _ = trained(method, 0.3, Auto(), 100, {}, total_steps=100)
    np.testing.assert_allclose(lrs, expected, rtol=1e-9)
    assert rule.careful_cap == 0.1
    assert max(np.diff(np.log(lrs[20:80]))) > 0.09


class Noting(Auto):
    """Notes the step and the length of the run, as it is told of them."""

    told: ClassVar[list[tuple[int, float]]] = []

    def update(self, lr: float, seen: Observation, context: Context) -> float:
        self.told.append((context.step, context.length))
        return super().update(lr, seen, context)


@pytest.mark.parametrize(("total", "cooldown"), [(None, "default"), (50, "default"), (50, 0.0)])
def test_a_rule_is_told_of_the_steps_since_the_rate_began(total: int | None, cooldown: Any) -> None:
    """The rate begins anew where many parameters join. A run that goes on is as long as it has become.

    Without a cooldown, nothing depends on the length of the run.
    """
    Noting.told.clear()
    parameters = [nn.Parameter(torch.ones(5)) for _ in range(2)]
    optimizer = Adam(parameters)
    HypergradientLR(optimizer, Noting(), total_steps=total, cooldown=cooldown)
    for step in range(60):
        for p in parameters[: 1 if step < 20 else 2]:
            p.grad = p.detach().clone()
        optimizer.step()
    steps = [*range(2, 21), *range(2, 41)]
    assert [step for step, _ in Noting.told] == steps
    lengths = [50] * 19 + [max(30, step) for step in range(2, 41)]
    assert [length for _, length in Noting.told] == (lengths if total and cooldown else [math.inf] * len(steps))


@pytest.mark.parametrize("param_norm", [1.0, 7.0])
def test_no_step_of_a_normalized_optimizer_is_longer_than_a_part_of_the_parameters(param_norm: float) -> None:
    """By the length of the first direction, which is 1."""
    assert climb([1e-4] * 2000, param_norm=param_norm)[-1] == pytest.approx(0.3 * param_norm, rel=1e-12)


def test_steps_that_follow_the_gradient_may_need_any_rate_and_a_norm_of_0_shows_nothing() -> None:
    assert climb([1e-4] * 2000, normalized=False)[-1] > 10
    assert climb([1e-4] * 2000, param_norm=0.0)[-1] > 10


def test_a_rate_that_has_become_too_high_falls_by_the_cap() -> None:
    rule = Auto().bind(normalized=True)
    too_short = Observation(-0.5, 1.0, 1.0, param_norm=100.0)
    lr = feed(rule, [too_short] * 58, rule.first_lr(1.0, 1.0))[-1]
    (after,) = feed(rule, [too_short._replace(param_norm=lr / 10)], lr, start=60)
    assert math.log(lr / after) == pytest.approx(0.05)


@pytest.mark.parametrize(("task", "rates", "most"), [("digits-16", (0.01, 0.03), 1.3), ("tanh", (1e-3, 3e-3), 1.6)])
def test_a_hundred_steps_with_adam_are_not_all_climb(task: str, rates: tuple[float, ...], most: float) -> None:
    """Without regard to the length of moves and of the run, losses are 2.6 and 3.8 times the best constant rate's."""

    def loss(method: str, rate: float) -> float:
        problem = tasks.build(task, 0, Path())
        return training.train(problem, tuners.methods("auto")[method], "Adam", rate, 0.0, 100).train_loss

    assert loss("auto+cooldown", 1e-3) <= most * min(loss("constant", rate) for rate in rates)
