"""What single steps show: from which norm on the brake sees leaps, and what the greedy bound holds up."""

import math

import numpy as np
import pytest

from lightning_hd import Auto, Context, Observation
from lightning_hd.rules.bounds import Brake, Greedy


@pytest.mark.parametrize(("before", "leaps"), [(1, False), (2, True)])
def test_two_norms_show_what_is_usual(before: int, leaps: bool) -> None:
    brake = Brake()
    assert [brake.see(1.0, 0.0, normalized=True, stride=1) for _ in range(before)] == [None] * before
    assert (brake.see(100.0, 0.0, normalized=True, stride=1) is not None) == leaps


@pytest.mark.parametrize("normalized", [True, False])
def test_growth_that_seems_usual_is_a_leap_only_where_steps_follow_the_gradient(normalized: bool) -> None:
    """Norms of a step grow by 30 %, after a series of leaps that were far larger."""
    brake = Brake(variance=1.0)
    norms = [1.0] * 60 + [1.3**i for i in range(1, 21)]
    falls = [brake.see(norm, 0.0, normalized=normalized, stride=1) for norm in norms]
    logs = np.log(norms)
    far = [math.nan, math.nan] + [
        min(logs[i - 1 : i + 1]) - np.average(logs[:i], weights=0.99 ** np.arange(i)[::-1]) - math.log(20)
        for i in range(2, len(norms))
    ]
    leaps = [not normalized and one > 0 for one in far]
    assert [fall is not None for fall in falls] == leaps
    assert sum(leaps) == (0 if normalized else 6)
    assert falls[-1] == (None if normalized else pytest.approx(min(far[-2], 1.0) * min(far[-1], 1.0), rel=1e-12))
    assert brake.left == pytest.approx(0.0 if normalized else far[-1], rel=1e-12)


@pytest.mark.parametrize(("quiet", "limit"), [(19, 0.5), (20, 0.25)])
def test_the_rate_may_rise_fast_to_half_of_that_of_the_first_leap_of_a_series(quiet: int, limit: float) -> None:
    """Leaps with fewer than 20 quiet steps between them are a series."""
    brake = Brake()
    for _ in range(5):
        brake.see(1.0, 0.0, normalized=True, stride=1)
    assert brake.limit == math.inf
    brake.see(100.0, 0.0, normalized=True, stride=1)
    assert brake.limit == pytest.approx(math.log(0.5), rel=1e-12)
    for _ in range(quiet):
        assert brake.see(1.0, 0.0, normalized=True, stride=1) is None
    assert brake.see(1e4, math.log(0.5), normalized=True, stride=1) is not None
    assert brake.limit == pytest.approx(math.log(limit), rel=1e-12)


def test_leaps_that_do_not_grow_lower_the_rate_no_further() -> None:
    """One batch in three has a large gradient, always of about the same size."""
    brake, generator = Brake(), np.random.default_rng(0)
    events = generator.random(300) < 1 / 3
    norms = np.where(events, generator.uniform(0.8, 1.0, 300), 0.01)
    norms[:20] = 0.01
    falls = [brake.see(float(norm), 0.0, normalized=False, stride=1) for norm in norms]
    found = [fall for fall in falls if fall is not None]
    assert len(found) > 10
    forgotten = [np.log(norms[:i]) - 0.005 * np.arange(i, 0, -1) for i in range(300)]
    records = [i for i in range(20, 300) if math.log(norms[i]) > max(forgotten[i])]
    assert 0 < sum(fall > 0 for fall in found) <= len(records) < 0.4 * sum(events[20:])


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99])
@pytest.mark.parametrize("factor", [1e2, 1e4, 1e8])
def test_a_brake_is_not_released_faster_than_momentum_forgets_the_leap(momentum: float, factor: float) -> None:
    brake, velocity, moves = Brake(), 0.0, [0.0]
    for step in range(600):
        norm = factor if step == 200 else 1.0
        brake.see(norm, 0.0, moves[-1], normalized=False, stride=1)
        velocity = momentum * velocity + norm
        moves.append(velocity * math.exp(-brake.left))
    usual = moves[200]
    assert max(moves[201:]) < 5 * usual
    assert sum(moves[201:301]) < 110 * usual
    if momentum < 0.99:
        assert moves[400] > usual / 2, "and all is as before in the end"


def test_a_network_that_a_leap_has_harmed_recovers() -> None:
    """After it, gradients are ten times as large as before for good."""
    brake, moves = Brake(), [0.0]
    for step in range(300):
        norm = 1e6 if step == 200 else 1.0 + 9.0 * (step > 200)
        brake.see(norm, 0.0, moves[-1], normalized=False, stride=1)
        moves.append(norm * math.exp(-brake.left))
    assert min(moves[230:]) > 0.1 * moves[200], "steps are not much shorter than usual after a few dozen"


@pytest.mark.parametrize("growth", [1.0, 1.05, 1.15])
def test_norms_have_grown_where_those_of_ten_looks_are_twice_those_of_a_hundred(growth: float) -> None:
    brake, logs = Brake(), list[float]()
    assert not brake.has_grown
    for i in range(120):
        logs.append(max(i - 60, 0) * math.log(growth))
        brake.see(math.exp(logs[-1]), 0.0, normalized=True, stride=1)
        short, long = (np.average(logs, weights=memory ** np.arange(i + 1)[::-1]) for memory in (0.9, 0.99))
        assert brake.has_grown == (i > 0 and short - long > math.log(2))
    assert brake.has_grown == (growth > 1)


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
