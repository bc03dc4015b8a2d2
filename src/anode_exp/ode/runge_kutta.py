"""One explicit Runge–Kutta step, made from a tableau."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from anode_exp.ode.tableau import ButcherTableau
from anode_exp.ode.vector_field import Theta, VectorField


def weighted_sum(y: Tensor, h: float, weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    """y + h Σ_i w_i k_i, one fused multiply-add a non-zero weight."""
    for w, k in zip(weights, slopes, strict=True):
        if w != 0.0:
            y = torch.add(y, k, alpha=h * w)
    return y


class ExplicitRungeKutta:
    """Solver of dy/dt = f(t, y, θ) by the explicit Runge–Kutta method of a tableau, θ constant within a step.

    Stages that the solution does not use (those of an embedded error estimate) are not evaluated on a fixed grid.
    """

    def __init__(self, tableau: ButcherTableau) -> None:
        self.tableau = tableau.without_unused_stages()

    def step(self, field: VectorField, theta: Theta, t: float, h: float, y: Tensor) -> Tensor:
        """y(t + h) from y(t); ``tableau.stages`` evaluations of f."""
        slopes: list[Tensor] = []
        for c, row in zip(self.tableau.c, self.tableau.a, strict=True):
            slopes.append(field(t + c * h, weighted_sum(y, h, row, slopes), theta))
        return weighted_sum(y, h, self.tableau.b, slopes)
