"""The rule ``"auto"``, which is this project's own and has nothing to tune."""

import copy
import math
from dataclasses import dataclass
from typing import Any, Literal

from lightning_hd.checks import check_count, check_fields, not_negative
from lightning_hd.rules.base import Context, Event, Observation, Rule
from lightning_hd.rules.bounds import CAP, EARLY, Brake, Climb, Greedy
from lightning_hd.rules.guard import LossGuard

_HORIZON, _GROWTH = 450.0, 0.5
"""``H``, the length of the memory: in steps at first, then as a part of the steps taken. Below 100 it is greedy."""

_ENOUGH = 100.0
"""The number of moves in a memory that is no longer greedy. Where it began anew, falls count in proportion to them."""

_REACH = 0.5
"""``w``: moves at rates that are further than this from the present one, in ``log γ``, show nothing about it."""

_SQUARES = 60.0
"""The memory of squared cosines, in steps. With 1000, rates do not change any more once the climb is over."""

_NORMS, _NORMS_GROWTH = 10.0, 0.02
"""The memory of ``G``. With 1, ``c`` is the cosine. Rates get too high if few batches hold what is to be learned."""

_SMOOTHED, _RECENT = 0.05, 0.2
"""``W``: a part of the cooldown at the end, and at most a part of the steps taken."""

_TURNS, _TURNING, _TURNED, _STRAIGHT = 20, 0.1, 0.6, 0.8
"""The number of steps in the running mean of the cosine of two gradients in a row. Minus the next two, gradients begin
to turn round, and have turned round. Above the last one they do not turn."""

_OPTIMISM = 0.3
"""``r``, the additional weight of cosines that ask for a larger rate: early, a longer step is useful beyond the
horizon."""

_SURE, _RAMP = 2.0, 8.0
"""Standard errors above 0 beyond which the greedy mean is positive, and over which the fast rise grows."""

_FAST, _QUIET = 0.1, 0.1
"""The fast change of ``log α`` per step: it rises so after a fall or where gradients do not turn, and falls so where
their norms have doubled. The second is what may be left of a brake while it rises after a fall."""

_NONLINEAR_CAP = 0.02
"""The largest change of ``log α`` per step if the step is not linear in the rate: all former steps change as much."""

_RESOLVED, _SETTLING, _SHRUNK = 10.0, 0.01, 0.01
"""Below this many times the rounding of the largest gradient, a gradient is only rounding, and ``log α`` falls so fast.
Below the last part of the largest one, a gradient at the usual size would be a leap that ends the run."""

_LARGEST_LOG = 700.0
"""About the largest number whose exponential is a float."""


@dataclass
class _Learned:
    """The numbers that the rule itself holds, beside those of its parts."""

    lr: float = 0.0  # γ_{t-1}
    gap: float = 0.0  # log γ_t - L_t
    moves: float = not_negative()  # the sum of the weights of the moves in E
    fresh: bool = False  # whether the memory starts anew
    anew: bool = False  # whether it has done so because all parameters were new, and is still short
    cosine: float = 0.0  # c_t
    squares: float = not_negative()  # S_t
    norm: float = not_negative()  # G, before the correction for its start at 0
    norm_weight: float = not_negative()  # the square of that correction
    largest_norm: float = not_negative()
    fallen: float = not_negative()  # how far log α has fallen beyond the cap, and has not risen beyond it since
    turns: int = 0  # how many cosines of two gradients in a row were seen, 20 at most
    turn: float = 0.0  # their running mean


