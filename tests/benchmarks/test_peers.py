"""OSGM and GALA against NumPy and autograd; the tuners of packages take steps; how evaluations are counted."""

import functools
import itertools
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.optim import SGD

from lightning_hd import HypergradientLR
from tests.benchmarks import convex, fashion, tasks, training, tuners
from tests.benchmarks.gala import GALA
from tests.benchmarks.osgm import OSGM, OSGMRule, flat_gradient
from tests.benchmarks.problems import Problem

Array = npt.NDArray[np.float64]

STEPS, SIZE = 80, 6
RANDOM = np.random.default_rng(0)
INPUTS, TARGETS = RANDOM.normal(size=(STEPS, 10, SIZE)), RANDOM.normal(size=(STEPS, 10))
START = RANDOM.normal(size=SIZE)


def loss_of(step: int, x: Array) -> float:
    """Least squares with a smooth bend, a batch for each step."""
    return float(np.mean(np.sqrt(1 + (INPUTS[step] @ x - TARGETS[step]) ** 2)))


def gradient_of(step: int, x: Array) -> Array:
    error = INPUTS[step] @ x - TARGETS[step]
    found: Array = INPUTS[step].T @ (error / np.sqrt(1 + error**2)) / len(error)
    return found


def torch_loss(step: int, x: Tensor) -> Tensor:
    error = torch.tensor(INPUTS[step]) @ x - torch.tensor(TARGETS[step])
    return (1 + error**2).sqrt().mean()


class Batches:
    """The parameters, in two tensors, and the oracle of the present batch."""

    def __init__(self) -> None:
        self.params = [nn.Parameter(torch.tensor(START[:2])), nn.Parameter(torch.tensor(START[2:]))]
        self.step = 0

    def __call__(self, point: Tensor) -> tuple[Tensor, Tensor]:
        point = point.detach().requires_grad_()
        with torch.enable_grad():
            loss = torch_loss(self.step, point)
        (gradient,) = torch.autograd.grad(loss, point)
        return loss.detach(), gradient

    def backward(self) -> Tensor:
        for p in self.params:
            p.grad = None
        loss = torch_loss(self.step, parameters_to_vector(self.params))
        loss.backward()
        return loss

    def point(self) -> Array:
        found: Array = parameters_to_vector(self.params).detach().numpy()
        return found


Slopes = Callable[[int, Array, Array, Array, float], tuple[Array, float]]
"""``∂h/∂P`` by coordinates and ``∂h/∂β``, for a step, ``x``, ``x - x⁻``, ``P`` and ``β``."""


def slopes_by_formula(step: int, x: Array, moved: Array, size: Array, momentum: float) -> tuple[Array, float]:
    g = gradient_of(step, x)
    new = gradient_of(step, x - size * g + momentum * moved)
    return -new * g / (g @ g), float(new @ moved / (g @ g))


def slopes_by_autograd(step: int, x: Array, moved: Array, size: Array, momentum: float) -> tuple[Array, float]:
    g = torch.tensor(gradient_of(step, x))
    p, b = torch.tensor(size, requires_grad=True), torch.tensor(momentum, requires_grad=True, dtype=torch.float64)
    here = torch.tensor(x)
    h = (torch_loss(step, here - p * g + b * torch.tensor(moved)) - torch_loss(step, here)) / g.dot(g)
    by_size, by_momentum = torch.autograd.grad(h, (p, b))
    return by_size.numpy(), float(by_momentum)


