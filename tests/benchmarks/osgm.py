r"""Online scaled gradient methods: a step size that follows its normalized hypergradient by AdaGrad.

Source: "Provable and Practical Online Learning Rate Adaptation with Hypergradient Descent" (Chu, Gao, Ye, Udell; ICML
2025; arXiv 2502.11229), where the method is called HDM; arXiv 2509.11007, by the same authors, calls it OSGM.

.. math::

    x^+ &= x - P ∇f(x) + β (x - x^-), \qquad h(P, β) = \frac{f(x^+) - f(x)}{‖∇f(x)‖^2} \\
    P &← \Bigl[P - η_P \frac{∂h/∂P}{\sqrt{\sum (∂h/∂P)^2}}\Bigr]_{≥0}, \qquad
    ∂h/∂P = -\frac{∇f(x^+) · ∇f(x)}{‖∇f(x)‖^2} \\
    β &← \Bigl[β - η_β \frac{∂h/∂β}{\sqrt{\sum (∂h/∂β)^2}}\Bigr]_{[0, 0.9995]}, \qquad
    ∂h/∂β = \frac{∇f(x^+) · (x - x^-)}{‖∇f(x)‖^2}

``P`` starts at 0. It is a scalar, or a diagonal matrix, for which the product in ``∂h/∂P`` is taken by coordinates.
Without heavy ball, ``β`` is 0. Where ``f(x^+)`` is not below ``f(x)``, ``x`` stays where it is (the null step), while
``P`` and ``β`` move.

What could be read was the paper's abstract and the code of its authors' experiments, not the paper's text. From that
code come ``η_P`` of 10 over the gradient's Lipschitz constant, or 0.1 where that is not known; ``η_β`` of 10 and a
first ``β`` of 0.95; the bounds; ``x^- = x`` after a null step, so that the momentum starts anew; and, with gradients of
batches, a second evaluation on the step's own batch. The paper's heavy-ball form has two constants more: ``h`` is that
of a potential ``f(x) + ω/2 ‖x - x^-‖²`` and is divided by ``‖∇f(x)‖² + τ/2 ‖x - x^-‖²``. In the code ``ω`` is 0, and so
is ``τ`` for the first 200 steps at least: here both are 0. What the code does beyond the paper's abstract is left out:
it lowers ``η_P`` by a fifth every 50 steps, and sets it anew from an estimate of the curvature.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim import Optimizer

from lightning_hd import Context, Observation, Rule

Oracle = Callable[[Tensor], tuple[Tensor, Tensor]]
"""The loss of the present batch, and its gradient, at a point."""

ETA, ETA_BETA, FIRST_BETA, LARGEST_BETA = 0.1, 10.0, 0.95, 0.9995
_TINY = 1e-12


class AdaGrad:
    """The online learner: a number, or a vector of them, that moves against its slopes, within bounds."""

    def __init__(self, value: Tensor, rate: float, largest: float | None = None) -> None:
        self.value, self.rate, self.largest = value, rate, largest
        self._squares = torch.zeros_like(value)

    def follow(self, slope: Tensor) -> None:
        self._squares = self._squares + slope**2
        self.value = (self.value - self.rate * slope / (self._squares.sqrt() + _TINY)).clamp(0, self.largest)


class OSGM(Optimizer):
    """Gradient descent, or heavy ball, with a learned step size.

    Args:
        params: The parameters.
        oracle: Evaluates the loss at ``x^+``, once per step; :meth:`observe` gives that at ``x``.
        eta: ``η_P``.
        diagonal: A step size for each coordinate.
        eta_beta: ``η_β``; ``None``: no heavy ball.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        oracle: Oracle,
        eta: float = ETA,
        diagonal: bool = False,
        eta_beta: float | None = None,
    ) -> None:
        self._params = list(params)
        super().__init__(self._params, {})
        self._oracle, self._diagonal = oracle, diagonal
        self._before = parameters_to_vector(self._params).detach()  # x^-
        zero = self._before.new_zeros(())
        self.step_size = AdaGrad(torch.zeros_like(self._before) if diagonal else zero, eta)
        self.momentum = AdaGrad(zero + FIRST_BETA, eta_beta, LARGEST_BETA) if eta_beta else AdaGrad(zero, 0.0)
        self._loss = zero

    def observe(self, loss: Tensor) -> None:
        """``f(x)``, the loss at the present parameters."""
        self._loss = loss.detach()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        here, gradient = parameters_to_vector(self._params), flat_gradient(self._params)
        momentum = here - self._before
        there = here - self.step_size.value * gradient + self.momentum.value * momentum
        loss, next_gradient = self._oracle(there)
        scale = gradient.square().sum()
        if scale > 0:
            product = next_gradient * gradient
            self.step_size.follow(-(product if self._diagonal else product.sum()) / scale)
            self.momentum.follow(next_gradient.dot(momentum) / scale)
        self._before = here
        if loss < self._loss:
            vector_to_parameters(there, self._params)


class OSGMRule(Rule):
    """The scalar form as a rule of lightning_hd, which has gradients only: without null steps.

    The next gradient stands for the one at ``x^+``, and the direction of the last step for ``∇f(x)``, which it is for
    SGD without momentum.

    Args:
        eta: ``η_P``.
    """

    def __init__(self, eta: float) -> None:
        self.eta, self.squares = eta, 0.0

    def update(self, lr: float, seen: Observation, context: Context) -> float:
        if seen.direction_norm == 0:
            return lr
        slope = seen.hypergradient / seen.direction_norm**2
        self.squares += slope**2
        return max(lr - self.eta * slope / (math.sqrt(self.squares) + _TINY), 0.0)


def flat_gradient(params: Iterable[nn.Parameter]) -> Tensor:
    """All gradients as a vector."""
    return parameters_to_vector([torch.zeros_like(p) if p.grad is None else p.grad for p in params])
