"""The greedy bound: the mean of the paper's cosines, its error, and what it holds up."""

import numpy as np
import pytest

from lightning_hd import Auto, Context, Observation
from lightning_hd.rules.greedy import Greedy


def test_the_error_of_independent_cosines_is_that_of_a_mean() -> None:
    greedy, cosines = Greedy(), np.random.default_rng(0).normal(0.2, 0.1, 10)
    for step, cosine in enumerate(cosines, start=2):
        greedy.see(float(cosine), Context(step))
    assert greedy.mean == pytest.approx(np.mean(cosines), rel=1e-12)
    assert greedy.sigmas == pytest.approx(np.mean(cosines) / (np.std(cosines) / np.sqrt(10)), rel=1e-9)


def test_noise_around_0_seldom_seems_positive() -> None:
    greedy, high = Greedy(), 0
    for step, cosine in enumerate(np.random.default_rng(0).normal(0, 0.1, 5000), start=2):
        greedy.see(float(cosine), Context(step))
        high += greedy.sigmas > 2
    assert high < 0.05 * 5000


@pytest.mark.parametrize("cosines", [[], [0.5], [0.5] * 3])
def test_a_few_cosines_say_nothing(cosines: list[float]) -> None:
    greedy = Greedy()
    for step, cosine in enumerate(cosines, start=2):
        greedy.see(cosine, Context(step))
    assert greedy.sigmas == 0


def test_cosines_that_are_all_the_same_are_sure() -> None:
    greedy = Greedy()
    for step in range(2, 12):
        greedy.see(0.5, Context(step))
    assert greedy.sigmas > 100


def test_a_rate_that_is_too_low_for_single_steps_does_not_fall_and_comes_back() -> None:
    rule, low = Auto(start="configured"), 1.0
    falls = [Observation(1.0, 1.0, 1.0, 1.0, 0.0, 0.5, 1.0)] * 60  # longer and single steps: both too long
    for step, seen in enumerate(falls, start=2):
        low = rule.update(low, seen, Context(step))
    assert low < 0.5
    rates = [low]
    for step in range(62, 200):
        slope = -0.5 + 0.01 * (step % 2)  # single steps are too short now, whatever the memory shows
        rates.append(rule.update(rates[-1], Observation(1.0, 1.0, 1.0, 1.0, 0.0, slope, 1.0), Context(step)))
    lowest = rates.index(min(rates))
    assert lowest < 20, "until the mean of the cosines is positive"
    assert np.all(np.diff(rates[lowest:]) >= 0)
    assert max(np.diff(np.log(rates))) <= 0.1 + 1e-12
    assert 1.0 <= rates[-1] < 1.2, "up to the highest rate so far, not beyond"
