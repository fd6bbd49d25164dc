"""The rule auto, this project's own: it has nothing to tune."""

import math
import sys
from dataclasses import dataclass
from typing import Any, Literal

from lightning_hd.checks import check_count, check_flag, check_number
from lightning_hd.rules.base import Observation, Rule
from lightning_hd.rules.guard import LossGuard


@dataclass
class Auto(Rule):
    r"""The default, which has nothing to tune: a long memory, steps on the logarithm of the rate, and two brakes.

    The paper's hypergradient says whether the last step alone should have been longer. Gradient noise makes it shrink
    the rate too soon. This rule looks at all steps that it remembers. Had their rates been larger by a common factor,
    then the parameters ``θ_t``, where they are before step ``t``, would be further from where they were by that factor.
    So the derivative of the loss with respect to the logarithm of the rate is the gradient times the sum of the moves:

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

    ``γ`` is ``α`` times what the decline at the end makes of it, during which ``α`` does not rise. ``L`` is the mean of
    ``log γ`` over the moves in ``E``, each counted as far as it is remembered. Moves at rates far from the present one
    say nothing about it, so they are forgotten.

    With ``φ = 0`` only the last move is left, and ``h`` is the paper's hypergradient times ``α``: the paper's rule on
    ``log α``. Noise along directions of high curvature cancels within the memory. Slow progress along those of low
    curvature adds up. ``c`` is the cosine, except that a gradient larger than usual counts for more, as it does in the
    mean loss. It has no scale, so neither has the rule. ``S`` makes its steps as in AdaGrad. All memories and the clip
    follow the steps taken, so that the rate changes in the run's own time. The first rate is a small part of the
    parameters, ``α_1 = ρ ‖θ_1‖ / ‖d_1‖``, so the configured rates only set the ratios between groups. While steps
    vanish in the rounding of the parameters, so that ``E`` is zero, ``log α`` rises by the cap. Where ``‖g_t‖`` is
    below 10 times the rounding of the largest one, only rounding is left: ``log α`` falls, no further than to ``α_1``.

    The memory is blind to an instability: steps to and fro cancel in it. So the rule brakes where the norm of the
    gradient leaps. Where ``log ‖g_t‖`` exceeds its running mean by more than what is usual, by ``e`` (1 at most), the
    step is taken with ``α_t exp(-e)``, and ``e`` wears off. A leap alone may be a batch like no other, but an overshoot
    grows from step to step. So where another leap came just before, ``log α`` itself falls by ``e`` times the other
    ``e``, halved for each step since, but no further than to ``α_1`` (to 0 with ``start="configured"``).

    Where the step is not linear in the rate, as in dual averaging, a change of the rate moves all that was learned. So
    nothing is forgotten there, and ``log α`` changes by 0.02 per step at most.

    The gradient is blind to a rate at which nothing is learned any more. The loss is not, where it is known (from the
    closure of ``step``, or ``HypergradientLR.observe``). Its mean is taken over blocks of steps, each a tenth of
    the run so far. Where that rises above the lowest one by two standard errors, ``α`` goes back to half of what it was
    then, the memory starts anew, and ``α`` may double from there only as the run gets twice as long.

    The source is this project: the constants come from experiments on small networks (``tests/benchmarks``). What is
    kept is the running mean of the parameters, ``θ_t - E_t``, in float64, at the coordinates that the engine looks at.

    Args:
        start: ``"automatic"``, or ``"configured"``: start from the rate that the optimizer is configured with. The
            climb from there is slow, 10 % per step at most.
        horizon: ``H``, in steps: the memory of the first steps. Below 100 the rule turns greedy.
        growth: The horizon as a part of the steps taken, once that is longer than ``horizon``.
        reach: ``w``, how far ``log γ`` may be from its mean over the memory before old moves are forgotten. With 0.7,
            twice the rate, the weights of networks that are held small are pushed too far.
        memory: ``s``, over how many steps the squares of the cosine are remembered at first. With 1000, rates stand
            still once the climb is over; with 30, some runs collapse.
        memory_growth: The same as a part of the steps taken, once that is more.
        norm_horizon: Over how many steps ``G`` is taken at first. With 30, rates rise too late where the gradient
            vanishes; with 1, where ``c`` is the cosine, they end far too high, then too low, where few batches hold
            what is to be learned.
        norm_growth: The same as a part of the steps taken, once that is more.
        optimism: ``r``, by how much cosines count for more where they ask for a larger rate, and for less where they
            ask for a smaller one: early in a run, a longer step is useful beyond the horizon, too. With 0, rates fall
            too early in short runs. It is of the mean of two cosines, for those of an oscillation change signs.
        early: ``n``, after how many steps optimism fades, and so does ``careful_cap``.
        first_step: ``ρ``, the length of the first step over that of the parameters.
        cap: Largest change of ``log α`` in a step, at the start.
        careful_from: From this multiple of ``α_1`` on, ``careful_cap`` applies: where steps are long enough to do harm,
            some must be taken at each rate before the next, for harm to show.
        careful_cap: Largest change of ``log α`` in a step from there on. After ``early`` steps it falls as ``1 / t``.
        spike: Least ratio of a gradient norm to its running (geometric) mean at which the rule brakes.
        spike_sigmas: Braking also needs a rise by this many standard deviations of such rises, so that small batches
            do not brake for no fault of the rate. With 4, instabilities were missed.
        release: The part of a brake that is left a step later. With 0.9, instabilities come back too soon.

    Attributes:
        brakes: How often it has backed off, for a leap of the gradient's norm or a rise of the loss.

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
        self._ceiling = math.inf  # of log α, since the loss has risen
        self._fresh = False  # whether the memory starts anew
        self._first_lr = 0.0  # α_1; 0 where it is the configured one
        self._lr = 0.0  # γ_{t-1}
        self._gap = 0.0  # log γ_t - L_t
        self._moves = 0.0  # how many moves are in E, each counted as far as it is remembered
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
        """``α_1 = ρ ‖θ_0‖ / ‖d_1‖``; with ``ρ / ‖d_1‖`` where the parameters are all zero."""
        self._first_lr = self._lr = self.first_step * (param_norm or 1.0) / direction_norm
        self._gap = self._moves = 0.0
        return self._first_lr

    def discount(self, lr: float, step: int) -> float:
        """``φ_t``: the part of ``E`` that is left where the next move comes in, which is made at ``γ_t``."""
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
        """``log α_t`` from ``log α_{t-1}``, the cosine, and the norm of the gradient. A zero gradient says nothing."""
        if seen.grad_norm == 0:
            return lr
        careful = self.careful_cap * min(1.0, self.early / step)
        if seen.grad_norm < _RESOLVED * self.rounding * self._largest_norm:
            return max(lr * math.exp(-careful), min(lr, self._first_lr or lr))
        if seen.direction_norm == 0:
            return lr * math.exp(self.cap)
        change = self._change(seen, step)
        excess = self._excess(math.log(seen.grad_norm))
        before, self._leap, self._brake = self._leap, self._leap / 2, self._brake * self.release
        if excess > 0:
            self.brakes += 1
            excess = min(excess, 1.0)
            self._leap, self._brake = max(self._leap, excess), max(self._brake, excess)
            return max(lr * math.exp(-before * excess), min(lr, self._first_lr))
        self._largest_norm = max(self._largest_norm, seen.grad_norm)
        cap = self.cap
        if lr >= self.careful_from * self._first_lr:
            cap = careful
        if self.nonlinear:
            cap = min(cap, _NONLINEAR_CAP)
        return lr * math.exp(min(max(change, -cap), cap))

    def watch(self, lr: float, loss: float, step: int) -> float:
        """``α_t``, held back where the loss has risen."""
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
        """``α_t``, less what is left of the last brakes."""
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
        """By how much ``log ‖g_t‖`` exceeds what is usual; takes it into account for the next step."""
        excess = 0.0
        if self._norms > 2:
            rise = log_norm - self._log_mean / (1 - _LOG_MEMORY ** (self._norms - 1))
            usual = max(math.log(self.spike), self.spike_sigmas * math.sqrt(self._variance))
            self._variance = _running(self._variance, min(max(rise, 0.0), 3 * usual) ** 2, _RISE_MEMORY)
            excess = rise - usual
        self._log_mean = _running(self._log_mean, log_norm, _LOG_MEMORY)
        return excess

    def check_start(self, lr: float) -> None:
        """Raise ``ValueError`` for a configured rate of 0, which a product never leaves."""
        if lr == 0:
            raise ValueError(
                "rule 'auto' with start='configured' cannot leave a learning rate of 0: configure a positive lr in the "
                "optimizer, or use start='automatic'"
            )

    def state_dict(self) -> dict[str, Any]:
        """What it has learned; not its constants, which may be others after a restart."""
        own = {name: getattr(self, name) for name in (*_COUNTS, *_LEARNED, "_fresh", "_ceiling", "nonlinear")}
        return {**own, **self._guard.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what ``state_dict`` returned.

        Raises:
            KeyError, TypeError, ValueError: It is damaged.
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
"""Largest change of ``log α`` in a step where all that was learned moves along, by this part of it."""

_RESOLVED = 10.0
"""Below this many times the rounding of the largest gradient, a gradient is noise of rounding."""

_RETREAT = math.log(2)
"""By how much ``log α`` goes below that of the lowest loss: where the loss was lowest it may have been too high."""

_LARGEST_LOG = 700.0
"""The largest number of which there is an exponential."""

_LOG_MEMORY = 0.9
"""With which logarithms of gradient norms are forgotten: an overshoot grows within some ten steps."""

_RISE_MEMORY = 0.995
"""With which the usual size of their rises is forgotten: slowly, for a series of leaps not to seem usual soon."""


def _running(mean: float, value: float, memory: float) -> float:
    return memory * mean + (1 - memory) * value
