"""The paper's algorithms in NumPy, float64, written from its formulas: a slow reference that knows nothing of torch.

``network_loss`` is a network of one tanh layer with its backpropagation by hand; ``train`` runs SGD-HD, SGDN-HD and
Adam-HD (arXiv 1703.04782, Section 3) on it, with the additive or the multiplicative rule; ``train_auto`` the rule auto,
written from the docstring of ``lightning_hd.Auto``. ``Tuned`` takes gradients from anywhere, for any parameter groups.
"""

import functools
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

Array = npt.NDArray[np.float64]

STEPS, BATCH, INPUTS, HIDDEN, OUTPUTS = 200, 16, 5, 8, 3


def initial_parameters(seed: int = 0) -> list[Array]:
    rng = np.random.default_rng(seed)
    shapes = [(HIDDEN, INPUTS), (HIDDEN,), (OUTPUTS, HIDDEN), (OUTPUTS,)]
    return [rng.normal(scale=0.5, size=shape) for shape in shapes]


def batches(seed: int = 1) -> list[tuple[Array, Array]]:
    rng = np.random.default_rng(seed)
    teacher = rng.normal(size=(INPUTS, OUTPUTS))
    inputs = [rng.normal(size=(BATCH, INPUTS)) for _ in range(STEPS)]
    return [(x, np.sin(x @ teacher) + 0.1 * rng.normal(size=(BATCH, OUTPUTS))) for x in inputs]


def network_loss(parameters: Sequence[Array], x: Array, y: Array) -> tuple[float, list[Array]]:
    """Half the mean squared error of the network, and its gradient by hand."""
    w1, b1, w2, b2 = parameters
    hidden = np.tanh(x @ w1.T + b1)
    error = hidden @ w2.T + b2 - y
    loss = 0.5 * np.mean(np.sum(error**2, axis=1))
    error_mean = error / len(x)
    back = (error_mean @ w2) * (1 - hidden**2)
    return float(loss), [back.T @ x, back.sum(axis=0), error_mean.T @ hidden, error_mean.sum(axis=0)]


def directions(method: str, settings: dict[str, Any]) -> Generator[list[Array], list[Array], None]:
    """Send it a gradient, get back d_t, so that u_t = -α_t d_t."""
    g = yield []
    first = [np.zeros_like(x) for x in g]
    second = [np.zeros_like(x) for x in g]
    largest = second
    t = 0
    while True:
        t += 1
        if method == "sgd":
            d = g
        elif method == "sgdn":
            mu = settings["momentum"]
            first = [mu * v + x for v, x in zip(first, g, strict=True)]
            d = [x + mu * v for v, x in zip(first, g, strict=True)]
        elif method == "heavy_ball":
            mu, tau = settings["momentum"], settings.get("dampening", 0.0)
            first = [x.copy() if t == 1 else mu * v + (1 - tau) * x for v, x in zip(first, g, strict=True)]
            d = first
        elif method == "adam":
            b1, b2 = settings.get("betas", (0.9, 0.999))
            first = [b1 * m + (1 - b1) * x for m, x in zip(first, g, strict=True)]
            second = [b2 * v + (1 - b2) * x**2 for v, x in zip(second, g, strict=True)]
            largest = [np.maximum(w, v) if settings.get("amsgrad") else v for w, v in zip(largest, second, strict=True)]
            d = [
                (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + settings.get("eps", 1e-8))
                for m, v in zip(first, largest, strict=True)
            ]
        else:
            raise ValueError(method)
        g = yield [x.copy() for x in d]


def dot(a: Sequence[Array], b: Sequence[Array]) -> float:
    return float(sum(np.sum(x * y) for x, y in zip(a, b, strict=True)))


def norm(a: Iterable[Array]) -> float:
    return float(np.sqrt(sum(np.sum(x * x) for x in a)))


