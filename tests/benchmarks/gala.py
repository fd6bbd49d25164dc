r"""GALA: the rate of SGD by follow-the-regularized-leader on the alignment of gradients and a local curvature.

Source: "Online Learning-guided Learning Rate Adaptation via Gradient Alignment" (Jiang, Kavis, Mokhtari; arXiv
2506.08419), in the practical form of its section 5.1, for ``x_{t+1} = x_t - η_t g_t`` with the batches ``ξ_t``:

.. math::

    g_t &= ∇f(x_t; ξ_t), \qquad g'_t = ∇f(x_t; ξ_{t+1}), \qquad
    L_t = \frac{‖g_{t+1} - g'_t‖}{‖x_{t+1} - x_t‖} \\
    ℓ_t(η) &= -η \, g_{t+1} · g'_t + \frac{η^2}{2} L_t ‖g_t‖^2 \\
    η_{t+1} &= \arg\min_{η ≥ 0} \frac{δ}{2} (η - η_0)^2 + \sum_{s ≤ t} ℓ_s(η)
    = \Bigl[\frac{δ η_0 + \sum g_{s+1} · g'_s}{δ + \sum L_s ‖g_s‖^2}\Bigr]_{≥0}

So each step takes a second gradient: that of its own batch at the last parameters.

The paper's text could not be had. What could be read is its abstract; the reviews of it on openreview.net, which name
the parts of the loss, ``δ`` and ``η_0``, and say that in practice there is no upper bound on the rate; and a public
description of the quotient of sums. The rest is this project's reading: that ``δ`` weighs the distance to ``η_0``, with
the small value below, so that ``η_0`` is the first step's and of little account later; and that a rate below 0 is 0.
There, nothing moves, and ``L_t``, which is 0 over 0, keeps its last value. The paper has a form for Adam too, of which
no description was found: it is left out.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector
from torch.optim import SGD, Optimizer

from tests.benchmarks.osgm import Oracle, flat_gradient

FIRST_RATE, DELTA = 1e-3, 1e-8


class GALA:
    """Sets the rate of an optimizer before each of its steps.

    Args:
        optimizer: Plain SGD.
        oracle: The gradient of the present batch, at any point; it is asked once per step.
        first_rate: ``η_0``.
        delta: ``δ``.
    """

    def __init__(self, optimizer: SGD, oracle: Oracle, first_rate: float = FIRST_RATE, delta: float = DELTA) -> None:
        self._params = [p for group in optimizer.param_groups for p in group["params"]]
        self._oracle = oracle
        self._before = parameters_to_vector(self._params).detach()  # x_t
        self._used: Tensor | None = None  # ‖g_t‖²
        self._curvature = self._before.new_zeros(())  # L_t
        self._aligned, self._curved = delta * first_rate, delta  # the two sums
        self.rate = first_rate
        optimizer.register_step_pre_hook(self._set_rate)

    @torch.no_grad()
    def _set_rate(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        here, gradient = parameters_to_vector(self._params), flat_gradient(self._params)
        _, former = self._oracle(self._before)
        if self._used is not None:
            moved = (here - self._before).norm()
            if moved > 0:
                self._curvature = (gradient - former).norm() / moved
            self._aligned += float(gradient.dot(former))
            self._curved += float(self._curvature * self._used)
            self.rate = max(self._aligned / self._curved, 0.0)
        self._before, self._used = here, gradient.square().sum()
        for group in optimizer.param_groups:
            group["lr"] = self.rate