def osgm_in_numpy(slopes: Slopes, eta: float, eta_beta: float, diagonal: bool) -> tuple[list[Array], int]:
    """The iterates, and the number of null steps."""
    x = before = START
    size, squares = np.zeros(SIZE), np.zeros(SIZE)
    momentum, momentum_squares = (0.95 if eta_beta else 0.0), 0.0
    iterates, nulls = [], 0
    for step in range(STEPS):
        new = x - size * gradient_of(step, x) + momentum * (x - before)
        by_size, by_momentum = slopes(step, x, x - before, size, momentum)
        if not diagonal:
            by_size = np.full(SIZE, by_size.sum())
        squares = squares + by_size**2
        size = np.maximum(size - eta * by_size / (np.sqrt(squares) + 1e-12), 0)
        momentum_squares += by_momentum**2
        momentum -= eta_beta * by_momentum / (math.sqrt(momentum_squares) + 1e-12)
        momentum = min(max(momentum, 0.0), 0.9995)
        before = x
        if loss_of(step, new) < loss_of(step, x):
            x = new
        else:
            nulls += 1
        iterates.append(x)
    return iterates, nulls


@pytest.mark.parametrize("slopes", [slopes_by_formula, slopes_by_autograd])
@pytest.mark.parametrize(("eta_beta", "diagonal"), [(None, False), (None, True), (3.0, False), (3.0, True)])
def test_osgm_is_the_formula(slopes: Slopes, eta_beta: float | None, diagonal: bool) -> None:
    expected, nulls = osgm_in_numpy(slopes, 2.0, eta_beta or 0.0, diagonal)
    assert 3 < nulls < STEPS / 2
    batches = Batches()
    optimizer = OSGM(batches.params, batches, eta=2.0, diagonal=diagonal, eta_beta=eta_beta)
    for step in range(STEPS):
        batches.step = step
        optimizer.observe(batches.backward())
        optimizer.step()
        np.testing.assert_allclose(batches.point(), expected[step], rtol=1e-7, atol=1e-9)


def test_the_rule_of_osgm_is_the_formula_without_null_steps() -> None:
    x, size, squares, rates = START, 0.01, 0.0, list[float]()
    g = gradient_of(0, x)
    for step in range(STEPS):
        rates.append(size)
        x = x - size * g
        new = gradient_of(min(step + 1, STEPS - 1), x)
        slope = float(-new @ g / (g @ g))
        squares += slope**2
        size = max(size - 0.3 * slope / (math.sqrt(squares) + 1e-12), 0.0)
        g = new
    batches = Batches()
    optimizer = SGD(batches.params, lr=0.01)
    engine = HypergradientLR(optimizer, rule=OSGMRule(0.3))
    for step in range(STEPS):
        batches.step = step
        batches.backward()
        optimizer.step()
        assert engine.lrs[0] == pytest.approx(rates[step], rel=1e-9)
    np.testing.assert_allclose(batches.point(), x, rtol=1e-9)


def test_gala_takes_the_rate_that_follow_the_regularized_leader_takes() -> None:
    first_rate, delta = 1e-2, 0.3
    losses: list[Callable[[float], float]] = [lambda rate: delta / 2 * (rate - first_rate) ** 2]

    def surrogate(step: int, before: Array, x: Array, rate: float) -> float:
        """Of the step that led from ``before`` to ``x``, when batch ``step`` is there."""
        used, new, former = gradient_of(step - 1, before), gradient_of(step, x), gradient_of(step, before)
        curvature = np.linalg.norm(new - former) / np.linalg.norm(x - before)
        return float(-rate * new @ former + rate**2 / 2 * curvature * used @ used)

    batches = Batches()
    optimizer = SGD(batches.params)
    tuner = GALA(optimizer, batches, first_rate, delta)
    x, rate = START, first_rate
    for step in range(STEPS):
        if step:
            values = [sum(loss(at) for loss in losses) for at in (0.0, 1.0, 2.0)]
            square, slope, _ = np.polyfit([0.0, 1.0, 2.0], values, 2)  # the losses are parabolas
            rate = max(-slope / (2 * square), 0.0)
        batches.step = step
        batches.backward()
        optimizer.step()
        assert tuner.rate == pytest.approx(rate, rel=1e-9)
        before, x = x, x - rate * gradient_of(step, x)
        np.testing.assert_allclose(batches.point(), x, rtol=1e-9)
        losses.append(functools.partial(surrogate, step + 1, before, x))