def train(
    method: str, rule: Any, lr: float, beta: float, settings: dict[str, Any] | None = None, steps: int = STEPS
) -> tuple[list[float], list[Array]]:
    """Learning rate of every step, and the parameters after the last."""
    parameters = initial_parameters()
    direction = directions(method, settings or {})
    next(direction)
    last_d: list[Array] | None = None
    lrs = []
    for x, y in batches()[:steps]:
        _, g = network_loss(parameters, x, y)
        if last_d is not None:
            h = -dot(g, last_d)
            if rule == "additive":
                lr = lr - beta * h
            else:
                lr = lr * (1 - beta * h / (np.sqrt(dot(g, g)) * np.sqrt(dot(last_d, last_d))))
        last_d = direction.send(g)
        parameters = [p - lr * d for p, d in zip(parameters, last_d, strict=True)]
        lrs.append(lr)
    return lrs, parameters


def faded_mean(values: Sequence[float], memories: Sequence[float]) -> float:
    """Mean of a series in which each new number comes in with one minus its memory of the numbers before it."""
    later = np.append(np.cumprod(memories[:0:-1])[::-1], 1.0)  # the product of the memories of all later numbers
    weights = (1 - np.array(memories)) * later
    return float(np.dot(values, weights) / np.sum(weights))


def newest_weights(parts: Sequence[float]) -> Array:
    """The weights of a series in its running mean, in which each new number comes in with its part."""
    later = np.append(np.cumprod(1 - np.array(parts[:0:-1]))[::-1], 1.0)  # what all later numbers leave of each
    weights: Array = np.array(parts) * later
    return weights


class Shown(NamedTuple):
    """What a step shows: minus ``g · E`` and ``g · Ē``, the cosine of two gradients, the last move, and norms."""

    product: float
    g_norm: float
    d_norm: float
    late: float | None = None  # None: the same as the product
    turn: float = 0.0
    slope: float = 0.0  # the gradient times the last move
    move_norm: float = 0.0
    param_norm: float = 0.0


