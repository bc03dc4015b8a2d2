"""Optimise-then-discretise on the trajectory of the forward solve: inconsistent, but without reversal errors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from anode_exp.gradient.base import ThetaGradient, current_autocast, explicit
from anode_exp.ode import (
    ButcherTableau,
    Solver,
    State,
    Steps,
    Theta,
    TimeGrid,
    Tolerance,
    VectorField,
    solve_forward,
    weighted_sum,
)


class StoredAdjoint:
    """The continuous adjoint, stepped backwards with the forward method along the states of the forward solve.

        dα/dt = −(∂f/∂y(y(t)))ᵀ α,   ∂J/∂θ = ∫ (∂f/∂θ(y(t)))ᵀ α dt,

    with y(t_n) from the forward pass and y at inner stage times from the cubic Hermite interpolant of the step's end
    states and slopes. For one Euler step α_0 = (I + h ∂f/∂y(y_1))ᵀ α_1 (ANODE Eq. 10), where the gradient of the
    discrete solve has the Jacobian at y_0 (Eq. 9). Its error is of the method's order in h: the second of the two
    faults that ANODE names, without the first.

    It keeps N states per block and holds the graph of one evaluation. The backward pass evaluates f sN times, and once
    more per step if the method has inner stages, for the slope at the step's start.

    Source: ANODE (arXiv 1902.10298) Sec. IV.
    """

    def solve(self, field: VectorField, y0: Tensor, theta: Theta, grid: TimeGrid | Tolerance, solver: Solver) -> Tensor:
        return _StoredAdjoint.apply(field, grid, solver, y0, *theta)


class _StoredAdjoint(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, field: VectorField, grid: TimeGrid | Tolerance, solver: Solver, y0: Tensor, *theta: Tensor
    ) -> Tensor:
        kept: list[State] = []
        ctx.field, ctx.table = field, explicit(solver).tableau
        y1, ctx.steps = solve_forward(field, y0, theta, grid, solver, kept)
        ctx.autocast = current_autocast(y0.device.type)
        ctx.save_for_backward(*(y for (y,) in kept), y1, *theta)
        return y1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y1: Tensor) -> tuple[Any, ...]:
        steps: TimeGrid | Steps = ctx.steps
        field: VectorField = ctx.field
        table: ButcherTableau = ctx.table
        states, theta = list(ctx.saved_tensors[: steps.n_steps + 1]), ctx.saved_tensors[steps.n_steps + 1 :]
        gradient = ThetaGradient(theta, ctx.needs_input_grad[4:])
        per_step = gradient.per_step(field, steps.n_steps)
        inner = any(0.0 < c < 1.0 for c in table.c)
        a = grad_y1
        with ctx.autocast(), field.re_evaluation():
            for n in reversed(range(steps.n_steps)):
                h, theta_n, right, left = steps.step_size(n), per_step[n], states.pop(), states[-1]
                left_slope = field(steps.time(n), left, theta_n).detach() if inner else None
                right_slope: Tensor | None = None
                da: list[Tensor] = []
                for row, b, c in zip(table.a, table.b, table.c, strict=True):
                    if c == 0.0:
                        y = right
                    elif c == 1.0:
                        y = left
                    else:
                        assert left_slope is not None and right_slope is not None
                        y = hermite(1.0 - c, h, left, left_slope, right, right_slope)
                    slope, a_dfdy, a_dfdtheta = field.vjp(
                        steps.time(n) + (1.0 - c) * h, y, theta_n, weighted_sum(a, h, row, da)
                    )
                    if right_slope is None:
                        right_slope = slope
                    da.append(a_dfdy)
                    if b != 0.0:
                        gradient.add(n, a_dfdtheta, h * b)
                a = weighted_sum(a, h, table.b, da)
        return None, None, None, a, *gradient.result


def hermite(u: float, h: float, y0: Tensor, dy0: Tensor, y1: Tensor, dy1: Tensor) -> Tensor:
    """The cubic through y0, y1 with slopes dy0, dy1 at the ends of a step of size h, at its fraction u; error O(h⁴)."""
    v = 1.0 - u
    return weighted_sum(
        y0 * (v * v * (1.0 + 2.0 * u)), 1.0, [u * u * (3.0 - 2.0 * u), h * u * v * v, -h * u * u * v], [y1, dy0, dy1]
    )
