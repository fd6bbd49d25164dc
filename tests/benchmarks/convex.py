"""Smooth convex problems in full batches: how many gradients each method needs, L-BFGS among them.

    pip install -e ".[bench]"
    python tests/benchmarks/convex.py            # about four minutes on one core

Softmax regression on scikit-learn's digits and, standardized, on its breast cancer data, with a penalty of
``1e-4/2 ‖x‖²``, in double precision, from a random point of norm 1. An evaluation is that of the loss and the gradient
at a point. The table has the number of evaluations until the loss at an evaluated point is within 1e-2, 1e-4, 1e-6 and
1e-8 of the optimum. All evaluations count: those of line searches, and those after which OSGM takes a null step. No
point where a method stays or comes from is evaluated again.

``L`` is a bound of the gradient's Lipschitz constant, and ``μ``, that of strong convexity, is 1e-4. Gradient descent,
heavy ball, Nesterov's method and OSGM know ``L``, and two of them ``μ``; L-BFGS, GALA and the rule "auto" know neither.
OSGM has its authors' rates, 10/L for the step size and 10 for the momentum. Where it is "tuned", it has those of the
grid of their experiments that get to the smallest gap first, for each problem: 0.1 to 100 over L, and 1 to 100.

The rules are those of lightning_hd, in plain SGD and in SGD with Nesterov's momentum of 0.9. Except for "auto", they
start from 1/L. "rule OSGM" is OSGM's update in the form that a rule can have, without null steps.
"""

import argparse
import contextlib
import functools
import itertools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import SGD, Optimizer
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for those who run the file by its path

from lightning_hd import HypergradientLR
from lightning_hd.rules import RuleName
from tests.benchmarks.gala import GALA
from tests.benchmarks.osgm import ETA_BETA, OSGM, Oracle, OSGMRule

Array = npt.NDArray[np.float64]

PENALTY = 1e-4
GAPS = (1e-2, 1e-4, 1e-6, 1e-8)
ETA = 10.0
ETAS, ETA_BETAS = (0.1, 1.0, 10.0, 100.0), (1.0, 3.0, 5.0, 10.0, 100.0)
"""The rates of OSGM, times ``L``, and of its momentum: the grids of the experiments of its authors."""