class AutoRule:
    """The rule auto for one scope. The means and sums that the rule keeps are taken over the whole history here."""

    def __init__(self, normalized: bool = True, length: float = np.inf) -> None:
        self.careful_cap = min(max(0.05, 10 / length), 0.1)
        self.longest_brake = 2.0 if normalized else np.inf
        self.normalized = normalized
        self.far = np.inf if normalized else float(np.log(20))
        self.first = self._first_direction = 0.0
        self.brake = 0.0
        self.leap = 0.0
        self.braked: list[int] = []
        self.retreats: list[int] = []  # steps in which the loss was seen to have risen
        self.undone: list[int] = []  # steps in which that has not helped
        self.forgets = False
        self.ceiling = np.inf
        self._block: list[tuple[float, float, float]] = []  # losses, logarithms of rates, slopes
        self._block_steps = 0
        self._best: tuple[float, float, float] | None = None
        self._trial: tuple[float, float, float] | None = None  # mean and error of the block, log α before
        self._demand = 2.0
        self.slope = 0.0  # by how much the last change of log α would differ for another cosine, unclipped
        self._memories: list[float] = []
        self._squared_norms: list[float] = []
        self._turns: list[float] = []
        self._turn_parts: list[float] = []
        self._turn_steps = 0
        self.turn = 0.0  # their mean
        self._greedy: list[tuple[float, float]] = []  # cosines, and their parts
        self._cosines: list[float] = []
        self._bent: list[float] = []  # times the stride
        self._parts: list[float] = []
        self._logs: list[float] = []
        self._lengths: list[float] = []  # logarithms of those of the steps' directions, over those of the gradients
        self._variance = (np.log(2.5) / 3) ** 2
        self.largest = self.norm = 0.0
        self.quiet = 20  # the number of steps since the last leap
        self.highest = 0.0  # what is left of the largest log ‖g‖ of the last series of leaps
        self._seen_lrs: list[float] = []
        self._long = False  # whether steps are long
        self._fast_to = np.inf
        self._fallen = 0.0  # how far log α has fallen beyond the cap
        self._remembered: list[tuple[float, float]] = []  # log α of each move in E, and how much is left of it

    def first_lr(self, param_norm: float, direction_norm: float) -> float:
        """The rate of step 1."""
        self._first_direction, self.first = direction_norm, 1e-4 * (param_norm or 1.0) / direction_norm
        return self.first

    def part_kept(self, lr: float, t: int, stride: int = 1) -> float:
        """How much of E is left where the next moves come in, which are made at ``lr``."""
        part = 0.0 if self.forgets else (1 - 1 / max(450.0, t / 2)) ** stride
        self.forgets = False
        if self._remembered:
            logs, weights = np.array(self._remembered).T
            part *= np.exp(-max(abs(np.log(lr) - np.dot(logs, weights) / np.sum(weights)) - 0.5, 0.0))
        self._remembered = [
            *((log, part * weight) for log, weight in self._remembered),
            (float(np.log(lr)), float(stride)),
        ]
        return float(part)

    def held_back(self, lr: float, t: int, loss: float, slope: float, stride: int = 1) -> float:
        """The rate of step t, once its loss is known: 1/√2 of that of the best tenth, where the loss rises."""
        self.ceiling *= (1 + 1 / t) ** stride
        self._block.append((loss, float(np.log(lr)), slope))
        self._block_steps += stride
        if len(self._block) >= 10 and self._block_steps >= t / 10:
            losses, logs, slopes = np.array(self._block).T
            mean, error = float(np.mean(losses)), float(np.var(losses, ddof=1) / len(losses))
            self._block, self._block_steps, best = [], 0, self._best
            rise = 0.0 if best is None else mean - best[0]
            risen = best is not None and rise > self._demand * np.sqrt(error + best[1])
            self.ceiling *= 2 if rise < 0 and self._trial is None else 1
            if best is None or risen or rise < 0:
                self._best = (mean, error, float(np.mean(logs)))
            if self._trial is not None:
                tried, self._trial = self._trial, None
                if mean >= tried[0] - np.sqrt(error + tried[1]):
                    self._best, self._demand, self.ceiling = (mean, error, tried[2]), 2 * self._demand, np.inf
                    self._forget()
                    self.undone.append(t)
                    return max(lr, float(np.exp(tried[2])))
            elif best is not None and risen and np.sum(slopes) >= -2 * np.sqrt(np.sum(slopes**2)):
                lower = float(np.exp(best[2]) / np.sqrt(2))
                if lower < lr:
                    self._trial, self.ceiling = (mean, error, float(np.log(lr))), lower
                    self._best = (mean, error, float(np.log(lower)))
                    self._forget()
                    self.retreats.append(t)
        return min(lr, self.ceiling)

    def _forget(self) -> None:
        self._remembered, self.forgets = [], True

    def sigmas(self) -> float:
        """The mean of the greedy cosines over its standard error."""
        if len(self._greedy) < 4:
            return 0.0
        cosines, parts = np.array(self._greedy).T
        weights = newest_weights(list(parts))
        mean = np.dot(weights, cosines)
        variance = max(np.dot(weights, cosines**2) - mean**2, (2.0**-23 * mean) ** 2)
        return float(mean / np.sqrt(variance * np.sum(weights**2))) if variance else 0.0

    def _product(self, shown: Shown, t: int, stride: int) -> float:
        """Minus the derivative, past the noise and round the bend."""
        self._turns.append(shown.turn)
        self._turn_steps += stride
        self._turn_parts.append(stride / min(self._turn_steps, 20))
        if shown.move_norm:
            cosine = -shown.slope / (shown.g_norm * shown.move_norm)
            self._greedy.append((cosine, 1 / min(len(self._greedy) + 1, max(10.0, t / 50 / stride))))
        turn = self.turn = np.dot(newest_weights(self._turn_parts), self._turns)
        late = shown.product if shown.late is None else shown.late
        product = late + np.clip((-turn - 0.1) / 0.5, 0, 1) * (shown.product - late)
        return float(max(product, 0.0) if turn > 0.8 or self.sigmas() > 2 else product)

    def next_lr(self, lr: float, t: int, shown: Shown, stride: int = 1) -> float:
        """The rate of step t, before what is left of a brake. The last look was ``stride`` steps before."""
        self.slope = 0.0
        g_norm, d_norm = shown.g_norm, shown.d_norm
        bound = self.normalized and self._first_direction and shown.param_norm
        limit = 0.3 * shown.param_norm / self._first_direction if bound else np.inf
        if g_norm and not d_norm:
            rises = g_norm >= 10 * 2.0**-23 * self.largest
            return float(min(lr * np.exp(0.5), max(lr, limit))) if rises else lr
        if g_norm == 0:
            return lr
        self._memories.append((1 - 1 / max(10.0, t / 50)) ** stride)
        self._squared_norms.append(g_norm**2)
        usual_norm = np.sqrt(faded_mean(self._squared_norms, self._memories))
        self.norm = usual_norm * np.sqrt(1 - np.prod(self._memories))
        self._cosines.append(self._product(shown, t, stride) / (usual_norm * d_norm))
        before = self._cosines[-2] if len(self._cosines) > 1 else 0.0
        bent = self._cosines[-1] + 0.3 * min(1.0, 100 / t) * abs((self._cosines[-1] + before) / 2)
        self._bent.append(stride * bent)
        self._parts.append((1 - 1 / 60) ** stride)
        left = np.append(np.cumprod(self._parts[:0:-1])[::-1], 1.0)  # of each square
        squares = float(np.dot(np.square(self._bent), left))
        change = min(1.0, 900 / t) * bent / np.sqrt(squares) if squares else 0.0
        log_norm, excess, resolved = float(np.log(g_norm)), 0.0, 10 * 2.0**-23 * self.largest
        if len(self._logs) >= 2:
            rise = log_norm - faded_mean(self._logs, [0.9] * len(self._logs))
            usual = max(np.log(2.5), 3 * np.sqrt(self._variance))
            self._variance = 0.995 * self._variance + 0.005 * min(max(rise, 0.0), 1.5 * usual) ** 2
            far = min(log_norm, self._logs[-1]) - faded_mean(self._logs, [0.99] * len(self._logs)) - self.far
            excess = max(rise - usual, far, 0.0)
        self.highest -= 0.005
        fell = self.leap * min(excess, 1.0) * (log_norm > max(self.highest, self._logs[-1] if self._logs else 0.0))
        self._logs.append(log_norm)
        released = 0.95
        if shown.move_norm and len(self._logs) > 1:
            length = float(np.log(shown.move_norm / lr) + self.brake - self._logs[-2])
            usual_length = faded_mean(self._lengths, [0.99] * len(self._lengths)) if self._lengths else length
            long = length - usual_length > np.log(2)
            usual_step = usual_length + faded_mean(self._logs[:-1], [0.99] * (len(self._logs) - 1))
            short = length + self._logs[-2] - usual_step < self.brake - np.log(8)
            released = 1.0 if self.brake > 2 and long and not short else 0.95
            self._lengths.append(min(length, usual_length + float(np.log(2))))
        self.brake = max(released * self.brake, min(excess, self.longest_brake))
        self.leap = max(0.5 * self.leap, min(excess, 1.0))
        if excess:
            if self.quiet >= 20:
                self._fast_to, self.highest = lr / 2, log_norm
            self.quiet, self.highest = 0, max(self.highest, log_norm)
            self.braked.append(t)
            return float(max(lr * np.exp(-fell), min(lr, self.first)))
        self.quiet += stride
        self.largest = max(self.largest, g_norm)
        self._seen_lrs.append(lr)
        highest_lr = max(self._seen_lrs)
        self._long |= highest_lr >= 300 * self.first
        self._long |= highest_lr >= 30 * self.first and shown.move_norm >= 0.006 * shown.param_norm
        if usual_norm < resolved or g_norm < resolved:
            return float(max(lr * np.exp(-0.01 * stride), min(lr, self.first or lr)))
        cap = (self.careful_cap if self._long else 0.5) * min(1.0, 100 / t)
        if self.turn > 0.8:
            cap = max(cap, 0.1)
        if self.sigmas() > 2 and lr < min(self._fast_to, max(self._seen_lrs)):
            cap = max(cap, 0.1)
            if self.brake < 0.1:
                change = max(change, 0.1 * min(1.0, (self.sigmas() - 2) / 8))
            self.ceiling = max(self.ceiling, 2 * lr)
        means = [faded_mean(self._logs, [memory] * len(self._logs)) for memory in (0.9, 0.99)]
        lowest = -max(cap, 0.1) if means[0] - means[1] > np.log(2) else -cap
        highest = max(cap, min(0.1, self._fallen / stride)) if lr < self._fast_to else cap
        self.slope = float(g_norm / usual_norm / np.sqrt(squares)) if squares else 0.0
        change = float(np.clip(min(change, np.log(limit / lr) / stride), lowest, highest))
        self._fallen += stride * (np.clip(change, -cap, cap) - change)
        return float(lr * np.exp(stride * change))


