"""The rule ``"auto"``, which is this project's own and has nothing to tune."""

import math
import sys
from dataclasses import dataclass
from typing import Any, Literal

from lightning_hd.checks import check_count, check_flag, check_number
from lightning_hd.rules.base import Observation, Rule
from lightning_hd.rules.guard import LossGuard


@dataclass
class Auto(Rule):
    r"""The default rule, which has nothing to tune: a long memory, steps on the logarithm of the rate, and two brakes.

    The paper's hypergradient shows whether the last step alone was too short. With noisy gradients it shrinks the rate
    too soon. This rule looks at all steps that it remembers. Let ``θ_t`` be the parameters before step ``t``. At rates
    that are larger by a common factor, the distance that they have moved would be larger by that factor. So the
    derivative of the loss with respect to the logarithm of the rate is the gradient times the sum of the moves:

    ```math
    \begin{aligned}
    E_t &= φ_{t-1} E_{t-1} + (θ_t - θ_{t-1}), \qquad h_t = \partial f / \partial \log α = g_t · E_t \\
    φ_t &= μ_t \exp(-(|\log γ_t - L_t| - w)^+), \qquad μ_t = 1 - 1 / \max(H, t / 2) \\
    c_t &= -g_t · E_t / (G_t ‖E_t‖), \qquad G_t^2 = \text{running mean of } ‖g_t‖^2 \\
    b_t &= c_t + r \min(1, n / t) \, |c_t + c_{t-1}| / 2 \\
    \log α_t &= \log α_{t-1} + \mathrm{clip}(\frac{H}{\max(H, t / 2)} \, b_t / \sqrt{S_t}),
    \qquad S_t = κ_t S_{t-1} + b_t^2, \qquad κ_t = 1 - 1 / \max(s, 0.3 t)
    \end{aligned}
    ```

    ``γ`` is ``α`` times the factor of the decline at the end of the run. ``α`` does not rise during the decline. ``L``
    is the mean of ``log γ`` over the moves in ``E``, each weighted by the part of it that is left. Moves at rates far
    from the present one show nothing about it, so they are forgotten.

    With ``φ = 0`` only the last move is left. ``h`` is then the paper's hypergradient times ``α``, so this is the
    paper's rule on ``log α``. Noise along directions of high curvature cancels within the memory. Slow progress along
    directions of low curvature adds up. ``c`` is the cosine, but a gradient larger than usual has a larger weight, as
    in the mean loss. It does not depend on the scale of the loss, so neither does the rule. ``S`` normalizes the steps
    as AdaGrad does. All memories and the clip follow the number of steps taken.

    The first rate is ``α_1 = ρ ‖θ_1‖ / ‖d_1‖``, so the configured rates only set the ratios between groups. If steps
    vanish in the rounding of the parameters, ``E`` is zero, and ``log α`` rises by the cap. If ``G_t`` is below 10
    times the rounding of the largest norm so far, gradients are only rounding, and ``log α`` stays as it is.

    The memory does not show an instability, because steps to and fro cancel in it. So the rule brakes when the norm of
    the gradient leaps, which means that ``log ‖g_t‖`` exceeds its running mean by more than usual. Let ``e`` be the
    excess, 1 at most. The step is taken with ``α_t exp(-e)``, and ``e`` decays in later steps. A single leap may come
    from an unusual batch, but an overshoot grows from step to step. So if there was a leap just before, ``log α``
    itself falls by the product of both excesses, where the earlier one is halved in each step. It does not fall below
    ``log α_1`` (there is no limit with ``start="configured"``).

    If the step is not linear in the rate, as in dual averaging, a change of the rate also changes what former steps
    have done. Nothing is forgotten then, and ``log α`` changes by 0.02 per step at most.

    The gradient does not show that the rate is so high that nothing is learned. The loss shows it, if it is known (from
    the closure of ``step``, or ``HypergradientLR.observe``). Its mean is taken over blocks of steps. Each block is a
    tenth of the run so far. If a mean exceeds the lowest one by two standard errors, ``α`` goes back to half of its
    value at the lowest one, and the memory starts anew. ``α`` may then double only when the run gets twice as long.

    Source: this project. The constants come from experiments on small networks (``tests/benchmarks``). The state is the
    running mean of the parameters, ``θ_t - E_t``, in float64, at the coordinates of the probe.

    Args:
        start: ``"automatic"``: the rule picks the first rate. ``"configured"``: it starts from the rate that the
            optimizer is configured with. The climb from there is slow, 10 % per step at most.
        horizon: ``H``, the length of the memory at first, in steps. Below 100 the rule turns greedy.
        growth: The same length as a part of the steps taken, once that is longer.
        reach: ``w``, the distance between ``log γ`` and its mean over the memory beyond which old moves are forgotten.
            With 0.7, a factor of two in the rate, weights that are held small are pushed too far.
        memory: ``s``, the number of steps over which squared cosines are remembered at first. With 1000, rates do not
            change any more once the climb is over. With 30, some runs collapse.
        memory_growth: The same number as a part of the steps taken, once that is more.
        norm_horizon: The number of steps in the running mean ``G`` at first. With 30, rates rise too late when the
            gradient vanishes. With 1, ``c`` is the cosine. If few batches then hold what is to be learned, rates become
            far too high, and later too low.
        norm_growth: The same number as a part of the steps taken, once that is more.
        optimism: ``r``, the additional weight of cosines that ask for a larger rate. Those that ask for a smaller rate
            lose as much weight. Early in a run, a longer step is useful beyond the horizon, too. With 0, rates fall too
            early in short runs. The mean of two cosines counts, because those of an oscillation change signs.
        early: ``n``, the number of steps after which ``optimism`` and ``careful_cap`` fade.
        first_step: ``ρ``, the length of the first step over the norm of the parameters.
        cap: The largest change of ``log α`` per step, at the start.
        careful_from: The multiple of ``α_1`` from which ``careful_cap`` applies. There steps are long enough to do
            harm, so the rate must rise slowly enough for the harm to show.
        careful_cap: The largest change of ``log α`` per step from there on. After ``early`` steps it falls as
            ``1 / t``.
        spike: The rule brakes only if a gradient norm exceeds this many times its running (geometric) mean.
        spike_sigmas: It also brakes only if the rise exceeds this many standard deviations of such rises, so that it
            does not brake for the noise of small batches. With 4, it missed instabilities.
        release: The part of a brake that is left after a step. With 0.9, instabilities came back too soon.

    Attributes:
        brakes: How often the rule has backed off from a leap of the gradient's norm or a rise of the loss.

    Raises:
        TypeError: An argument is not a number.
        ValueError: An argument is out of range.
    """

    start: Literal["automatic", "configured"] = "automatic"
    horizon: float = 450.0
    growth: float = 0.5
    reach: float = 0.5
    memory: float = 60.0
    memory_growth: float = 0.3
    norm_horizon: float = 10.0
    norm_growth: float = 0.02
    optimism: float = 0.3
    early: float = 100.0
    first_step: float = 1e-4
    cap: float = 0.5
    careful_from: float = 30.0
    careful_cap: float = 0.1
    spike: float = 2.5
    spike_sigmas: float = 3.0
    release: float = 0.95

    long_horizon = True

    def __post_init__(self) -> None:
        if self.start not in ("automatic", "configured"):
            raise ValueError(f"start must be 'automatic' or 'configured', got {self.start!r}")
        self.picks_start = self.start == "automatic"
        for name, low, high in (
            ("horizon", 1.0, 1e12),
            ("growth", 0.0, 1e3),
            ("reach", 0.0, math.inf),
            ("memory", 1.0, 1e12),
            ("memory_growth", 0.0, 1e3),
            ("norm_horizon", 1.0, 1e12),
            ("norm_growth", 0.0, 1e3),
            ("optimism", 0.0, 1.0),
            ("early", 0.0, math.inf),
            ("first_step", sys.float_info.min, math.inf),
            ("cap", 0.0, math.inf),
            ("careful_from", 0.0, math.inf),
            ("careful_cap", 0.0, math.inf),
            ("spike", 1.0, math.inf),
            ("spike_sigmas", 0.0, math.inf),
            ("release", 0.0, 1.0),
        ):
            setattr(self, name, check_number(name, getattr(self, name), low, high))
        self.brakes = 0
        self._guard = LossGuard()
        self._ceiling = math.inf  # the upper limit of log α since the loss has risen
        self._fresh = False  # whether the memory starts anew
        self._first_lr = 0.0  # α_1; 0 where it is the configured one
        self._lr = 0.0  # γ_{t-1}
        self._gap = 0.0  # log γ_t - L_t
        self._moves = 0.0  # the sum of the weights of the moves in E
        self._cosine = 0.0  # c_t
        self._squares = 0.0  # S_t
        self._brake = 0.0  # what is left of the last brakes
        self._leap = 0.0  # the last leap, halved for each step since
        self._norms = 0  # how many gradient norms were seen
        self._norm = 0.0  # G, before the correction for its start at 0
        self._largest_norm = 0.0
        self._norm_weight = 0.0  # the square of that correction
        self._log_mean = 0.0  # running mean of log ‖g‖, before such a correction
        self._variance: float = (math.log(self.spike) / self.spike_sigmas) ** 2 if self.spike_sigmas else 0.0

    def first_lr(self, param_norm: float, direction_norm: float) -> float:
        """``α_1 = ρ ‖θ‖ / ‖d_1‖`` with the parameters ``θ`` before the first step; ``ρ / ‖d_1‖`` if all are zero."""
        self._first_lr = self._lr = self.first_step * (param_norm or 1.0) / direction_norm
        self._gap = self._moves = 0.0
        return self._first_lr

    def discount(self, lr: float, step: int) -> float:
        """``φ_t``, the part of ``E`` that is left when the next move is added, which is made at ``γ_t``."""
        if self._fresh:
            self._fresh, self._lr, self._gap, self._moves = False, lr or self._lr, 0.0, 1.0
            return 0.0
        if lr > 0 and self._lr > 0:
            self._gap += math.log(lr / self._lr)
        self._lr = lr if lr > 0 else self._lr  # at a rate of 0 nothing moves
        kept = 1 - 1 / max(self.horizon, self.growth * step)
        kept *= math.exp(-max(abs(self._gap) - self.reach, 0.0))
        if self.nonlinear:
            kept = 1.0
        before, self._moves = kept * self._moves, kept * self._moves + 1
        self._gap *= before / self._moves
        return kept

    def update(self, lr: float, seen: Observation, step: int) -> float:
        """``α_t`` from ``α_{t-1}``, the cosine, and the norm of the gradient. A zero gradient changes nothing."""
        if seen.grad_norm == 0:
            return lr
        resolved = _RESOLVED * self.rounding * self._largest_norm
        if seen.direction_norm == 0:
            return lr * math.exp(self.cap) if seen.grad_norm >= resolved else lr
        change = self._change(seen, step)
        excess = self._excess(math.log(seen.grad_norm))
        before, self._leap, self._brake = self._leap, self._leap / 2, self._brake * self.release
        if excess > 0:
            self.brakes += 1
            excess = min(excess, 1.0)
            self._leap, self._brake = max(self._leap, excess), max(self._brake, excess)
            return max(lr * math.exp(-before * excess), min(lr, self._first_lr))
        self._largest_norm = max(self._largest_norm, seen.grad_norm)
        if self._norm < resolved * math.sqrt(self._norm_weight):
            return lr
        cap = self.cap
        if lr >= self.careful_from * self._first_lr:
            cap = self.careful_cap * min(1.0, self.early / step)
        if self.nonlinear:
            cap = min(cap, _NONLINEAR_CAP)
        return lr * math.exp(min(max(change, -cap), cap))

    def watch(self, lr: float, loss: float, step: int) -> float:
        """``α_t``, lowered if the loss has risen."""
        if lr <= 0:
            return lr
        self._ceiling += math.log1p(1 / step)
        best = self._guard.see(loss, math.log(lr), step)
        if best is not None and best - _RETREAT < math.log(lr):
            self.brakes += 1
            self._fresh = True
            self._ceiling = best - _RETREAT
            self._guard.best_log = self._ceiling
        return min(lr, math.exp(min(self._ceiling, _LARGEST_LOG)))

    def used(self, lr: float, step: int) -> float:
        """``α_t``, lowered by what is left of the last brakes."""
        return lr * math.exp(-self._brake)

    def _change(self, seen: Observation, step: int) -> float:
        """The change of ``log α`` that the gradient asks for, before it is clipped."""
        self._norms += 1
        memory = 1 - 1 / max(self.norm_horizon, self.norm_growth * step)
        self._norm = math.hypot(math.sqrt(memory) * self._norm, math.sqrt(1 - memory) * seen.grad_norm)
        self._norm_weight = _running(self._norm_weight, 1.0, memory)
        cosine = seen.cosine * (seen.grad_norm / self._norm) * math.sqrt(self._norm_weight)
        optimism = self.optimism * min(1.0, self.early / step)
        bent = cosine + optimism * abs(cosine + self._cosine) / 2
        self._cosine = cosine
        self._squares *= 1 - 1 / max(self.memory, self.memory_growth * step)
        self._squares += bent**2
        pace = self.horizon / max(self.horizon, self.growth * step)
        return pace * bent / math.sqrt(self._squares) if self._squares else 0.0

    def _excess(self, log_norm: float) -> float:
        """The excess of ``log ‖g_t‖`` over what is usual. It also updates what is usual."""
        excess = 0.0
        if self._norms > 2:
            rise = log_norm - self._log_mean / (1 - _LOG_MEMORY ** (self._norms - 1))
            usual = max(math.log(self.spike), self.spike_sigmas * math.sqrt(self._variance))
            self._variance = _running(self._variance, min(max(rise, 0.0), 3 * usual) ** 2, _RISE_MEMORY)
            excess = rise - usual
        self._log_mean = _running(self._log_mean, log_norm, _LOG_MEMORY)
        return excess

    def check_start(self, lr: float) -> None:
        """Raise ``ValueError`` for a configured rate of 0, because a product never leaves it."""
        if lr == 0:
            raise ValueError(
                "rule 'auto' with start='configured' cannot leave a learning rate of 0: configure a positive lr in the "
                "optimizer, or use start='automatic'"
            )

    def state_dict(self) -> dict[str, Any]:
        """What the rule has learned, without its constants. They may change when a run is resumed."""
        own = {name: getattr(self, name) for name in (*_COUNTS, *_LEARNED, "_fresh", "_ceiling", "nonlinear")}
        return {**own, **self._guard.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned.

        Raises:
            KeyError, TypeError, ValueError: The state is damaged.
        """
        counts = {name: check_count(name, state_dict[name]) for name in _COUNTS}
        learned = {name: check_number(name, state_dict[name], *bounds) for name, bounds in _LEARNED.items()}
        flags = {name: check_flag(name, state_dict[name]) for name in ("_fresh", "nonlinear")}
        ceiling = state_dict["_ceiling"]
        if ceiling != math.inf:
            ceiling = check_number("_ceiling", ceiling)
        self._guard.load_state_dict(state_dict)
        vars(self).update(counts | learned | flags | {"_ceiling": ceiling})


_COUNTS = ("brakes", "_norms")

_LEARNED = {
    "_first_lr": (0.0, math.inf),
    "_lr": (-math.inf, math.inf),
    "_gap": (-math.inf, math.inf),
    "_moves": (0.0, math.inf),
    "_cosine": (-math.inf, math.inf),
    "_squares": (0.0, math.inf),
    "_brake": (0.0, 1.0),
    "_leap": (0.0, 1.0),
    "_norm": (0.0, math.inf),
    "_largest_norm": (0.0, math.inf),
    "_norm_weight": (0.0, 1.0),
    "_log_mean": (-math.inf, math.inf),
    "_variance": (0.0, math.inf),
}
"""What the rule learns, with its bounds."""

_NONLINEAR_CAP = 0.02
"""The largest change of ``log α`` per step if the step is not linear in the rate: all former steps change as much."""

_RESOLVED = 10.0
"""Below this many times the rounding of the largest gradient, a gradient is only rounding."""

_RETREAT = math.log(2)
"""``log α`` goes this far below its value at the lowest loss, because even that may have been too high."""

_LARGEST_LOG = 700.0
"""About the largest number whose exponential is a float."""

_LOG_MEMORY = 0.9
"""The decay of the mean of ``log ‖g‖`` per step. It is fast, because an overshoot grows within some ten steps."""

_RISE_MEMORY = 0.995
"""The decay of the variance of its rises per step. It is slow, so that a series of leaps does not soon seem usual."""


def _running(mean: float, value: float, memory: float) -> float:
    return memory * mean + (1 - memory) * value
