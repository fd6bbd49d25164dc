"""What bounds the rate: the climb from the first one, steps that are too long (the brake), or too short (greedy)."""

import math
from dataclasses import dataclass

from lightning_hd.checks import not_negative
from lightning_hd.rules.base import Context, Observation

_FIRST_STEP = 1e-4
"""The length of the first step over the norm of the parameters."""

CAP, _CAREFUL_CAP, _SHORT_CAP = 0.5, 0.05, 0.1
"""The largest change of ``log α`` per step: at the start, and once steps are long. They may do harm then, which must
have time to show. With 0.1, units of networks with clipped or normalized weights die under SGD, and the loss ends at
1.3 times as much. With 0.03, short runs lose. The last one is for runs that are too short for a careful climb. With
0.15, clipped weights suffer in these."""

_CLIMB = 10.0
"""In a run of ``n`` steps, the cap is this over ``n`` if that is between the two: so even a climb by a factor of 1000
leaves a third of the run."""

_HIGH, _LONG, _HIGHEST = 30.0, 0.006, 300.0
"""Steps are long once ``α`` was at the first multiple of ``α_1`` and a move had this part of ``‖θ‖``. Without regard to
moves, short runs with Adam lose, because its moves get shorter after the first one. With 0.02, Adam does lasting harm.
At the last multiple of ``α_1`` steps count as long in any case."""

EARLY = 100.0
"""``m``: after so many steps the cap fades as ``1 / t``, and so does the optimism of the rule."""

_LONGEST = 0.3
"""The longest step over ``‖θ‖``. With 1, a network with batch normalization blew up in full batches, with Adam."""

_SPIKE, _SIGMAS = math.log(2.5), 3.0
"""A norm leaps if its logarithm exceeds its running mean by both: the factor, and standard deviations of such rises.
With 4 deviations, instabilities were missed."""

_MEMORY, _RISE_MEMORY = 0.9, 0.995
"""What is left of the mean and of the variance after a step. An overshoot grows within some ten steps. The variance is
slow, so that a series of leaps does not soon seem usual."""

_LONG_MEMORY, _FAR = 0.99, math.log(20)
"""Where steps follow the gradient, two norms in a row of 20 times the mean over a hundred looks are a leap, too. The
loss of another task, or its weight, may change the norm by ten times. Of rare events, two seldom follow each other: if
one norm were enough, they would starve SGD."""

_RELEASE = 0.95
"""What is left of a brake after a step. With 0.9, instabilities came back too soon."""

_LARGEST = 2.0
"""The largest excess where the optimizer normalizes the gradient, because a leap hardly lengthens its steps: they are
never more than e² times shorter. With 3, rare large gradients starve Adam. A brake above it would be released by more
than a tenth per step, and so faster than a momentum of 0.9 forgets the leap."""

_LONGER = math.log(2)
"""So it stays as it is while the directions of steps, over the gradients, are longer than usual by this factor."""

_SHORTER = math.log(8)
"""But not where steps are shorter than usual by this factor, so that a network that the leap has harmed can recover."""

_SEEN = 1.5
"""In the variance, a rise counts up to this many times what is usual. With 3, a series of leaps soon seems usual."""

_SERIES = 20
"""Leaps within so many steps belong to one instability."""

_FORGOTTEN = 0.005
"""So much of the largest ``log ‖g‖`` of an instability is forgotten in each look. Without it, full batches may swing on
at one height. With twice as much, batches of one starve SGD."""

_SETTLED = 500
"""So many steps are all looked at. With looks further apart in these, a GAN diverged."""

_APART, _SPARSEST = 125, 8
"""After each so many steps of a run, looks are one step further apart, up to the largest distance. A memory of 450
steps still holds 56 looks."""

_CALM = 60
"""The same after each so many steps without a leap. With a third of it, leaps that came again were seen too late, and
the loss of a differential equation ended far higher."""

_SHORTEST, _PART = 10, 0.02
"""The length of the greedy memory: in looks at first, then as a part of the steps taken."""

_FEWEST = 4
"""The number of cosines below which their scatter is unknown."""