def test_gala_stands_still_where_gradients_turn_and_moves_again_where_they_agree() -> None:
    p = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    signs = iter([1.0, -5.0, 7.0, 7.0])
    optimizer = SGD([p])
    former = torch.zeros(1, dtype=torch.float64)
    tuner = GALA(optimizer, lambda point: (former.sum(), former), first_rate=0.5, delta=0.1)
    rates = []
    for sign in signs:
        p.grad = torch.tensor([sign], dtype=torch.float64)
        former = p.grad * (-1 if sign < 0 else 1)
        optimizer.step()
        rates.append(tuner.rate)
    assert rates[1] == 0
    assert rates[2] > 0


@pytest.mark.parametrize("name", ["osgm", "osgm diagonal", "osgm heavy ball", "gala"])
def test_the_optimum_of_a_convex_quadratic_is_reached(name: str) -> None:
    curvature = torch.tensor([0.1, 1.0, 3.0, 10.0], dtype=torch.float64)

    def oracle(point: Tensor) -> tuple[Tensor, Tensor]:
        return 0.5 * (curvature * point**2).sum(), curvature * point

    p = nn.Parameter(torch.ones(4, dtype=torch.float64))
    optimizer: OSGM | SGD
    if name == "gala":
        optimizer = SGD([p])
        GALA(optimizer, oracle)
    else:
        optimizer = OSGM([p], oracle, 1.0, "diagonal" in name, 10.0 if "heavy" in name else None)
    for _ in range(2000):
        loss, p.grad = oracle(p.detach())
        if isinstance(optimizer, OSGM):
            optimizer.observe(loss)
        optimizer.step()
    assert float(oracle(p.detach())[0]) < 1e-8 * float(curvature.sum())


@pytest.mark.parametrize("task", ["digits-16", "adapters-dropout", "diffusion", "equation", "text", "quadratic"])
def test_a_twin_evaluates_the_same_batch(task: str) -> None:
    make = functools.partial(tasks.build, task, 3, fashion.FASHION)
    problem = make()
    oracle = tuners.oracle_of(make)
    params = tuners.trainable(problem.network)
    for _ in range(3):
        loss, gradient = evaluate(problem, params)
        again, gradient_again = oracle(parameters_to_vector(params).detach())
        torch.testing.assert_close(again, loss, rtol=0, atol=0)
        torch.testing.assert_close(gradient_again, gradient, rtol=0, atol=0)
        SGD(params, lr=0.01).step()


def evaluate(problem: Problem, params: list[nn.Parameter]) -> tuple[Tensor, Tensor]:
    problem.network.zero_grad()
    loss = problem.train_loss()
    loss.backward()
    return loss.detach(), flat_gradient(params)


@pytest.mark.parametrize(("name", "base"), [("osgm", "SGD"), ("osgm", "Nesterov"), ("gala", "SGD")])
def test_a_run_of_the_benchmark(name: str, base: str) -> None:
    make = functools.partial(tasks.build, "logistic", 0, fashion.FASHION)
    method = tuners.methods("auto", make)[name]
    (rate,) = (method.rates or {})[base]
    problem = make()
    outcome = training.train(problem, method, base, rate, 0.0, 60)
    assert outcome.train_loss < 1.5 < make().train_loss().item()
    assert outcome.final_lr > 0


PACKAGED = [name for name, method in tuners.methods("auto").items() if method.package and "Adam" in method.optimizers]


@pytest.mark.parametrize("name", PACKAGED)
def test_a_tuner_of_a_package_lowers_the_loss_and_tells_its_rate(name: str) -> None:
    method = tuners.methods("auto")[name]
    if missing := method.missing():
        pytest.skip(f"{missing[0]} is not installed: pip install -e '.[bench]'")
    rates = (method.rates or {})["Adam"]
    problem = tasks.build("logistic", 0, fashion.FASHION)
    before = problem.train_loss().item()
    outcome = training.train(problem, method, "Adam", rates[-1], 0.0, 200)
    assert outcome.train_loss < before
    assert outcome.final_lr > 0


