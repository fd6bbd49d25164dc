"""One step of a tuned optimizer, from top to bottom: sync, look, decide, set, remember."""

import math
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch.optim import Optimizer

from lightning_hd.engine.cooldown import Cooldown
from lightning_hd.engine.decision import Before, Look, Step
from lightning_hd.engine.first_rate import FirstRates
from lightning_hd.engine.linearity import Linearity
from lightning_hd.engine.looks import Looks, check_loss
from lightning_hd.engine.precheck import check, is_dry
from lightning_hd.engine.rates import Rates, waits
from lightning_hd.engine.scopes import Scope
from lightning_hd.engine.writes import Writes
from lightning_hd.hypergradient import UNSEEN, Sight, View
from lightning_hd.optimizers import give_back, parameters_of, put_back, set_lr
from lightning_hd.processes import Notices, Ranks
from lightning_hd.rules import Observation, Rule

_ANCHORS = ("reference", "lr", "used", "from_zero")
"""What of a scope a schedule may change in a step."""

_IDLE = 20
"""After so many first steps without a trace in the parameters, there is a warning."""


@dataclass(eq=False)
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

    optimizer: Optimizer
    rule: Rule
    rates: Rates
    view: View
    ranks: Ranks
    notices: Notices
    cooldown: Cooldown
    stop_after: int | None
    seconds: float = 0.0  # the time that tuning has taken
    paused: bool = False
    aside: bool = False  # whether steps are left as they are, with the rates in the groups
    step_count: int = 0
    nonfinite_steps: int = 0
    loss: float | None = None  # the loss of the last step, if it is known
    lost_schedule: bool = False  # whether there is a schedule, but there was none in the state that was loaded
    _checked: bool = False  # whether the checks before the first step were passed
    _dry: bool = False
    _step: Step | None = None
    _last: Step | None = None  # the last step, if nothing new was known in it
    _passed: tuple[list[float], list[float]] | None = None  # rates during and before a step that is not tuned

    def __post_init__(self) -> None:
        self.looks = Looks(self.optimizer, self.rates, self.view, self.ranks)
        self.linearity = Linearity(self.optimizer, self.ranks, self.notices, self.rule.long_horizon)
        self._first_rates = FirstRates(self.optimizer, self.rates, self.ranks, self.rule.long_horizon)
        self.writes = Writes(self.notices)

    # ------------------------------------------------------------------ called by the optimizer's hooks

    def begin(self) -> bool:
        """Begin a step; the one before may not have ended. Return whether to tune it."""
        if self._step is not None or self._passed is not None:
            self.abandon()
        self._dry = False
        rests = self.paused or self.aside
        if rests:
            self.view.pause()
            self.looks.pause()
        if rests and not self.aside:
            self._keep_scales()
        return not rests

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's
    @torch.no_grad()
    def prepare(self) -> bool:
        """Set the rates of the update when the gradients are ready. Return whether they were set.

        If so, it is not called again where the optimizer evaluates its closure twice.
        """
        begin = perf_counter()
        try:
            return self._prepare()
        except BaseException:
            self.abandon()
            raise
        finally:
            self.seconds += perf_counter() - begin

    def _prepare(self) -> bool:
        """Set the rates; ``False`` if the step does not count."""
        fresh = not self.step_count
        self._dry = bool(fresh or not self.optimizer.state) and is_dry(self.optimizer, self.ranks, fresh)
        if self._dry:
            return False
        if not self._checked:
            own = {"total_steps": self.cooldown.total, "cooldown": self.cooldown.part, "stop_after": self.stop_after}
            others = {"step_count": self.step_count, **own}
            check(self.rates, self.rule, self.view, self.ranks, self.notices.name, others)
            if fresh:
                self.view.start()
            self._checked = True
        self.sync()
        look = self.looks.look(self.step_count + 1, parameters_of(self.optimizer))
        if look is None:
            return False
        repeated = self._repeated(look)
        step = self._step = repeated or self._new_step(look)
        if repeated is None:
            self._decide(step)
        self.view.prepare(step.lrs, step.weights)
        return True

    def hear(self, returned: Any) -> None:
        """Take in what a closure has returned, if it is a loss and none is reported. ``prepare`` comes next."""
        losses = self.looks.losses
        losses.returned = []
        if not losses.reported:
            with suppress(TypeError):
                losses.returned.append(check_loss(returned))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def finish(self) -> None:
        """Finish a step, after the parameters have moved. It is not called if a GradScaler skips it or it raises."""
        begin = perf_counter()
        if self._passed is not None:
            give_back(self.optimizer, *self._passed)
            self._passed = None
        elif self._step is not None:
            self._remember(self._step)
            look = self._step.look
            self._last = None if look.taken or look.seen or self._step.trial else self._step
            self._step = None
        elif self._dry:
            self.view.make_room()
        if self._dry:
            self.looks.pause()  # the parameters may be loaded next
        elif self.rule.long_horizon:
            self.looks.leave()
        self.seconds += perf_counter() - begin

    def pass_by(self) -> None:
        """Let a step that cannot be tuned use the rate of the last one, or what a schedule makes of it.

        It moves the parameters before it evaluates its closure.
        """
        self.view.pause()
        self._keep_scales()
        self.notices.warn(
            "early move",
            f"step {self.step_count + 1} moves the parameters before it evaluates its closure, as sharpness-aware "
            "optimizers do. Such steps are not tuned: they use the present rate",
        )

    def _keep_scales(self) -> None:
        """Let a step that is not tuned use what a schedule makes of the rate of the last one."""
        if self.rates.under_schedule:
            self.rates.sync()
            lrs = [lr for lr, _ in self.rates.effective([scope.used for scope in self.rates.scopes])]
            during = [set_lr(group, lr) for group, lr in zip(self.optimizer.param_groups, lrs, strict=True)]
            self._passed = during, list(self.rates.held)

    @property
    def holds(self) -> bool:
        """Whether a step that is not tuned has rates that must be given back when it ends."""
        return self._passed is not None

    @property
    def before(self) -> Before:
        """What holds without a step that runs."""
        if self._passed is not None:
            return Before(*self._passed)
        step = self._step
        return Before() if step is None else Before(step.lrs, step.held, step.rules, step.anchors)

    def abandon(self) -> None:
        """Forget a step that began but raised an error. The rate stays as it was."""
        step, self._step = self._step, None
        if self._passed is not None:
            put_back(self.optimizer, *self._passed)
            self._passed = None
        if step is None:
            return
        self.view.abandon()
        for scope, rule in zip(self.rates.scopes, step.rules, strict=False):
            scope.rule.load_state_dict(rule)
        for scope, anchors in zip(self.rates.scopes, step.anchors, strict=False):
            vars(scope).update(anchors)
        if not put_back(self.optimizer, step.lrs, step.held) and self.rates.under_schedule:
            self.notices.warn(
                "schedule",
                "a step raised an error, and the scheduler went on from the rate of that step. From here on its values "
                "may be off",
            )

    # ------------------------------------------------------------------ before the update

    def _repeated(self, look: Look) -> Step | None:
        """The last step once more, if nothing is new and its rates stay; otherwise ``None``."""
        step, rates, number = self._last, self.rates, self.step_count + 1
        if step is None or look.taken or look.seen is not None:
            return None
        held = not rates.under_schedule and rates.held == step.lrs
        learned = [(decision.lr, decision.used) for decision in step.decisions]
        same = held and step.stopped == self._stopped and learned == [(scope.lr, scope.used) for scope in rates.scopes]
        if not same or min(step.factor, self.cooldown.factor(number)) < 1:
            return None
        step.number, step.held = number, step.lrs
        return step

    def _decide(self, step: Step) -> None:
        """Take in what is new, and set the rates."""
        if self.rates.under_schedule:
            step.anchors = [{name: getattr(scope, name) for name in _ANCHORS} for scope in self.rates.scopes]
        for i, sight in enumerate(step.sights):
            if sight.joined:
                self._restart(i)
            elif self.rates.scopes[i].tuned and sight.lost:
                self.rates.scopes[i].rule.begin("replaced")
        if self.linearity.due and self.step_count >= self.linearity.due[0]:
            self.linearity.test(self.step_count, [group.lr for group in self.rates.groups])
        step.seen = [self._take_in(scope, sight) for scope, sight in zip(self.rates.scopes, step.sights, strict=True)]
        self.rates.decide(step)
        if not self.rule.long_horizon or any(map(waits, self.rates.scopes)):
            self._first_rates.prepare(step)
        if step.look.taken:
            self.rates.retain(step)
        self.rates.apply(step)

    def sync(self) -> None:
        """Take over changes of the rates and groups since the last step."""
        before = [group.lr for group in self.rates.groups]
        self.rates.sync()
        held = self.rates.held[: len(before)]
        if self.step_count and not self.rates.under_schedule and held != before:
            self.looks.report()
            self.writes.see()
        if self.lost_schedule and self.rates.under_schedule:
            self.notices.warn(
                "new schedule",
                "the saved state is of a training without a scheduler: the learned scale starts anew from the "
                "scheduled rate",
            )
        self.lost_schedule = False

    def _restart(self, index: int) -> None:
        """Let a scope pick its first rate again, because many parameters are new."""
        scope = self.rates.scopes[index]
        if scope.tuned and scope.rule.picks_start and not self.rates.handed_over:
            self.rates.restart(index, self.step_count)
            self.view.forget(index)
            self.looks.wake()
            self.notices.log(
                f"step {self.step_count + 1}: new parameters have gradients, so the learning rate starts anew"
            )

    @property
    def _stopped(self) -> bool:
        return self.rates.handed_over or (self.stop_after is not None and self.step_count >= self.stop_after)

    def _new_step(self, look: Look) -> Step:
        sights, loss = look.seen or ([UNSEEN] * len(self.rates.scopes), None)
        number, cooldown, factor = self.step_count + 1, 0.0, 1.0
        planned = self.cooldown.total if self.cooldown.part or self.rates.under_schedule else None
        total = math.inf if planned is None else planned
        if self.rates.under_schedule:  # it falls by itself, until the end
            cooldown = self.cooldown.rest(number)
        elif self.cooldown.total is not None:
            cooldown, factor = self.cooldown.left(number), self.cooldown.factor(number)
            if self.cooldown.is_over(number):
                self.notices.warn(
                    "longer",
                    f"training goes on after the {self.cooldown.total} steps that it was to take. It keeps the rate of "
                    "the last one",
                )
        held, nonlinear = list(self.rates.held), self.linearity.failed
        return Step(number, look, sights, loss, total, cooldown, factor, self._stopped, nonlinear, held)

    def _take_in(self, scope: Scope, sight: Sight) -> Observation | None:
        """What a scope learns from; ``None`` if there was no step before, or it was undone."""
        if waits(scope) and scope.vanished == _IDLE:
            self._warn_of_no_trace()
        if not sight.known or waits(scope):
            return None
        if sight.vanished and (scope.last is None or scope.last.grad_norm > 0):
            if scope.used == 0:
                scope.vanished += 1
            else:
                self._warn_of_no_trace()
        return sight.observation if sight.observation.direction_norm or scope.moved else None

    def _warn_of_no_trace(self) -> None:
        self.notices.warn(
            "vanished step",
            "the last step left no trace in the parameters, so its direction is unknown and the learning rate stays as "
            "it is. Either the optimizer does not move in its first steps (tuning begins once it does), or the rate is "
            "too small for the precision of the parameters",
        )

    # ------------------------------------------------------------------ after the update

    def _remember(self, step: Step) -> None:
        """Take over the rates, and what the view has kept, after the parameters have moved."""
        if step.left_out:
            step.take_up_gradients()
        if step.trial:
            try:
                self._first_rates.measure(step)
            except BaseException:
                for p, before in step.before.items():
                    p.copy_(before)
                self.abandon()
                raise
        if step.look.taken:
            self.view.remember(step.retained)
        else:
            self.view.pass_over()
        if step.trial:
            self._first_rates.put_right(step)
        self.rates.remember(step)
        if self.rates.under_schedule:
            give_back(self.optimizer, step.lrs, step.held)
        self.nonfinite_steps += not step.finite
        self.loss = step.loss if step.look.seen else self.loss
        self.looks.finish()
        if not step.finite:
            self.looks.wake()
        self.step_count += 1
