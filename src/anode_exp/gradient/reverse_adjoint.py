"""The reverse-time adjoint of Neural ODEs: the state is solved backwards, beside the continuous adjoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from anode_exp.gradient.base import ThetaGradient, current_autocast
from anode_exp.ode import ExplicitRungeKutta, Theta, TimeGrid, VectorField, integrate, weighted_sum


class ReverseAdjoint:
    """Optimise-then-discretise with the trajectory rebuilt from y(t1): Neural ODE's memory-free gradient.

    Backwards in time, with the forward solve's method and grid:
        dy/dt = f(t, y, θ),   dα/dt = −(∂f/∂y)ᵀ α,   dg/dt = −(∂f/∂θ)ᵀ α,   α(t1) = ∂J/∂y(t1), g(t1) = 0;
    then ∂J/∂y0 = α(t0) and ∂J/∂θ = g(t0).

    It holds y(t1) alone and the graph of one evaluation, L activations; the backward pass evaluates f s N times a
    block. It is not the gradient of the discrete solve: the backward solve does not retrace y, and the continuous
    adjoint does not belong to the discrete method. It is here because that is what ANODE argues against.

    Source: Neural ODE (arXiv 1806.07366) Alg. 1; ANODE (arXiv 1902.10298) Eq. 5.
    """

    def solve(self, field: VectorField, y0: Tensor, theta: Theta, grid: TimeGrid, solver: ExplicitRungeKutta) -> Tensor:
        return _ReverseAdjoint.apply(field, grid, solver, y0, *theta)


class _ReverseAdjoint(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, field: VectorField, grid: TimeGrid, solver: ExplicitRungeKutta, y0: Tensor, *theta: Tensor
    ) -> Tensor:
        y1 = integrate(field, y0, theta, grid, solver)
        ctx.field, ctx.grid, ctx.solver = field, grid, solver
        ctx.autocast = current_autocast(y0.device.type)
        ctx.save_for_backward(y1, *theta)
        return y1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y1: Tensor) -> tuple[Any, ...]:
        y, *saved = ctx.saved_tensors
        field: VectorField = ctx.field
        grid: TimeGrid = ctx.grid
        gradient = ThetaGradient(saved, ctx.needs_input_grad[4:])
        per_step = gradient.per_step(field, grid.n_steps)
        a = grad_y1
        with ctx.autocast(), field.re_evaluation():
            for n in reversed(range(grid.n_steps)):
                y, a, g = _augmented_step(field, per_step[n], grid.time(n + 1), -grid.h, y, a, ctx.solver)
                gradient.add(n, g)
        return None, None, None, a, *gradient.result


def _augmented_step(
    field: VectorField, theta: Theta, t: float, h: float, y: Tensor, a: Tensor, solver: ExplicitRungeKutta
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """One step of the augmented system from t to t + h (h < 0): y(t + h), α(t + h), and the increment of g.

    g is a quadrature: no right-hand side depends on it, so its stage values are never formed.
    """
    tableau = solver.tableau
    dy: list[Tensor] = []
    da: list[Tensor] = []  # −dα/dt: what autograd returns, so that −h stands beside it
    g: list[Tensor] = []
    for row, b, c in zip(tableau.a, tableau.b, tableau.c, strict=True):
        y_i, a_i = weighted_sum(y, h, row, dy), weighted_sum(a, -h, row, da)
        f, a_dfdy, a_dfdtheta = field.vjp(t + c * h, y_i, theta, a_i)
        dy.append(f)
        da.append(a_dfdy)
        if b != 0.0:
            weighted = [x * (-h * b) for x in a_dfdtheta]
            g = [total.add_(x) for total, x in zip(g, weighted, strict=True)] if g else weighted
    return weighted_sum(y, h, tableau.b, dy), weighted_sum(a, -h, tableau.b, da), tuple(g)
