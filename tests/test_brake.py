"""The brake alone: from which norm on it sees leaps, and up to which rate it lets the rate rise fast."""

import math

import numpy as np
import pytest

from lightning_hd.rules.brake import Brake


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