@dataclass
class Climb:
    """What bounds the rate from the start on: the first rate, the largest change per step, and the longest step.

    Where gradients shrink, ever higher rates seem right. An optimizer that divides by the scale of former gradients, as
    Adam does, takes full steps again as soon as that has shrunk, too. At such a rate they would be far longer than the
    parameters are. So a step of the length that the first direction had may have 0.3 ``‖θ‖`` at most. Source: this
    project.
    """

    first_lr: float = not_negative()  # α_1; 0 where it is the configured one
    direction: float = not_negative()  # ‖d_1‖; 0 where it is not known
    peak: float = not_negative()  # the highest α_t so far
    careful: bool = False  # whether steps are long

    def begin(self, param_norm: float, direction_norm: float) -> float:
        """``α_1 = 10^-4 ‖θ_1‖ / ‖d_1‖``; a norm of the parameters of 0 counts as 1."""
        self.direction, self.first_lr = direction_norm, _FIRST_STEP * (param_norm or 1.0) / direction_norm
        return self.first_lr

    def see(self, lr: float, seen: Observation) -> None:
        """Note the rate and the length of a move."""
        self.peak = max(self.peak, lr)
        long = self.peak >= _HIGH * self.first_lr and seen.move_norm >= _LONG * seen.param_norm
        self.careful |= long or self.peak >= _HIGHEST * self.first_lr

    def cap(self, context: Context) -> float:
        """The largest change of ``log α`` per step."""
        careful = min(max(_CAREFUL_CAP, _CLIMB / context.length), _SHORT_CAP)
        return (careful if self.careful else CAP) * min(1.0, EARLY / context.step)

    def limit(self, seen: Observation, normalized: bool) -> float:
        """The highest rate. It is infinite where steps follow the norm of the gradient."""
        bounded = normalized and self.direction > 0 and seen.param_norm > 0
        return _LONGEST * seen.param_norm / self.direction if bounded else math.inf


