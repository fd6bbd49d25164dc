"""The brake alone: from which norm on it sees leaps, and up to which rate it lets the rate rise fast."""

import math

import pytest

from lightning_hd.rules.brake import Brake


@pytest.mark.parametrize(("before", "leaps"), [(1, False), (2, True)])
def test_two_norms_show_what_is_usual(before: int, leaps: bool) -> None:
    brake = Brake()
    assert [brake.see(1.0, 0.0, normalized=True, stride=1) for _ in range(before)] == [None] * before
    assert (brake.see(100.0, 0.0, normalized=True, stride=1) is not None) == leaps


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
