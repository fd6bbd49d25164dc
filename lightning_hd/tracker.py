"""What there is to log of one optimizer: its trajectory, and means over the steps since they were last logged."""

import math
from array import array
from typing import Any

from torch.utils.hooks import RemovableHandle

from lightning_hd.hypergradient import HypergradientLR
from lightning_hd.tensorboard import group_names, tag


class Tracker:
    """Records every step of an engine.

    Args:
        engine: The engine.
        name: What its optimizer is called in tags.
    """

    def __init__(self, engine: HypergradientLR, name: str) -> None:
        self.engine = engine
        self.first_tag = tag("lr", group_names(name, engine.optimizer)[0])
        self.name = name
        self._history: list[array[float]] = []
        self._sums: dict[tuple[str, int], tuple[float, int]] = {}  # with how many numbers were added
        self._step_count = engine.step_count
        self.has_news = False
        self._handles: list[RemovableHandle] = [
            engine.optimizer.register_step_pre_hook(self._begin),
            engine.optimizer.register_step_post_hook(self._record),
        ]

    def detach(self) -> None:
        """Record no more."""
        for handle in self._handles:
            handle.remove()

    def _begin(self, *_: Any) -> None:
        self._step_count = self.engine.step_count

    def _record(self, *_: Any) -> None:
        """Called after every call of ``optimizer.step``, which need not have been a step of the engine."""
        if self.engine.step_count == self._step_count:
            return
        self.has_news = True
        lrs = self.engine.lrs
        self._history.extend(array("d") for _ in lrs[len(self._history) :])
        for history, lr in zip(self._history, lrs, strict=True):
            history.append(lr)
        for i, seen in enumerate(self.engine.last):
            if seen is None or not all(map(math.isfinite, seen)):
                continue
            for quantity, value in (("value", seen.hypergradient), ("cosine", seen.cosine)):
                total, count = self._sums.get((quantity, i), (0.0, 0))
                self._sums[quantity, i] = total + value, count + 1

    def history(self) -> list[tuple[str, list[float]]]:
        """The name of each group, and the effective rate of every step."""
        names = group_names(self.name, self.engine.optimizer)
        return [(name, lrs.tolist()) for name, lrs in zip(names, self._history, strict=False)]

    @property
    def lr(self) -> float:
        """That of the first group."""
        return self.engine.lrs[0]

    def lr_metrics(self) -> dict[str, float]:
        """The tags and the effective rates of all groups."""
        names = group_names(self.name, self.engine.optimizer)
        return {tag("lr", name): lr for name, lr in zip(names, self.engine.lrs, strict=True)}

    def collect(self) -> dict[str, float]:
        """All that is logged now; the means start anew."""
        scales = self.engine.scales
        by_group = self.engine.scope == "group"
        names = group_names(self.name, self.engine.optimizer) if by_group else [self.name]
        metrics = self.lr_metrics()
        metrics |= {tag("scale", name): scale for name, scale in zip(names, scales, strict=False)}
        metrics |= {tag("brakes", name): float(n) for name, n in zip(names, self.engine.brakes, strict=False) if n}
        for (quantity, i), (total, count) in self._sums.items():
            metrics[tag(quantity, names[i])] = total / count
        self._sums.clear()
        self.has_news = False
        return metrics