class Looked(NamedTuple):
    """What a look has shown: norms of ``g``, ``E``, the last move and ``θ``, products with ``g``, the mean loss."""

    g_norm: float
    sum_norm: float
    move_norm: float
    param_norm: float
    sum: float
    late: float
    slope: float
    turn: float
    loss: float | None
    stride: int


def apart_at(t: int, rule: AutoRule) -> int:
    """How many steps looks are apart: a power of two, by the steps of the run and since the last leap."""
    if t < 500 or rule.norm < 0.01 * rule.largest:
        return 1
    return max(n for n in (1, 2, 4, 8) if n == 1 or n <= min(t / 125, rule.quiet / 60))


def train_auto(
    method: str,
    settings: dict[str, Any] | None = None,
    weight_decay: float = 0.0,
    steps: int = STEPS,
    leaps: Mapping[int, float] | None = None,
    first_lr: float | None = None,
    report: Callable[[int, float], float] | None = None,
    cooldown: float = 0.0,
) -> tuple[list[float], list[Array], AutoRule]:
    """Learning rate of every step with the rule auto, the parameters after the last, and the rule.

    ``report`` gives the loss that is reported, from the step and its loss. ``cooldown`` is the part of the steps over
    which the rates fall at the end. ``weight_decay`` is decoupled, as in AdamW. ``leaps`` are factors of the loss in
    some steps. ``first_lr`` is the configured rate, for ``start="configured"``.
    """
    parameters = initial_parameters()
    direction = directions(method, settings or {})
    next(direction)
    data = batches()
    lr, rule = first_lr or 0.0, AutoRule(method.startswith("adam"), steps if cooldown else np.inf)
    moves = [np.zeros_like(p) for p in parameters]  # E
    late, move, last = moves, moves, moves  # Ē, the last move, and the last gradient
    lrs: list[float] = []
    rested, noted = 0, True  # steps since the last look, and whether the last step was noted for the next one
    losses: list[float] = []  # since the last look
    waiting: Looked | None = None  # a look that is read in the next step
    for t in range(1, steps + 1):
        loss, g = network_loss(parameters, *data[(t - 1) % len(data)])
        g = [(leaps or {}).get(t, 1.0) * x for x in g]
        length = cooldown * steps
        fall = 1 - np.sqrt(1 - min(1.0, (steps - t + 1) / length)) if cooldown else 1.0
        window = max(1.0, min(0.05 * min(length, steps - t + 1), t / 5))
        losses += [report(t, float(loss))] if report else []
        rested += 1
        apart = apart_at(t, rule)
        seen, waiting = waiting, None
        stride = rested if rested >= apart and noted else 0
        noted = stride > 0 or rested + 1 >= apart
        if stride and t > 1:
            norms = norm(g), norm(moves), norm(move), norm(parameters)
            products = dot(g, moves), dot(g, late), dot(g, move), dot(g, last) / (norm(g) * norm(last))
            waiting = Looked(*norms, *products, float(np.mean(losses)) if losses else None, stride)
            if apart == 1:
                seen, waiting = waiting, None
        if seen is not None:
            weight = 1 - (1 - 1 / window) ** seen.stride
            past = seen.late + weight * (seen.sum - seen.late)
            lengths = seen.move_norm, seen.param_norm
            shown = Shown(-seen.sum, seen.g_norm, seen.sum_norm, -past, seen.turn, seen.slope, *lengths)
            next_lr = rule.next_lr(lr, t, shown, seen.stride)
            lr = next_lr if fall == 1 else min(lr, next_lr)
            lr = lr if seen.loss is None else rule.held_back(lr, t, seen.loss, seen.slope, seen.stride)
        d = direction.send(g)
        d = [x + weight_decay * p for x, p in zip(d, parameters, strict=True)]
        if t == 1 and first_lr is None:
            lr = rule.first_lr(norm(parameters), norm(d))
        if stride:
            weight = 1 - (1 - 1 / window) ** stride
            late = [old + weight * (new - old) for old, new in zip(late, moves, strict=True)]
            part = rule.part_kept(lr * fall, t, stride)
            moves = [part * e for e in moves]
            rested, losses = 0, []
        used = lr * np.exp(-rule.brake) * fall
        move, last = [-used * x for x in d], g
        moves = [e + x for e, x in zip(moves, move, strict=True)]
        parameters = [p + x for p, x in zip(parameters, move, strict=True)]
        lrs.append(float(used))
    return lrs, parameters, rule


