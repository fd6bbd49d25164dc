"""StepHooks: calls back in every step of an optimizer, when its gradients are ready and when its parameters moved."""

import inspect
import weakref
from collections.abc import Callable
from time import perf_counter
from types import FrameType
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

_attached: "weakref.WeakSet[Optimizer]" = weakref.WeakSet()


class StepHooks:
    """Calls back around every step of an optimizer.

    The gradients may be ready before the step, or a closure may compute them in it. A step that calls the step of its
    parent class counts as one.

    Args:
        optimizer: The optimizer.
        begin: Called when a step begins. The step before may not have ended. It returns whether to tune this one.
        prepare: Called when the gradients are ready, before the parameters move. It returns whether it is done. If so,
            it is not called again where the optimizer evaluates its closure twice.
        hear: Called with the value that a closure returns, before ``prepare``.
        pass_by: Called for a step that cannot be tuned, because it moves the parameters before it evaluates its
            closure.
        finish: Called when the step is over. It is not called if a GradScaler skips the step or an exception ends it.

    Raises:
        RuntimeError: The optimizer has such hooks already.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        begin: Callable[[], bool],
        prepare: Callable[[], bool],
        hear: Callable[[Any], None],
        pass_by: Callable[[], None],
        finish: Callable[[], None],
    ) -> None:
        if optimizer in _attached:
            raise RuntimeError(
                f"this {type(optimizer).__name__} is tuned by a HypergradientLR (or a HypergradientDescent callback) "
                "already: use one, or detach() the first"
            )
        self._optimizer = optimizer
        self._begin = begin
        self._prepare = prepare
        self._hear = hear
        self._pass_by = pass_by
        self.seconds = 0.0  # the time that all calls have taken
        self.proven = False  # whether a step has ended: from then on an early move is passed by, not refused
        self._finish = finish
        self._caller: FrameType | None = None  # the frame that has called the current step
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        # This hook must run before those of others: one of them may step a scheduler, which must find its own values in
        # the groups. torch has no public way to register a step hook before others.
        optimizer._optimizer_step_post_hooks.move_to_end(self._handles[1].id, last=False)  # type: ignore[attr-defined]
        _attached.add(optimizer)

    def remove(self) -> None:
        """Remove the hooks from the optimizer."""
        for handle in self._handles:
            handle.remove()
        self._caller = None
        _attached.discard(self._optimizer)

    def _before_step(
        self,
        optimizer: Optimizer,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        caller = _calling_frame()
        if self._caller is not None and _is_within(caller, self._caller):
            return None  # the step of a subclass calls that of its parent class
        self._caller = None
        if not self._begin():
            return None
        self._caller = caller
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if not callable(closure):
            self._call_prepare()
            return None
        if len(args) > 1:
            return (args[0], self._wrap(closure), *args[2:]), kwargs
        return args, {**kwargs, "closure": self._wrap(closure)}

    def _wrap(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        before, caller = self._versions(), self._caller
        parameters = [p for settings in self._optimizer.param_groups for p in settings["params"]]
        copies = [] if self.proven else [p.detach().clone() for p in parameters]  # the error puts them back
        done = False

        def prepare_after_backward() -> Any:
            nonlocal done
            if done or self._caller is not caller:  # the step has failed, or the hooks were removed
                return closure()
            if self._versions() != before:
                if not copies:
                    done = True
                    self._pass_by()
                    return closure()
                self._caller = None
                with torch.no_grad():
                    for p, copy in zip(parameters, copies, strict=True):
                        p.copy_(copy)
                raise TypeError(
                    f"{type(self._optimizer).__name__} moves the parameters before it evaluates its closure. It is not "
                    "supported, because such a step cannot be measured. Tune the optimizer inside of it, if it has one"
                )
            try:
                loss = closure()
            except BaseException:
                self._caller = None
                raise
            if self._caller is caller:
                self._hear(loss)
                done = self._call_prepare()
            return loss

        return prepare_after_backward

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's
    def _call_prepare(self) -> bool:
        begin = perf_counter()
        try:
            return self._prepare()
        except BaseException:
            self._caller = None  # the frame would keep the caller's variables alive
            raise
        finally:
            self.seconds += perf_counter() - begin

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _call_finish(self) -> None:
        begin = perf_counter()
        self._finish()
        self.seconds += perf_counter() - begin

    def _versions(self) -> list[int]:
        """How often each parameter was written to. torch has no public name for the counter that autograd keeps."""
        return [p._version for settings in self._optimizer.param_groups for p in settings["params"]]

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._caller is not None and _calling_frame() is self._caller:
            self._caller = None
            self.proven = True
            self._call_finish()


def _calling_frame() -> FrameType | None:
    """The frame that called the step hook from which this is called."""
    frame = inspect.currentframe()
    for _ in range(2):
        frame = frame.f_back if frame is not None else None
    return frame


def _is_within(frame: FrameType | None, outer: FrameType) -> bool:
    while frame is not None:
        if frame is outer:
            return True
        frame = frame.f_back
    return False