class Convex:
    """Softmax regression: the loss and its gradient at a point.

    Attributes:
        smoothness: ``L``: half the largest eigenvalue of the inputs' second moments, plus the penalty.
        start: The first point.
        optimum: The lowest loss, by a long run of L-BFGS.

    Raises:
        RuntimeError: L-BFGS has not found the optimum.
    """

    def __init__(self, x: Array, y: npt.NDArray[np.int64]) -> None:
        self._inputs = torch.tensor(np.hstack([x, np.ones((len(x), 1))]))
        self._targets = torch.tensor(y)
        self._shape = (int(y.max()) + 1, self._inputs.shape[1])
        moments = self._inputs.T @ self._inputs / len(x)
        self.smoothness = float(torch.linalg.eigvalsh(moments)[-1]) / 2 + PENALTY
        start = torch.randn(math.prod(self._shape), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.start = start / start.norm()
        found = quasi_newton(self, self.start, maxcor=50)
        above = float((found.jac**2).sum()) / (2 * PENALTY)  # by strong convexity, it is no more above the optimum
        if above > GAPS[-1] / 100:
            raise RuntimeError(f"the loss that L-BFGS has found may be {above:.1g} above the optimum")
        self.optimum = float(found.fun)

    def __call__(self, point: Tensor) -> tuple[Tensor, Tensor]:
        point = point.detach().requires_grad_()
        with torch.enable_grad():
            loss = F.cross_entropy(self._inputs @ point.view(self._shape).T, self._targets)
            loss = loss + PENALTY / 2 * point.square().sum()
        (gradient,) = torch.autograd.grad(loss, point)
        return loss.detach(), gradient


def quasi_newton(oracle: Oracle, start: Tensor, maxcor: int) -> Any:
    """SciPy's L-BFGS, until it can get no further."""

    def evaluate(point: Array) -> tuple[float, Array]:
        loss, gradient = oracle(torch.tensor(point))
        return float(loss), gradient.numpy()

    options = {"maxcor": maxcor, "ftol": 0.0, "gtol": 1e-10, "maxiter": 10**6, "maxfun": 10**6}
    return minimize(evaluate, start.numpy(), jac=True, method="L-BFGS-B", options=options)


def digits() -> Convex:
    x, y = load_digits(return_X_y=True)
    return Convex(x / 16, y)


def breast_cancer() -> Convex:
    x, y = load_breast_cancer(return_X_y=True)
    return Convex(StandardScaler().fit_transform(x), y)


PROBLEMS: Mapping[str, Callable[[], Convex]] = {"digits": digits, "breast cancer": breast_cancer}


class Finished(Exception):  # noqa: N818
    """All gaps are reached, or the evaluations are used up."""


class Counter:
    """Evaluates the problem, and counts.

    Args:
        problem: The problem.
        limit: How many evaluations there are.

    Attributes:
        reached: The number of evaluations at which each gap was reached.
    """

    def __init__(self, problem: Convex, limit: int) -> None:
        self.problem, self.reached = problem, dict.fromkeys(GAPS, math.inf)
        self._left, self._count = limit, 0
        self._known: list[tuple[Tensor, tuple[Tensor, Tensor]]] = []

    def __call__(self, point: Tensor) -> tuple[Tensor, Tensor]:
        for i, (known, value) in enumerate(self._known):
            if torch.equal(known, point):
                self._known.append(self._known.pop(i))  # where OSGM stays, through any number of null steps
                return value
        if self._count == self._left or max(self.reached.values()) < math.inf:
            raise Finished
        self._count += 1
        value = self.problem(point)
        for gap in GAPS:
            if float(value[0]) <= self.problem.optimum + gap:
                self.reached[gap] = min(self.reached[gap], self._count)
        self._known = [*self._known[-2:], (point.clone(), value)]
        return value


Method = Callable[[Counter], object]
"""Goes on until the counter ends it, or it can get no further."""


def lbfgs(counter: Counter) -> None:
    quasi_newton(counter, counter.problem.start, maxcor=10)


def descend(
    counter: Counter, p: nn.Parameter, optimizer: Optimizer, observe: Callable[[Tensor], object] = lambda loss: None
) -> None:
    """The loop of torch's optimizers."""
    while True:
        loss, p.grad = counter(p.detach())
        if not math.isfinite(loss):
            return
        observe(loss)
        optimizer.step()


def first_point(counter: Counter) -> nn.Parameter:
    return nn.Parameter(counter.problem.start.clone())


def gradient_descent(counter: Counter) -> None:
    p = first_point(counter)
    descend(counter, p, SGD([p], 1 / counter.problem.smoothness))


def heavy_ball(counter: Counter) -> None:
    """With Polyak's constants, the best ones for quadratic functions."""
    p, L = first_point(counter), counter.problem.smoothness  # noqa: N806
    root, low = L**0.5, PENALTY**0.5
    descend(counter, p, SGD([p], 4 / (root + low) ** 2, momentum=((root - low) / (root + low)) ** 2))


def nesterov(counter: Counter) -> None:
    """With the constants for strongly convex functions."""
    p, L = first_point(counter), counter.problem.smoothness  # noqa: N806
    root, low = L**0.5, PENALTY**0.5
    descend(counter, p, SGD([p], 1 / L, momentum=(root - low) / (root + low), nesterov=True))


def osgm(counter: Counter, eta: float = ETA, eta_beta: float | None = None, diagonal: bool = False) -> None:
    p = first_point(counter)
    optimizer = OSGM([p], counter, eta / counter.problem.smoothness, diagonal, eta_beta)
    descend(counter, p, optimizer, optimizer.observe)


def gala(counter: Counter) -> None:
    p = first_point(counter)
    optimizer = SGD([p])
    GALA(optimizer, counter)
    descend(counter, p, optimizer)


def tuned_by(counter: Counter, momentum: float, rule: RuleName | None, eta: float = ETA) -> None:
    """SGD with a rule of lightning_hd, or with OSGM's where there is no name."""
    p, L = first_point(counter), counter.problem.smoothness  # noqa: N806
    optimizer = SGD([p], 1 / L, momentum, nesterov=momentum > 0)
    descend(counter, p, optimizer, HypergradientLR(optimizer, rule=rule or OSGMRule(eta / L)).observe)


def methods() -> dict[str, list[Method]]:
    """By name; of several, the best counts."""
    found: dict[str, list[Method]] = {
        "gradient descent, 1/L": [gradient_descent],
        "heavy ball": [heavy_ball],
        "Nesterov": [nesterov],
        "L-BFGS": [lbfgs],
        "GALA": [gala],
    }
    for kind, diagonal in (("scalar", False), ("diagonal", True)):
        of_kind = functools.partial(osgm, diagonal=diagonal)
        found[f"OSGM, {kind}"] = [of_kind]
        found[f"OSGM, {kind}, tuned"] = [functools.partial(of_kind, eta=eta) for eta in ETAS]
        found[f"OSGM, {kind}, heavy ball"] = [functools.partial(of_kind, eta_beta=ETA_BETA)]
        found[f"OSGM, {kind}, heavy ball, tuned"] = [
            functools.partial(of_kind, eta=eta, eta_beta=eta_beta)
            for eta, eta_beta in itertools.product(ETAS, ETA_BETAS)
        ]
    for momentum, base in ((0.0, ""), (0.9, ", Nesterov")):
        tune = functools.partial(tuned_by, momentum=momentum)
        for rule in ("auto", "additive", "multiplicative"):
            found[f"rule {rule}{base}"] = [functools.partial(tune, rule=rule)]
        found[f"rule OSGM{base}"] = [functools.partial(tune, rule=None)]
        found[f"rule OSGM{base}, tuned"] = [functools.partial(tune, rule=None, eta=eta) for eta in ETAS]
    return found


def evaluations(problem: Convex, variants: Sequence[Method], limit: int) -> list[float]:
    """How many the best variant needs for each gap; infinite where it does not get there."""
    found = []
    for method in variants:
        counter = Counter(problem, limit)
        with contextlib.suppress(Finished):
            method(counter)
        found.append(list(counter.reached.values()))
    return min(found, key=lambda reached: reached[::-1])


def table(counts: Mapping[str, Sequence[float]], problems: Sequence[str]) -> str:
    """In Markdown: a line for each method, the gaps of one problem beside those of the other."""
    head = ["evaluations until the gap is", *(f"{name} {gap:.0e}" for name in problems for gap in GAPS)]
    body = [[name, *("–" if math.isinf(n) else f"{n:.0f}" for n in found)] for name, found in counts.items()]
    widths = [max(map(len, cells)) for cells in zip(head, *body, strict=True)]
    lines = [head, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])], *body]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--limit", type=int, default=5000, metavar="N", help="evaluations (default: %(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    counts: dict[str, list[float]] = {name: [] for name in methods()}
    for make in PROBLEMS.values():
        problem = make()
        for name, variants in tqdm(methods().items(), unit="method"):
            counts[name] += evaluations(problem, variants, args.limit)
    print(f"{table(counts, list(PROBLEMS))}\n\n–: not within {args.limit} evaluations")
    return 0


if __name__ == "__main__":
    sys.exit(main())
