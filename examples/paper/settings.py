"""The paper's settings, and which runs there are."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Literal, TypeAlias

from torch import nn
from torch.optim import SGD, Adam, Optimizer

from lightning_hd import HypergradientDescent

Name: TypeAlias = Literal["logreg", "mlp", "vgg"]
Base: TypeAlias = Literal["SGD", "SGDN", "Adam"]
Rule: TypeAlias = Literal["none", "additive", "auto"]

ALPHA_0 = 0.001
BATCH = 128
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4

BASES: tuple[Base, ...] = ("SGD", "SGDN", "Adam")
RULES: tuple[Rule, ...] = ("none", "additive", "auto")
SUFFIXES: Mapping[Rule, str] = {"none": "", "additive": "-HD", "auto": "-auto"}


@dataclass(frozen=True)
class Experiment:
    """One of the three.

    Args:
        title: What the figure is called.
        epochs: How many in the paper.
        betas: β of the paper, by optimizer.
    """

    title: str
    epochs: int
    betas: Mapping[Base, float]


EXPERIMENTS: Mapping[Name, Experiment] = {
    "logreg": Experiment("Logistic regression", 10, {"SGD": 1e-3, "SGDN": 1e-3, "Adam": 1e-7}),
    "mlp": Experiment("Two hidden layers of 1,000 units", 100, {"SGD": 1e-3, "SGDN": 1e-3, "Adam": 1e-7}),
    "vgg": Experiment("VGG-16 with batch norm", 200, {"SGD": 1e-3, "SGDN": 1e-3, "Adam": 1e-8}),
}


@dataclass(frozen=True)
class Run:
    """What determines a run.

    Args:
        beta: 0 where the rule has none.
        data: Where the images are from.
        images: How many of them to train with, and at most to validate with.
        threshold: The training loss at which to stop; ``None``: train to the end, and validate after each epoch.
    """

    experiment: Name
    base: Base
    rule: Rule
    alpha_0: float
    beta: float
    epochs: int
    data: str
    images: int
    width: float = 1.0
    threshold: float | None = None
    seed: int = 0

    @property
    def iterations(self) -> int:
        """In an epoch."""
        return math.ceil(self.images / BATCH)

    @property
    def length(self) -> int:
        """All iterations, where it does not stop before."""
        return self.epochs * self.iterations

    @property
    def name(self) -> str:
        """What legends call it."""
        return self.base + SUFFIXES[self.rule]

    @property
    def file(self) -> str:
        """The name of its file, without an ending: two runs that differ have different ones."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]
        return f"{self.experiment}-{self.name}-{digest}"


def make_optimizer(run: Run, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """The optimizer of a run; its weight decay is part of the gradient, as in the paper."""
    if run.base == "Adam":
        return Adam(parameters, lr=run.alpha_0, weight_decay=WEIGHT_DECAY)
    momentum = MOMENTUM if run.base == "SGDN" else 0.0
    return SGD(parameters, lr=run.alpha_0, momentum=momentum, nesterov=momentum > 0, weight_decay=WEIGHT_DECAY)


def make_callbacks(run: Run) -> list[HypergradientDescent]:
    """The callback of a run that has one."""
    if run.rule == "additive":
        return [HypergradientDescent("additive", hypergrad_lr=run.beta, min_lr=None, summary=False)]
    return [HypergradientDescent(summary=False)] if run.rule == "auto" else []
