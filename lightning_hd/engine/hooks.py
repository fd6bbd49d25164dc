"""Step hooks: they call back in every step of an optimizer, when its gradients are ready and when parameters moved."""

import inspect
import weakref
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_hd.engine.looks import versions
from lightning_hd.engine.step import Tuning
from lightning_hd.optimizers import get_lrs, like, parameters_of
from lightning_hd.processes import Notices, is_flat_shard

_GRADIENTS, _PASSES = 20, 1000
"""The warning that no step is seen comes after so many gradients, each a new tensor, or so many backward passes.
Gradients are seldom accumulated for so long."""

_attached: "weakref.WeakSet[Optimizer]" = weakref.WeakSet()


def check_not_tuned(optimizer: Optimizer) -> None:
    """Raise ``RuntimeError`` if an optimizer has such hooks already."""
    if optimizer in _attached:
        raise RuntimeError(
            f"this {type(optimizer).__name__} is tuned by a HypergradientLR (or a HypergradientDescent callback) "
            "already: use one, or detach() the first"
        )


class StepHooks:
    """Calls back around every step of an optimizer.

    The gradients may be ready before the step, or a closure may compute them in it. A step that calls the step of its
    parent class runs the hooks twice, and counts as one. The frame that has called the outer one tells them apart.

    Args:
        optimizer: The optimizer.
        tuning: What is called back.
        notices: Where a warning goes if gradients come and go, but no step is seen; ``None``: this is not watched.

    Attributes:
        proven: Whether a step has ended. From then on an early move is passed by, not refused.

    """

    def __init__(self, optimizer: Optimizer, tuning: Tuning, notices: Notices | None) -> None:
        self._optimizer = optimizer
        self._tuning = tuning
        self.proven = False
        self._watch = _Watch(optimizer, notices) if notices is not None else None
        self._caller: FrameType | None = None  # the frame that has called the current step
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_post_hook(self._save),
        ]
        # This hook must run before those of others: one of them may step a scheduler, which must find its own values in
        # the groups. torch has no public way to register a step hook before others.
        optimizer._optimizer_step_post_hooks.move_to_end(self._handles[1].id, last=False)  # type: ignore[attr-defined]
        _attached.add(optimizer)

    def remove(self) -> None:
        """Remove the hooks from the optimizer."""
        for handle in self._handles:
            handle.remove()
        self._end_watch()
        self._caller = None
        _attached.discard(self._optimizer)

    def _end_watch(self) -> None:
        if self._watch is not None:
            self._watch.end()
            self._watch = None

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        caller = _calling_frame()
        if self._caller is not None and _is_within(caller, self._caller):
            return None  # the step of a subclass calls that of its parent class
        self._caller = None
        self._end_watch()
        if not self._tuning.begin():
            self._caller = caller if self._tuning.holds else None
            return None
        self._caller = caller
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if not callable(closure):
            try:
                self._tuning.prepare()
            except BaseException:
                self._caller = None  # the frame would keep the caller's variables alive
                raise
            return None
        if len(args) > 1:
            return (args[0], self._wrap(closure), *args[2:]), kwargs
        return args, {**kwargs, "closure": self._wrap(closure)}

    def _save(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Save the rates that the groups hold between steps, if it is done in a step, as by a handler of a signal."""
        before, groups = self._tuning.before, state_dict["param_groups"]
        lrs = before.lrs(get_lrs(groups))
        kept = [{**group, "lr": like(group["lr"], lr)} for group, lr in zip(groups, lrs, strict=True)]
        return {**state_dict, "param_groups": kept} if before.during else state_dict

    def _wrap(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """A closure that prepares the step when it has computed the gradients."""
        parameters, caller = [p for p in parameters_of(self._optimizer) if not is_lazy(p)], self._caller
        before = versions(parameters)
        originals = [] if self.proven else [p.detach().clone() for p in parameters]
        done = False

        def prepare_after_backward() -> Any:
            nonlocal done
            if done or self._caller is not caller:  # the step has failed, or the hooks were removed
                return closure()
            if versions(parameters) != before:
                if originals:
                    self._refuse(parameters, originals)
                done = True
                self._tuning.pass_by()
                return closure()
            try:
                loss = closure()
                if self._caller is caller:
                    self._tuning.hear(loss)
                    done = self._tuning.prepare()
            except BaseException:
                self._caller = None
                raise
            return loss

        return prepare_after_backward

    def _refuse(self, parameters: Sequence[Tensor], originals: Sequence[Tensor]) -> None:
        """Undo an early move, and raise ``TypeError``."""
        self._caller = None
        with torch.no_grad():
            for p, original in zip(parameters, originals, strict=True):
                p.copy_(original)
        raise TypeError(
            f"{type(self._optimizer).__name__} moves the parameters before it evaluates its closure. It is not "
            "supported, because such a step cannot be measured. Tune the optimizer inside of it, if it has one"
        )

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._caller is not None and _calling_frame() is self._caller:
            self._caller = None
            self.proven = True
            self._tuning.finish()


class _Watch:
    """Warns once if gradients come and go, but the optimizer is stepped in a way that no hook sees, or not at all."""

    def __init__(self, optimizer: Optimizer, notices: Notices) -> None:
        self._notices = notices
        self._gradients = 0
        self._passes = 0
        self._last: weakref.ref[Tensor] | None = None
        self._handle: RemovableHandle | None = None
        for p in parameters_of(optimizer):
            if self._handle is None and p.requires_grad and p.is_leaf and not is_flat_shard(p) and not is_lazy(p):
                self._handle = p.register_post_accumulate_grad_hook(self._count)  # type: ignore[no-untyped-call]

    def end(self) -> None:
        if self._handle is not None:
            self._handle.remove()

    def _count(self, p: Tensor) -> None:
        self._passes += 1
        if p.grad is not None and (self._last is None or self._last() is not p.grad):
            self._gradients += 1
            self._last = weakref.ref(p.grad)
        if self._gradients > _GRADIENTS or self._passes > _PASSES:
            self.end()
            self._notices.warn(
                "no step",
                "gradients came and went, but no step was seen. Call the `step` of this very optimizer. Until then its "
                "learning rate is not tuned",
            )


def _calling_frame() -> FrameType | None:
    """The frame that called the step hook from which this is called."""
    frame = inspect.currentframe()
    hook = frame.f_back if frame is not None else None
    return hook.f_back if hook is not None else None


def _is_within(frame: FrameType | None, outer: FrameType) -> bool:
    while frame is not None:
        if frame is outer:
            return True
        frame = frame.f_back
    return False
