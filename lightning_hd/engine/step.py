"""One step of a tuned optimizer, from top to bottom: gather, sum, reduce, decide, set, remember."""

import math
from collections.abc import Sequence

import torch
from torch.optim import Optimizer

from lightning_hd.engine.cooldown import Cooldown
from lightning_hd.engine.linearity import Linearity
from lightning_hd.engine.loss import Losses
from lightning_hd.engine.lr import LARGEST, set_lr
from lightning_hd.engine.moment import Step
from lightning_hd.engine.rates import Rates
from lightning_hd.engine.scopes import Scope
from lightning_hd.engine.start import Start
from lightning_hd.engine.takeoff import TakeOff
from lightning_hd.engine.watch import Watch
from lightning_hd.engine.writes import Writes
from lightning_hd.hypergradient.view import Kept, View
from lightning_hd.notices import Notices
from lightning_hd.optimizers import follow_rate
from lightning_hd.processes import Ranks
from lightning_hd.rules import Observation, Rule, returned


class Tuning:
    """The steps of one optimizer.

    Args:
        optimizer: The optimizer.
        rule: The rule. Each scope has a copy.
        rates: The rates of its groups and scopes.
        view: The view of the model that the rule needs.
        ranks: The processes that train together.
        notices: Where warnings and log messages go.
        cooldown: The cooldown of the rates at the end.
        stop_after: The number of steps after which the learned scale stays as it is; ``None``: never.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        rule: Rule,
        rates: Rates,
        view: View,
        ranks: Ranks,
        notices: Notices,
        cooldown: Cooldown,
        stop_after: int | None,
    ) -> None:
        self.optimizer = optimizer
        self.rule = rule
        self.rates = rates
        self.view = view
        self.ranks = ranks
        self.notices = notices
        self.cooldown = cooldown
        self.stop_after = math.inf if stop_after is None else stop_after
        self.losses = Losses()
        self.start = Start(optimizer, ranks)
        self.linearity = Linearity(optimizer, rates, ranks, notices, rule.long_horizon)
        self.takeoff = TakeOff(optimizer, rates, self.start, rule.long_horizon, self._stay)
        self.watch = Watch(optimizer, notices)
        self.writes = Writes(notices)
        self.paused = False
        self.step_count = 0
        self.nonfinite_steps = 0
        self.loss: float | None = None  # the loss of the last step, if it is known
        self.lost_schedule = False  # whether there is a schedule, but there was none in the state that was loaded
        self._checked = False  # whether the checks before the first step were passed
        self._dry = False
        self._step: Step | None = None
        self._passed: tuple[list[float], list[float]] | None = None  # rates before and during a step that is not tuned

    # ------------------------------------------------------------------ called by the optimizer's hooks

    def begin(self) -> bool:
        """Begin a step. Return whether to tune it."""
        self.watch.end()
        self.abandon()
        self._dry = False
        if self.paused:
            self.view.pause()
        return not self.paused

    @torch.no_grad()
    def prepare(self) -> bool:
        """Set the rates of the update when the gradients are ready. Return whether they were set."""
        self._dry = self.start.is_dry(fresh=not self.step_count)
        if self._dry:
            return False
        if not self._checked:
            self._check()
        try:
            return self._tune()
        except BaseException:
            self.abandon()
            raise

    @torch.no_grad()
    def finish(self) -> None:
        """Finish a step, after the parameters have moved."""
        if self._passed is not None:
            self.rates.give_back(*self._passed)
            self._passed = None
        elif self._step is not None:
            self._remember(self._step)
            self._step = None
        elif self._dry:
            self.view.make_room()

    def pass_by(self) -> None:
        """Let a step that cannot be tuned use the rate of the last one, or what a schedule makes of it."""
        self.view.pause()
        if self.rates.under_schedule:
            self.rates.sync()
            lrs = [lr for lr, _ in self.rates.effective([scope.used for scope in self.rates.scopes])]
            held = [set_lr(settings, lr) for settings, lr in zip(self.optimizer.param_groups, lrs, strict=True)]
            self._passed = list(self.rates.held), held
        self.notices.warn(
            "early move",
            f"step {self.step_count + 1} moves the parameters before it evaluates its closure, as sharpness-aware "
            "optimizers do. Such steps are not tuned: they use the present rate",
        )

    def abandon(self) -> None:
        """Forget a step that began but raised an error. The rate stays as it was."""
        step, self._step = self._step, None
        if self._passed is not None:
            self.rates.put_back(*self._passed)
            self._passed = None
        if step is None:
            return
        self.view.abandon()
        for scope, rule in zip(self.rates.scopes, step.rules, strict=True):
            scope.rule.load_state_dict(rule)
        if not self.rates.put_back(step.restore, step.lrs) and self.rates.under_schedule:
            self.notices.warn(
                "schedule",
                "a step raised an error, and the scheduler went on from the rate of that step. From here on its values "
                "may be off",
            )

    # ------------------------------------------------------------------ before the update

    def _check(self) -> None:
        """Check before the first step what would fail later, with a clear error."""
        self.start.check(self.rates, self.rule, self.step_count)
        if not self.step_count:
            self.view.start()
        self._checked = True

    def _tune(self) -> bool:
        """Set the rates; ``False`` if no rank has a gradient, or a GradScaler makes the optimizer skip the step."""
        groups = self.optimizer.param_groups
        parameters = [p for settings in groups for p in settings["params"]]
        if not parameters or (self.ranks.count == 1 and all(p.grad is None for p in parameters)):
            return False
        self._sync()
        sums, loss = self._sum()
        if not any(has_gradient for *_, has_gradient, _, _ in sums):
            return False
        for i, (*_, joined) in enumerate(sums):
            # parameters that are new on a few processes may only have had no gradient there before
            if joined > self.ranks.count / 2 and self.rates.scopes[i].started and self.rates.scopes[i].rule.picks_start:
                self.rates.restart(i, self.step_count)
                self.view.forget(i)
                self.notices.log(
                    f"step {self.step_count + 1}: new parameters have gradients, so the learning rate starts anew"
                )
        if self.linearity.fails(self.step_count):
            for scope in self.rates.scopes:
                scope.rule.nonlinear = True
        rules = [scope.rule.state_dict() for scope in self.rates.scopes]
        step = self._step = Step(rules, restore=list(self.rates.held), loss=loss)
        for i, found in enumerate(sums):
            step.has_gradient.append(bool(found[-3]))
            step.seen.append(self._see(i, found))
            step.rates.append(self._decide(step, i))
        if self.rates.under_schedule and all(scope.from_zero for scope in self.rates.scopes):
            self.notices.warn(
                "zero schedule",
                "the scheduled learning rate is 0, and no scale changes that. Nothing is learned unless it rises",
            )
        self.takeoff.prepare(step)
        step.kept = [self._discount(step, i) for i in range(len(sums))]
        for i, (lr, weight) in enumerate(self.rates.effective(step.used, step.begun)):
            step.lrs.append(set_lr(groups[i], step.trial.get(i, lr)))
            step.weights.append(weight)
            if step.lrs[i] != step.restore[i]:
                follow_rate(self.optimizer, groups[i], step.lrs[i])
            self.view.keep(i, step.lrs[i], weight)
        return True

    def _sync(self) -> None:
        """Take over changes of the rates and groups since the last step, and of what is left of the cooldown."""
        before = [group.lr for group in self.rates.groups]
        self.rates.sync()
        if self.rule.long_horizon:
            left = 0.0 if self.rates.under_schedule else self.cooldown.left(self.step_count + 1)
            for scope in self.rates.scopes:
                scope.rule.cooldown_left = left
        if self.step_count and not self.rates.under_schedule:
            self.writes.see(before, self.rates.held)
        if self.lost_schedule and self.rates.under_schedule:
            self.notices.warn(
                "new schedule",
                "the saved state is of a training without a scheduler: the learned scale starts anew from the "
                "scheduled rate",
            )
        self.lost_schedule = False

    def _sum(self) -> tuple[list[list[float]], float | None]:
        """The observed sums of each scope and the loss, by one collective and one host read.

        There are no sums if the step is skipped.
        """
        scopes = [group.scope for group in self.rates.groups]
        grad_scale = getattr(self.optimizer, "grad_scale", None)
        losses = None
        for wide in (False, True):
            try:
                sums = self.view.observe(scopes, grad_scale, wide)
            except RuntimeError:
                self.start.check_gradients()
                raise
            # A fused optimizer under a GradScaler unscales inside its step, and skips the step if it finds an inf. The
            # scaler reports both by these two attributes, which exist during the step only.
            found_inf = getattr(self.optimizer, "found_inf", None)
            skips = sums.new_zeros(1) if found_inf is None else found_inf.to(sums).view(1)
            losses = self.losses.take(sums) if losses is None else losses
            *numbers, skipped, loss, known = self.ranks.sum(torch.cat([sums.flatten(), skips, losses])).tolist()
            if skipped:
                return [], None
            table = [numbers[i : i + sums.shape[1]] for i in range(0, len(numbers), sums.shape[1])]
            if not self.view.is_doubtful(table):
                break
        return table, loss / known if known and math.isfinite(loss) else None

    def _see(self, index: int, found: Sequence[float]) -> Observation | None:
        """What a step shows of a scope; ``None`` if there was no step before, or it was undone."""
        scope = self.rates.scopes[index]
        *sums, _, known, _ = found
        derivative, g_squared, d_squared = sums[:3]
        if not known or scope.waits:
            return None
        measured = any(self.view.measured(i) for i in self.rates.members(index))
        if measured and d_squared == 0 < g_squared and (scope.last is None or scope.last.grad_norm > 0):
            if scope.used == 0:
                scope.vanished += 1
            else:
                self.notices.warn(
                    "vanished step",
                    "the last step left no trace in the parameters, so its direction is unknown and the learning rate "
                    "stays as it is. Either the optimizer does not move in its first steps (tuning begins once it "
                    "does), or the rate is too small for the precision of the parameters",
                )
        if d_squared == 0 and not scope.moved:
            return None
        further = self.view.further(sums)
        return Observation(derivative, math.sqrt(g_squared), math.sqrt(d_squared), **further)

    def _decide(self, step: Step, index: int) -> tuple[float, float]:
        """``α_t`` and ``γ_t`` of a scope. If a number is not finite, they are the last ones."""
        scope, seen, number = self.rates.scopes[index], step.seen[index], self.step_count + 1
        lr, backoffs, time = scope.lr, scope.rule.backoffs, number - scope.since
        factor = self._factor()
        leapt, finite = False, seen is None or all(map(math.isfinite, seen))
        stopped = self.step_count >= self.stop_after and scope.started
        if seen is not None and finite and not stopped:
            lr = returned(scope.rule.update(lr, seen, time), scope.rule, "update")
            leapt = scope.rule.backoffs > backoffs
            if scope.rule.long_horizon:
                lr = scope.at_peak(lr, self.rates.scheduled_part(index))
                lr = min(lr, scope.lr) if factor < 1 else lr  # old moves at higher rates would ask for them
            if step.loss is not None and math.isfinite(lr):
                lr = returned(scope.rule.watch(lr, step.loss, time), scope.rule, "watch")
        lr *= self.rates.follow_schedule(index)
        if not finite:
            return self._stay(step, scope, f"one of (hypergradient, ‖g‖, ‖d‖) = {tuple(seen or ())}")
        if abs(lr) <= LARGEST:
            lr = self.rates.clamp(index, lr)
            used = lr if stopped else returned(scope.rule.used(lr, time), scope.rule, "used")
            used *= factor
            if abs(used) <= LARGEST:
                if seen is not None and scope.rule.backoffs > backoffs:
                    why = f"the gradient's norm leapt to {seen.grad_norm:.3g}" if leapt else "the loss has risen"
                    self.notices.log(f"step {number}: {why}; the rate backs off from {scope.used:.3g} to {used:.3g}")
                return lr, used
        return self._stay(step, scope, f"the rate that {type(scope.rule).__name__} made of {seen}")

    def _factor(self) -> float:
        """The factor of the rates in the cooldown. There is no cooldown under a schedule."""
        if self.rates.under_schedule:
            return 1.0
        if self.cooldown.is_over(self.step_count + 1):
            self.notices.warn(
                "longer",
                f"training goes on after the {self.cooldown.total} steps that it was to take. It keeps the rate of the "
                "last one",
            )
        return self.cooldown.factor(self.step_count + 1)

    def _stay(self, step: Step, scope: Scope, what: str) -> tuple[float, float]:
        step.finite = False
        self.notices.warn(
            "not finite",
            f"step {self.step_count + 1}: {what} is not a finite number; the learning rate stays at {scope.used:g}. "
            "Further such steps are counted in stats.nonfinite_steps",
        )
        return scope.lr, scope.used

    def _discount(self, step: Step, index: int) -> Kept | None:
        """What is kept of the moves of a scope, for a rule with a long horizon."""
        rule, seen = self.rates.scopes[index].rule, step.seen[index]
        if not self.rule.long_horizon or (seen is not None and not all(map(math.isfinite, seen))):
            return None
        lr = step.rates[index][0] * self._factor()
        time = self.step_count + 1 - self.rates.scopes[index].since
        moves = returned(rule.discount(lr, time), rule, "discount")
        return Kept(moves, returned(rule.smoothing(time), rule, "smoothing"))

    # ------------------------------------------------------------------ after the update

    def _remember(self, step: Step) -> None:
        """Take over the rates, and what the view has kept, after the parameters have moved."""
        try:
            self.takeoff.measure(step)
        except BaseException:
            for p, before in step.before.items():
                p.copy_(before)
            self.abandon()
            raise
        self.view.remember(step.kept)
        if step.trial:
            self.takeoff.put_right(step)
        for group, lr in zip(self.rates.groups, step.lrs, strict=True):
            group.lr = lr
        for i, scope in enumerate(self.rates.scopes):
            (scope.lr, scope.used), scope.last = step.rates[i], step.seen[i]
            moves = step.has_gradient[i] and any(step.weights[j] for j in self.rates.members(i))
            scope.started |= moves and (i in step.begun or not scope.waits)
            scope.moved = scope.started and moves and any(step.lrs[j] for j in self.rates.members(i))
            scope.mark(self.rates.scheduled_part(i))
        if self.rates.under_schedule:
            self.rates.give_back(step.restore, step.lrs)
        self.nonfinite_steps += not step.finite
        self.loss = step.loss
        self.step_count += 1