class Tuned:
    """An optimizer with any parameter groups, tuned: written from the docstrings of HypergradientLR and its rules.

    Beside its numbers are the sizes of what they were summed from: rounding is relative to those, where sums cancel.

    Args:
        method: As in :func:`directions`.
        settings: As in :func:`directions`, and ``maximize``, and ``decoupled`` for a weight decay as in AdamW.
        groups: The rate and the weight decay of each parameter group.
        values: The parameters, by group and place in it.
        arguments: Those of HypergradientLR.
    """

    def __init__(
        self,
        method: str,
        settings: dict[str, Any],
        groups: Sequence[tuple[float, float]],
        values: dict[tuple[int, int], Array],
        arguments: dict[str, Any],
    ) -> None:
        self.values = values
        self.sizes = {key: float(np.max(np.abs(x), initial=0.0)) for key, x in values.items()}
        self.lrs = [lr for lr, _ in groups]
        everything = range(len(groups))
        self.scopes = [[i] for i in everything] if arguments["scope"] == "group" else [list(everything)]
        self.alphas = [max(self.lrs[i] for i in members) for members in self.scopes]
        alone = 0.0 if any(self.lrs) else 1.0  # a group at 0 is frozen, unless all are at 0
        self.ratios = [  # of the groups' rates to those of their scopes
            self.lrs[i] / alpha if alpha else alone
            for members, alpha in zip(self.scopes, self.alphas, strict=True)
            for i in members
        ]
        self.steps = 0
        self.seen: list[tuple[float, float, float] | None] = [None] * len(self.scopes)  # h, ‖g‖, ‖d‖
        self.seen_sizes = [(0.0, 0.0, 0.0)] * len(self.scopes)
        self._method, self._settings, self._decays = method, settings, [decay for _, decay in groups]
        self._rule, self._beta = arguments["rule"], arguments.get("hypergrad_lr", 0.0)
        self._low = -np.inf if arguments["min_lr"] is None else arguments["min_lr"]
        self._high = np.inf if arguments["max_lr"] is None else arguments["max_lr"]
        self._autos = [AutoRule(method.startswith("adam")) for _ in self.scopes]
        self._started = [self._rule != "auto" for _ in self.scopes]
        self._since = [0] * len(self.scopes)  # steps before the rule started
        self._updated: set[tuple[int, int]] = set()  # parameters that had a gradient in a step
        self._directions: dict[tuple[int, int], Generator[list[Array], list[Array], None]] = {}
        self._last: dict[tuple[int, int], Array] = {}  # d_{t-1}, as the groups' rates follow their scopes', or -E_t
        self._moves: dict[tuple[int, int], Array] = {}  # the last moves, of groups whose rates follow their scopes'
        self._gradients: dict[tuple[int, int], Array] = {}  # the last gradients
        self._lengths = [0.0] * len(self.scopes)  # the longest that it has been, or what its rounding is relative to
        self._moved = [False] * len(self.scopes)
        self._errors = [0.0] * len(self.scopes)
        self._drifts = [0.0] * len(self.scopes)  # how far the parameters are off, because rates are

    def error(self, i: int) -> float:
        """By how much a group's rate is off, per relative error in what the observations were summed from."""
        s = i if len(self.scopes) > 1 else 0
        return self.ratios[i] * self._errors[s] * (1.0 if self._rule == "additive" else self.alphas[s])

    def step(self, gradients: dict[tuple[int, int], Array]) -> None:
        """One step. It is none where there is no gradient at all.

        Nor is it one where all rates and gradients are 0, before the first step or while the optimizer has no state.
        """
        if not gradients:
            return
        stateless = self.steps == 0 or self._method == "sgd"
        if stateless and not any(self.lrs) and not any(x.any() for x in gradients.values()):
            for key, x in gradients.items():  # the optimizer makes its state
                self._direction(
                    key, x + self._decays[key[0]] * self.values[key] * (not self._settings.get("decoupled"))
                )
            return
        if self._rule == "auto":
            self._join(gradients)
        self.steps += 1
        sign = -1.0 if self._settings.get("maximize") else 1.0
        decays = {key: self._decays[key[0]] * self.values[key] for key in gradients}
        coupled = 0.0 if self._settings.get("decoupled") else 1.0
        g = {key: sign * x + coupled * decays[key] for key, x in gradients.items()}
        for s, members in enumerate(self.scopes):
            self._observe(s, {key: x for key, x in g.items() if key[0] in members})
        self._gradients = g
        d = {key: self._direction(key, x) + (1 - coupled) * decays[key] for key, x in g.items()}
        moved = set(d)
        for s, members in enumerate(self.scopes):
            moving = {key for key in d if key[0] in members and self.ratios[key[0]]}
            if self._started[s]:
                continue
            if any(gradients[key].any() for key in moving):
                self._start(s, {key: self.ratios[key[0]] * d[key] for key in moving})
            else:
                moved -= moving
        self._move({key: d[key] for key in d if key in moved})

    def _join(self, gradients: dict[tuple[int, int], Array]) -> None:
        """A scope of which a tenth or more has a gradient for the first time starts anew."""
        for s, members in enumerate(self.scopes):
            sizes = {key: x.size for key, x in gradients.items() if key[0] in members}
            new = sum(size for key, size in sizes.items() if key not in self._updated)
            if self._started[s] and sizes and new >= 0.1 * sum(sizes.values()):
                self._autos[s], self._started[s], self._moved[s], self._since[s] = (
                    AutoRule(self._method.startswith("adam")),
                    False,
                    False,
                    self.steps,
                )
                self._last = {key: x for key, x in self._last.items() if key[0] not in members}
        self._updated |= set(gradients)

    def _direction(self, key: tuple[int, int], g: Array) -> Array:
        if key not in self._directions:
            self._directions[key] = directions(self._method, self._settings)
            next(self._directions[key])
        (d,) = self._directions[key].send([g])
        return np.asarray(d)

    def _observe(self, s: int, g: dict[tuple[int, int], Array]) -> None:
        """The next α of a scope."""
        known = [key for key in g if key in self._last]
        self.seen[s] = None
        if not any(self.ratios[i] for i in self.scopes[s]):
            return
        if known:
            product = dot([g[key] for key in known], [self._last[key] for key in known])
            g_norm, d_norm = norm(g.values()), norm(self._last[key] for key in known)
            moved = self._moved[s] if self._rule == "auto" else any(self.lrs[i] for i in self.scopes[s])
            if d_norm == 0 and not moved:  # there was no update to judge
                self._clamp(s)
                return
            g_size = g_norm + sum(self._decays[key[0]] * self.sizes[key] * g[key].size for key in g)
            size = g_size * self._lengths[s]
            drift, length = self._drifts[s], self._lengths[s]
            self.seen[s] = (-product, g_norm, d_norm)
            self.seen_sizes[s] = (size + g_size * drift, g_size, length + drift)
            cosine, cosine_error = (x / (g_norm * d_norm or 1.0) for x in (product, size))
            if self._rule == "additive":
                self.alphas[s] += self._beta * product
                self._errors[s] += self._beta * size
            elif self._rule == "multiplicative":
                self.alphas[s] *= 1 + self._beta * cosine
                self._errors[s] += self._beta * cosine_error
            else:
                move = {key: x for key, x in self._moves.items() if key in g}
                last = {key: x for key, x in self._gradients.items() if key[0] in self.scopes[s]}
                turn = dot([g[key] for key in g if key in last], [last[key] for key in g if key in last])
                norms = g_norm * norm(last.values())
                shown = Shown(
                    product,
                    g_norm,
                    d_norm,
                    turn=turn / norms if norms else 0.0,
                    slope=dot([g[key] for key in move], list(move.values())),
                    move_norm=norm(move.values()),
                    param_norm=norm(x for key, x in self.values.items() if key[0] in self.scopes[s]),
                )
                self.alphas[s] = self._autos[s].next_lr(self.alphas[s], self.steps - self._since[s], shown)
                self._errors[s] += self._autos[s].slope * cosine_error
        self._clamp(s)

    def _clamp(self, s: int) -> None:
        """No further out than where all groups are clamped."""
        ratios = [self.ratios[i] for i in self.scopes[s] if self.ratios[i]]
        low, high = min(self._low / ratio for ratio in ratios), max(self._high / ratio for ratio in ratios)
        self.alphas[s] = min(max(self.alphas[s], low), high)

    def _start(self, s: int, d: dict[tuple[int, int], Array]) -> None:
        if length := norm(d.values()):
            self.alphas[s] = self._autos[s].first_lr(norm(self.values[key] for key in d), length)
            self._clamp(s)
            self._started[s] = True

    def _move(self, d: dict[tuple[int, int], Array]) -> None:
        weights = list(self.ratios)
        for s, members in enumerate(self.scopes):
            free = {i: self.ratios[i] * self.alphas[s] * np.exp(-self._autos[s].brake) for i in members}
            within = [i for i in members if self.ratios[i] and self._low <= free[i] <= self._high]
            for i in members:
                self.lrs[i] = min(max(free[i], self._low), self._high) if self.ratios[i] else 0.0
                weights[i] = self.ratios[i] if i in within or not within else 0.0
        auto = self._rule == "auto"
        parts = [
            rule.part_kept(alpha, self.steps - since) if auto and started else 0.0
            for rule, alpha, since, started in zip(self._autos, self.alphas, self._since, self._started, strict=True)
        ]
        of_group = [s for s, members in enumerate(self.scopes) for _ in members]
        self._last = {key: parts[of_group[key[0]]] * x for key, x in self._last.items()} if auto else {}
        self._moved = [
            self._started[s] and any(key[0] in members and weights[key[0]] and self.lrs[key[0]] for key in d)
            for s, members in enumerate(self.scopes)
        ]
        self._moves = {key: -bool(weights[key[0]]) * self.lrs[key[0]] * x for key, x in d.items()}
        for key, x in d.items():
            i = key[0]
            self.values[key] = self.values[key] - self.lrs[i] * x
            if auto:
                followed = bool(weights[i])
                self._last[key] = followed * (self._last.get(key, np.zeros_like(x)) + self.lrs[i] * x)
            else:
                self._last[key] = weights[i] * x
            largest, longest = (float(np.max(np.abs(y), initial=0.0)) for y in (self.values[key], x))
            self.sizes[key] = max(self.sizes[key], largest) + (abs(self.lrs[i]) + abs(self.error(i))) * longest
        for s, members in enumerate(self.scopes):
            length = norm(x for key, x in self._last.items() if key[0] in members)
            if auto:  # a difference of parameters
                length += norm(x for key, x in self.values.items() if key[0] in members)
            self._drifts[s] += norm(self.error(key[0]) * x for key, x in d.items() if key[0] in members)
            self._lengths[s] = max(self._lengths[s], length)


def torch_network() -> nn.Sequential:
    """The same network in torch, with the same initial parameters."""
    network = nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUTPUTS)).double()
    with torch.no_grad():
        for p, value in zip(network.parameters(), initial_parameters(), strict=True):
            p.copy_(torch.from_numpy(value))
    return network


def torch_loss(network: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The same loss in torch."""
    loss: torch.Tensor = 0.5 * (network(x) - y).square().sum(dim=1).mean()
    return loss


@functools.cache
def torch_batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The same batches in torch. They must not be changed."""
    return [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in batches()]