@dataclass
class Brake:
    """Detects leaps of ``log ‖g‖``, and what they cost the rate.

    The steps after a leap are shortened by its excess over what is usual, which decays. Steps that are proportional to
    the gradient, as those of SGD are, are then about as long as usual, however large the leap is. After a series of
    leaps, a norm that grows for long may seem usual. So where steps follow the gradient, what is usual over many more
    steps counts, too. Momentum holds a leap for many steps. So a large brake is not released while the step's
    direction, which is the last move over its rate, is longer than usual for such a gradient.

    A single leap may come from an unusual batch, but an overshoot grows from leap to leap. So ``log α`` itself falls
    only if there was a leap just before, and no norm of this instability was as large. If one batch in three has a
    large gradient, leaps follow each other, but they do not grow. Half of the rate at the first leap of an instability
    is the limit up to which the rate may rise fast again, as the slow start of TCP has one (RFC 5681, 3.1). Source:
    this project.
    """

    count: int = 0  # how many norms were seen
    last: float = 0.0  # log ‖g_{t-1}‖
    mean: float = 0.0  # running mean of log ‖g‖, before the correction for its start at 0
    long_mean: float = 0.0  # the same over a hundred looks
    variance: float = not_negative((_SPIKE / _SIGMAS) ** 2)
    directions: int = 0  # how many directions of steps were seen
    length: float = 0.0  # running mean of log (‖d_{t-1}‖ / ‖g_{t-1}‖) over a hundred looks, before the correction
    left: float = not_negative()  # what is left of the last excesses
    leap: float = not_negative()  # the last excess, 1 at most, halved for each step since
    quiet: int = _SERIES  # the number of steps since the last leap
    highest: float = 0.0  # what is left of the largest log ‖g‖ of the last instability
    limit: float = math.inf  # log α up to which the rate may rise fast

    @property
    def has_grown(self) -> bool:
        """Whether the mean norm of the last looks is above twice that of the last hundred."""
        if self.count < 2:
            return False
        mean, long_mean = self._means()
        return mean - long_mean > math.log(2)

    def see(
        self, grad_norm: float, log_lr: float, move_norm: float = 0.0, *, normalized: bool, stride: int
    ) -> float | None:
        """By how much ``log α`` must fall if the norm has leapt; ``None`` if it has not.

        Args:
            grad_norm: ``‖g_t‖``.
            log_lr: ``log α_{t-1}``.
            move_norm: ``‖θ_t - θ_{t-1}‖``; 0: there was no move.
            normalized: Whether steps do not follow the norm of the gradient.
            stride: How many steps the last look stands for.
        """
        log = math.log(grad_norm)
        self.highest -= _FORGOTTEN
        grows, before = log > max(self.last, self.highest), self.leap
        held = self.count > 0 and move_norm > 0 and self._holds(math.log(move_norm) - log_lr + self.left - self.last)
        excess = self._excess(log, normalized)
        self.last, self.leap, self.left = log, self.leap / 2, self.left * (1.0 if held else _RELEASE)
        if excess <= 0:
            self.quiet += stride
            return None
        self.left = max(self.left, min(excess, _LARGEST) if normalized else excess)
        self.leap = max(self.leap, min(excess, 1.0))
        if self.quiet >= _SERIES:
            self.limit, self.highest = log_lr - math.log(2), log
        self.highest, self.quiet = max(self.highest, log), 0
        return before * min(excess, 1.0) if grows else 0.0

    def stride(self, step: int, calm: int) -> int:
        """How far apart looks may be: 1, 2, 4 or 8 steps, the longer the run and the longer nothing has happened.

        Args:
            step: The number of the step.
            calm: How many steps there were since the last event other than a leap.
        """
        wanted = min(step // _APART, min(calm, self.quiet) // _CALM, _SPARSEST)
        return 1 if step < _SETTLED else 1 << max(wanted.bit_length() - 1, 0)

    def _excess(self, log: float, normalized: bool) -> float:
        """The excess of ``log ‖g_t‖`` over what is usual. It also updates what is usual."""
        excess = 0.0
        if self.count > 1:
            mean, long_mean = self._means()
            rise = log - mean
            usual = max(_SPIKE, _SIGMAS * math.sqrt(self.variance))
            self.variance = _RISE_MEMORY * self.variance + (1 - _RISE_MEMORY) * min(max(rise, 0.0), _SEEN * usual) ** 2
            excess = rise - usual
            if not normalized:  # ``last`` is still that of the norm before
                excess = max(excess, min(log, self.last) - long_mean - _FAR)
        self.count += 1
        self.mean = _MEMORY * self.mean + (1 - _MEMORY) * log
        self.long_mean = _LONG_MEMORY * self.long_mean + (1 - _LONG_MEMORY) * log
        return excess

    def _holds(self, length: float) -> bool:
        """Whether momentum holds the leap of a large brake. It also updates what is usual.

        Args:
            length: ``log (‖d_{t-1}‖ / ‖g_{t-1}‖)``, where ``d`` is the direction of the step.
        """
        usual = self.length / (1 - _LONG_MEMORY**self.directions) if self.directions else length
        self.directions += 1
        self.length = _LONG_MEMORY * self.length + (1 - _LONG_MEMORY) * min(length, usual + _LONGER)
        over = length - usual
        short = over + self.last - self._means()[1] < self.left - _SHORTER
        return self.left > _LARGEST and over > _LONGER and not short

    def _means(self) -> tuple[float, float]:
        """The means of ``log ‖g‖`` over some ten looks and over a hundred, corrected for their start at 0."""
        return self.mean / (1 - _MEMORY**self.count), self.long_mean / (1 - _LONG_MEMORY**self.count)


@dataclass
class Greedy:
    """The running mean of the paper's cosine, ``-g_t · (θ_t - θ_{t-1}) / (‖g_t‖ ‖θ_t - θ_{t-1}‖)``, and its error.

    For a convex loss it is positive only if the last step was too short to get to the minimum along its direction. A
    rule that looks at single steps is greedy: its rates are lower than the best ones. So rates at which single steps
    are still too short are lower than the best ones, too. Source: Section 3 of the paper; the bound is this project's.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = not_negative()  # the mean of the squared cosines
    weight: float = not_negative()  # the sum of the squared weights of the cosines in the mean

    def see(self, cosine: float, context: Context) -> None:
        """Add the cosine of a step that was looked at."""
        self.count += 1
        part = 1 / min(self.count, max(_SHORTEST, _PART * context.step / context.stride))
        self.mean += part * (cosine - self.mean)
        self.squares += part * (cosine**2 - self.squares)
        self.weight = (1 - part) ** 2 * self.weight + part**2

    @property
    def sigmas(self) -> float:
        """The mean over its standard error: above 2, steps are too short. It is 0 after a few cosines only."""
        if self.count < _FEWEST:
            return 0.0
        variance = max(self.squares - self.mean**2, (2.0**-23 * self.mean) ** 2)
        return self.mean / math.sqrt(variance * self.weight) if variance else 0.0