@dataclass
class Auto(Rule):
    r"""The default rule, which has nothing to tune: a long memory that looks past the noise, and steps on ``log α``.

    The paper's hypergradient shows whether the last step alone was too short. With noisy gradients it shrinks the rate
    too soon. This rule looks at all steps that it remembers. Let ``θ_t`` be the parameters before step ``t``. At rates
    that are larger by a common factor, the distance that they have moved would be larger by that factor. So the
    derivative of the loss with respect to the logarithm of the rate is the gradient times the sum of the moves:

    ```math
    \begin{aligned}
    E_t &= φ_{t-1} E_{t-1} + (θ_t - θ_{t-1}), \qquad Ē_t = Ē_{t-1} + (E_t - Ē_{t-1}) / W_t \\
    φ_t &= μ_t \exp(-(|\log γ_t - L_t| - w)^+), \qquad μ_t = 1 - 1 / \max(H, t / 2) \\
    h_t &= ρ_t \, g_t · E_t + (1 - ρ_t) \, g_t · Ē_t, \qquad ρ_t = \mathrm{clip}((-κ_t - 0.1) / 0.5, 0, 1) \\
    c_t &= -h_t / (G_t ‖E_t‖), \qquad G_t^2 = \text{running mean of } ‖g_t‖^2 \\
    b_t &= c_t + r \min(1, m / t) \, |c_t + c_{t-1}| / 2 \\
    \log α_t &= \log α_{t-1} + \mathrm{clip}(\frac{H}{\max(H, t / 2)} \, b_t / \sqrt{S_t}),
    \qquad S_t = (1 - 1 / s) S_{t-1} + b_t^2
    \end{aligned}
    ```

    Here ``H`` is 450 steps, ``w`` is 0.5, ``r`` is 0.3, ``m`` is 100 steps and ``s`` is 60 steps. The clip is at 0.5
    first, and at 0.05 once steps are long: the rate was 30 times the first one and a move was 0.006 ``‖θ‖``, or the
    rate was 300 times the first one. If the rates are to have fallen after ``n < 200`` steps, it is at ``10 / n``
    then, up to 0.1. After ``m`` steps it shrinks as ``m / t``. The mean in ``G`` is over some 10 steps, or a fiftieth
    of the steps taken.

    ``γ`` is ``α`` times the factor of the cooldown at the end of the run, in which ``α`` does not rise. ``L``
    is the mean of ``log γ`` over the moves in ``E``, each weighted by the part of it that is left. Moves at rates far
    from the present one show nothing about it, so they are forgotten.

    **Past the noise.** ``g · E`` is the derivative of the loss as it is now. A part of it is noise, which the cooldown
    at the end removes. Along a direction of curvature ``λ`` the noise of the parameters forgets itself at the rate
    ``α λ``. So its product with a mean over ``W`` steps keeps the part ``1 / (1 + α λ W)`` of it. A cooldown over ``n``
    steps leaves about ``√(2 / (α λ n))``. For ``W = n / 20`` both are alike within a factor of two, from ``α λ``
    of 0.01 to 1. What is learned along flat directions counts in full. Without a cooldown, ``W = 1`` and ``Ē = E``. A
    schedule that has fallen below its peak counts as a cooldown that ends with the run, if its length is known.

    **Gradients that turn round.** ``κ`` is the running mean of the cosine of two gradients in a row. Near -1 gradients
    turn round, so steps are too long, and ``g · E`` is believed. Above 0.8 they do not turn. Then nothing asks for a
    smaller rate, and it may rise by 10 % per step.

    **The greedy bound.** A rate at which the paper's own derivative is still positive (by two standard errors) is too
    low (``Greedy``). Then the rate does not fall. If it has been higher before, it rises by up to 10 % per step, up to
    half of the rate at the last leap of the gradient. So it comes back after a fall as fast as it climbed at first.
    Where the norm of the gradient has doubled within some ten steps, the loss bends more than before, as behind a
    saddle. Then the rate may fall by 10 % per step as well. If the gradient then asks for a larger rate again, it may
    rise as fast, by as much as it has fallen so.

    With ``φ = 0`` and ``W = 1`` only the last move is left. ``h`` is then the paper's hypergradient times ``α``, so
    this is the paper's rule on ``log α``. ``c`` is the cosine, but a gradient larger than usual has a larger weight, as
    in the mean loss. It does not depend on the scale of the loss, so neither does the rule. ``S`` normalizes the steps
    as AdaGrad does.

    The first rate is ``α_1 = 10^{-4} ‖θ_1‖ / ‖d_1‖``, so the configured rates only set the ratios between groups. If
    steps vanish in the rounding of the parameters, ``E`` is zero, and ``log α`` rises by the cap. If ``G_t`` or
    ``‖g_t‖`` is below 10 times the rounding of the largest norm so far, gradients are only rounding. Then nothing is
    left to learn, and ``log α`` falls by 0.01 per step, down to ``log α_1``.

    With an optimizer that divides by the scale of gradients, ``α_t ‖d_1‖ ≤ 0.3 ‖θ_t‖`` (``Climb``).

    The memory does not show an instability, because steps to and fro cancel in it. The gradient's norm does
    (``Brake``). That the rate is so high that nothing is learned only shows in the loss, if it is known
    (``LossGuard``). If the step is not linear in the rate, as in dual averaging, a change of the rate also changes what
    former steps have done. Nothing is forgotten then, and ``log α`` changes by 0.02 per step at most.

    Later steps are not all looked at (``Brake.stride``). A look that stands for ``k`` steps counts as ``k``:
    ``log α`` changes by ``k`` times as much, and memories forget as much as in ``k`` steps.

    Source: this project. The constants come from experiments on small networks (``tests/benchmarks``). What is kept are
    four numbers for each coordinate of the probe: ``E``, ``Ē``, the last gradient and the last parameters. They have
    the precision of the parameters, float32 at least.

    Args:
        start: ``"automatic"``: the rule picks the first rate. ``"configured"``: it starts from the rate that the
            optimizer is configured with.

    Attributes:
        backoffs: How often the rule has backed off from a leap of the gradient's norm or a rise of the loss.

    Raises:
        ValueError: ``start`` is none of the two.
    """

    start: Literal["automatic", "configured"] = "automatic"

    long_horizon = True

    def __post_init__(self) -> None:
        if not isinstance(self.start, str) or self.start not in ("automatic", "configured"):
            raise ValueError(f"start must be 'automatic' or 'configured', got {self.start!r}")
        self.picks_start = self.start == "automatic"
        self.backoffs = 0
        self._normalized = True
        self._own, self._greedy, self._brake, self._guard = _Learned(), Greedy(), Brake(), LossGuard()
        self._climb, self._fits = Climb(), LossGuard(whole=True)
        self._slope = 0.0  # g_t · (θ_t - θ_{t-1}), from update to watch

    def bind(self, normalized: bool) -> "Auto":
        """A copy for one scope. Steps that follow the gradient, as those of SGD, are braked by all of its leap."""
        bound = copy.deepcopy(self)
        bound._normalized = normalized
        return bound

    def first_lr(self, param_norm: float, direction_norm: float) -> float:
        """``α_1 = 10^-4 ‖θ_1‖ / ‖d_1‖``, with the parameters before the first step; a norm of 0 counts as 1."""
        own = self._own
        own.lr = self._climb.begin(param_norm, direction_norm)
        own.gap = own.moves = 0.0
        return own.lr

    def smoothing(self, context: Context) -> float:
        """``1 / W_t``: a twentieth of the cooldown that is still to come, and at most a fifth of the steps taken."""
        window = max(1.0, min(_SMOOTHED * context.cooldown, _RECENT * context.step))
        return 1 - (1 - 1 / window) ** context.stride

    def discount(self, lr: float, context: Context) -> float:
        """``φ_t``, the part of ``E`` that is left when the next move is added, which is made at ``γ_t``."""
        own = self._own
        if own.fresh:
            own.fresh, own.lr, own.gap, own.moves = False, lr or own.lr, 0.0, 1.0
            return 0.0
        if lr > 0 and own.lr > 0:
            own.gap += math.log(lr / own.lr)
        own.lr = lr if lr > 0 else own.lr  # at a rate of 0 nothing moves
        kept = (1 - 1 / max(_HORIZON, _GROWTH * context.step)) ** context.stride
        kept *= math.exp(-max(abs(own.gap) - _REACH, 0.0))
        if context.nonlinear:
            kept = 1.0
        before, own.moves = kept * own.moves, kept * own.moves + context.stride
        own.gap *= before / own.moves
        return kept

    def stride(self, step: int, calm: int) -> int:
        """How far apart looks may be: one step while the rate is high because gradients have shrunk."""
        shrunk = self._own.norm < _SHRUNK * self._own.largest_norm
        return 1 if shrunk else self._brake.stride(step, calm)

    def update(self, lr: float, seen: Observation, context: Context) -> float:
        """``α_t`` from ``α_{t-1}`` and what the step shows. A zero gradient changes nothing."""
        own, climb, self._slope = self._own, self._climb, seen.slope
        if seen.grad_norm == 0 or lr <= 0:
            return lr
        resolved = _RESOLVED * context.rounding * own.largest_norm
        if seen.direction_norm == 0:
            highest = max(lr, climb.limit(seen, self._normalized))
            return min(lr * math.exp(CAP), highest) if seen.grad_norm >= resolved else lr
        change = self._change(seen, context)
        shown = seen.grad_norm, math.log(lr), seen.move_norm
        fall = self._brake.see(*shown, normalized=self._normalized, stride=context.stride)
        if fall is not None:
            self.backoffs += 1
            return max(lr * math.exp(-fall), min(lr, climb.first_lr))
        climb.see(lr, seen)
        own.largest_norm = max(own.largest_norm, seen.grad_norm)
        if min(own.norm / math.sqrt(own.norm_weight), seen.grad_norm) < resolved:
            return max(lr * math.exp(-_SETTLING * context.stride), min(lr, climb.first_lr or lr))
        cap, sigmas, grown = climb.cap(context), self._greedy.sigmas, self._brake.has_grown
        highest = climb.limit(seen, self._normalized)
        back = sigmas > _SURE and lr < climb.peak and math.log(lr) < self._brake.limit
        if back or own.turn > _STRAIGHT:
            cap = max(cap, _FAST)
        if back:
            if self._brake.left < _QUIET:
                change = max(change, _FAST * min(1.0, (sigmas - _SURE) / _RAMP))
            for guard in (self._guard, self._fits):
                guard.lift(math.log(lr))
        change = min(change, (math.log(highest) - math.log(lr)) / context.stride)
        return lr * math.exp(context.stride * self._clip(change, cap, lr, grown, context))

    def watch(self, lr: float, loss: float, context: Context) -> float:
        """``α_t``, lowered if the loss has risen; raised if that has not helped."""
        if lr <= 0:
            return lr
        before = math.log(lr)
        after = self._guard.limit(before, loss, self._slope, context)
        after = self._fits.limit(after, loss, self._slope, context)
        for guard in (self._guard, self._fits):
            self._own.fresh |= guard.cut
            self.backoffs += guard.cut and guard.tries
        return lr if after == before else math.exp(min(after, _LARGEST_LOG))

    def used(self, lr: float, context: Context) -> float:
        """``α_t``, lowered by what is left of the last brakes."""
        return lr * math.exp(-self._brake.left)

    def _clip(self, change: float, cap: float, lr: float, grown: bool, context: Context) -> float:
        """The change of ``log α`` per step, within the cap. What has fallen beyond the cap may rise beyond it again."""
        own, stride = self._own, context.stride
        lowest, highest = -cap, cap
        if grown:
            lowest = min(lowest, -_FAST)
        if math.log(lr) < self._brake.limit:
            highest = max(cap, min(_FAST, own.fallen / stride))
        if context.nonlinear:
            lowest, highest = max(lowest, -_NONLINEAR_CAP), min(highest, _NONLINEAR_CAP)
        change = min(max(change, lowest), highest)
        own.fallen += stride * (max(-cap - change, 0.0) - max(change - cap, 0.0))
        return change

    def _change(self, seen: Observation, context: Context) -> float:
        """The change of ``log α`` that the gradient asks for, before it is clipped."""
        own, step, stride = self._own, context.step, context.stride
        memory = (1 - 1 / max(_NORMS, _NORMS_GROWTH * step)) ** stride
        own.norm = math.hypot(math.sqrt(memory) * own.norm, math.sqrt(1 - memory) * seen.grad_norm)
        own.norm_weight = memory * own.norm_weight + 1 - memory
        cosine = -self._derivative(seen, context) / (own.norm * seen.direction_norm) * math.sqrt(own.norm_weight)
        bent = cosine + _OPTIMISM * min(1.0, EARLY / step) * abs(cosine + own.cosine) / 2
        own.cosine = cosine
        own.squares *= (1 - 1 / _SQUARES) ** stride
        own.squares += (stride * bent) ** 2
        pace = _HORIZON / max(_HORIZON, _GROWTH * step)
        change = pace * bent / math.sqrt(own.squares) if own.squares else 0.0
        part = min(1.0, own.moves / _ENOUGH) if own.anew else 1.0
        own.anew = part < 1
        return max(change, part * change)

    def _derivative(self, seen: Observation, context: Context) -> float:
        """``h_t``: past the noise, believed where gradients turn round, and bounded by the greedy derivative."""
        own = self._own
        own.turns = min(own.turns + context.stride, _TURNS)
        own.turn += (seen.turn - own.turn) * context.stride / own.turns
        late = seen.late + self.smoothing(context) * (seen.hypergradient - seen.late)
        if seen.move_norm:
            self._greedy.see(-seen.slope / (seen.grad_norm * seen.move_norm), context)
        part = min(max((-own.turn - _TURNING) / (_TURNED - _TURNING), 0.0), 1.0)
        derivative = late + part * (seen.hypergradient - late)
        straight = own.turn > _STRAIGHT or self._greedy.sigmas > _SURE
        return min(derivative, 0.0) if straight else derivative

    def begin(self, event: Event) -> None:
        """Forget what the last steps have shown. What a new model or new data made worse is not the rate's fault.

        Whole fits can be compared, so the losses of former fits stay known.
        """
        own, brake = self._own, self._brake
        if event == "replaced":
            own.fresh = own.anew = True
        own.turns, own.cosine, own.norm, own.norm_weight, own.turn = 0, 0.0, 0.0, 0.0, 0.0
        self._greedy, self._guard = Greedy(), LossGuard()
        self._fits.over |= event == "fit"
        self._brake = Brake(variance=brake.variance, limit=brake.limit)

    def check_start(self, lr: float) -> None:
        """Raise ``ValueError`` for a configured rate of 0, because a product never leaves it."""
        if lr == 0:
            raise ValueError(
                "rule 'auto' with start='configured' cannot leave a learning rate of 0: configure a positive lr in the "
                "optimizer, or use start='automatic'"
            )

    def state_dict(self) -> dict[str, Any]:
        """What the rule has learned, as plain numbers."""
        return {"backoffs": self.backoffs, **{name: dict(vars(part)) for name, part in self._parts().items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned.

        Raises:
            KeyError, TypeError, ValueError: The state is damaged.
        """
        backoffs = check_count("backoffs", state_dict["backoffs"])
        parts = {name: check_fields(type(part), state_dict[name], f"{name}.") for name, part in self._parts().items()}
        vars(self).update({f"_{name}": part for name, part in parts.items()}, backoffs=backoffs)

    def _parts(self) -> dict[str, Any]:
        """The parts that hold numbers, by their names."""
        return {name: getattr(self, f"_{name}") for name in ("own", "climb", "greedy", "brake", "guard", "fits")}