def test_greedy_raises_the_rate_while_the_loss_improves() -> None:
    method = tuners.methods("auto")["greedy"]
    if missing := method.missing():
        pytest.skip(f"{missing[0]} is not installed: pip install -e '.[bench]'")
    outcome = training.train(tasks.build("logistic", 0, fashion.FASHION), method, "Adam", 1e-3, 0.0, 60)
    assert outcome.final_lr == pytest.approx(1e-3 / 0.99**5)


class Small(convex.Convex):
    """A problem that remembers where it was evaluated."""

    def __init__(self) -> None:
        random = np.random.default_rng(1)
        self.evaluated: list[Tensor] = []
        self.x, self.y = random.normal(size=(40, 3)), random.integers(0, 3, size=40).astype(np.int64)
        super().__init__(self.x, self.y)
        self.evaluated.clear()

    def __call__(self, point: Tensor) -> tuple[Tensor, Tensor]:
        self.evaluated.append(point.clone())
        return super().__call__(point)


def test_the_evaluations_of_gradient_descent() -> None:
    problem = Small()
    x, y = np.hstack([problem.x, np.ones((40, 1))]), problem.y
    rate = 1 / (np.linalg.eigvalsh(x.T @ x / 40)[-1] / 2 + 1e-4)
    w = problem.start.numpy().reshape(3, 4).copy()
    reached = [math.inf, math.inf]
    for evaluation in range(1, 301):
        scores = np.exp(x @ w.T)
        p = scores / scores.sum(1, keepdims=True)
        gap = -np.log(p[np.arange(40), y]).mean() + 0.5e-4 * (w**2).sum() - problem.optimum
        reached = [min(n, evaluation) if gap <= g else n for n, g in zip(reached, (1e-2, 1e-4), strict=True)]
        w -= rate * ((p - np.eye(3)[y]).T @ x / 40 + 1e-4 * w)
    found = convex.evaluations(problem, [convex.gradient_descent], limit=300)
    assert 1 < reached[0] < reached[1] < math.inf
    assert found[:2] == reached
    assert len(problem.evaluated) == 300


def test_rejected_points_count_and_a_point_that_is_known_does_not() -> None:
    problem = Small()
    counter = convex.Counter(problem, 200)
    with pytest.raises(convex.Finished):
        convex.osgm(counter, eta=100.0)
    points = problem.evaluated
    assert len(points) == 200
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(points, 2))
    losses = [float(problem(point)[0]) for point in points[:]]
    lowest = list(itertools.accumulate(losses, min))
    assert sum(loss >= low for loss, low in zip(losses[1:], lowest[:-1], strict=True)) > 5  # they are rejected
    assert counter.reached[1e-2] == 1 + next(i for i, loss in enumerate(losses) if loss <= problem.optimum + 1e-2)


def test_of_several_the_one_counts_that_reaches_the_smallest_gap_first() -> None:
    problem = Small()
    slow, fast = (convex.evaluations(problem, [way], 1000) for way in (convex.gradient_descent, convex.nesterov))
    assert fast[-1] < slow[-1]
    assert convex.evaluations(problem, [convex.gradient_descent, convex.nesterov], 1000) == fast


def test_the_table() -> None:
    counts = {"one": [3.0, 40.0, math.inf, math.inf], "another": [1.0, 2.0, 3.0, 4.0]}
    head, _, *lines = convex.table(counts, ["digits"]).replace(" ", "").splitlines()
    assert head.endswith("|digits1e-02|digits1e-04|digits1e-06|digits1e-08|")
    assert lines == ["|one|3|40|–|–|", "|another|1|2|3|4|"]
