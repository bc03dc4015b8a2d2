"""The reverse-time adjoint of Neural ODEs: the state is solved backwards, together with the continuous adjoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from anode_exp.gradient.base import ThetaGradient, current_autocast, explicit
from anode_exp.ode import (
    ButcherTableau,
    Solver,
    StepController,
    Steps,
    Theta,
    TimeGrid,
    Tolerance,
    VectorField,
    check_evaluations,
    solve_forward,
    weighted_sum,
)


class ReverseAdjoint:
    """Optimise-then-discretise with the trajectory rebuilt from y(t1): the memory-free gradient of Neural ODEs.

    Backwards in time, with the forward solve's method:
        dy/dt = f(t, y, θ),   dα/dt = −(∂f/∂y)ᵀ α,   dg/dt = −(∂f/∂θ)ᵀ α,   α(t1) = ∂J/∂y(t1), g(t1) = 0;
    then ∂J/∂y0 = α(t0) and ∂J/∂θ = g(t0). A fixed grid is used in reverse; with a tolerance the augmented system finds
    its own steps, and its error is the largest root mean square over y, α and each entry of g, as in torchdiffeq.

    It holds only y(t1) and the graph of one evaluation, L activations; the backward pass evaluates f s N times per
    block on a fixed grid. It is not the gradient of the discrete solve: the backward solve does not retrace y, and the
    continuous adjoint is not that of the discrete method. It is included because ANODE argues against it.

    Source: Neural ODE (arXiv 1806.07366) Alg. 1; ANODE (arXiv 1902.10298) Eq. 5.
    """

    def solve(self, field: VectorField, y0: Tensor, theta: Theta, grid: TimeGrid | Tolerance, solver: Solver) -> Tensor:
        return _ReverseAdjoint.apply(field, grid, solver, y0, *theta)


class _ReverseAdjoint(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, field: VectorField, grid: TimeGrid | Tolerance, solver: Solver, y0: Tensor, *theta: Tensor
    ) -> Tensor:
        ctx.field, ctx.grid, ctx.solver = field, grid, explicit(solver)
        y1, ctx.steps = solve_forward(field, y0, theta, grid, solver)
        ctx.autocast = current_autocast(y0.device.type)
        ctx.save_for_backward(y1, *theta)
        return y1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y1: Tensor) -> tuple[Any, ...]:
        y1, *theta = ctx.saved_tensors
        gradient = ThetaGradient(theta, ctx.needs_input_grad[4:])
        with ctx.autocast(), ctx.field.re_evaluation():
            if isinstance(ctx.grid, Tolerance):
                a = _adaptive(ctx.field, ctx.grid, ctx.steps, ctx.solver.embedded, y1, grad_y1, gradient)
            else:
                a = _fixed(ctx.field, ctx.grid, ctx.solver.tableau, y1, grad_y1, gradient)
        return None, None, None, a, *gradient.result


def _fixed(
    field: VectorField, grid: TimeGrid, table: ButcherTableau, y: Tensor, a: Tensor, gradient: ThetaGradient
) -> Tensor:
    """α(t0), over the forward grid from its end."""
    per_step = gradient.per_step(field, grid.n_steps)
    for n in reversed(range(grid.n_steps)):
        end = _augmented_step(field, per_step[n], grid.time(n + 1), -grid.step_size(n), y, a, table)
        y, a = end.y, end.a
        gradient.add(n, end.g)
        del end  # frees its slopes before the next step
    return a


def _adaptive(
    field: VectorField,
    tolerance: Tolerance,
    steps: Steps,
    table: ButcherTableau,
    y: Tensor,
    a: Tensor,
    gradient: ThetaGradient,
) -> Tensor:
    """α(t0), over adaptive steps; the first is as long as the forward solve's last."""
    (theta,) = gradient.per_step(field, 1)
    before = field.evaluations.total
    control = StepController(tolerance.t1, tolerance.t0, steps.sizes[-1], table.order, tolerance)
    first: Slopes | None = None
    while not control.done:
        check_evaluations(tolerance, field.evaluations.total - before, control.t)
        end = _augmented_step(field, theta, control.t, control.h, y, a, table, first)
        g = gradient.wanted
        after = [end.y, end.a, *torch._foreach_add(g, end.g)] if g else [end.y, end.a]
        accepted = control.judge(tolerance.error_norm(end.errors, [y, a, *g], after))
        field.count_step(accepted)
        if accepted:
            y, a, first = end.y, end.a, end.last
            gradient.add(0, end.g)
        else:
            first = end.first
        del end, after
    return a


Slopes = tuple[Tensor, Tensor, tuple[Tensor, ...]]
"""dy/dt, −dα/dt and −dg/dt: the last two as autograd returns them."""


@dataclass
class AugmentedStep:
    """y and α at a step's end, the increment of g, and for an embedded method the errors of all three.

    ``first`` are the slopes at its start, ``last`` those at its end, if the method evaluates them.
    """

    y: Tensor
    a: Tensor
    g: list[Tensor]
    errors: list[Tensor]
    first: Slopes
    last: Slopes | None


def _augmented_step(
    field: VectorField,
    theta: Theta,
    t: float,
    h: float,
    y: Tensor,
    a: Tensor,
    table: ButcherTableau,
    first: Slopes | None = None,
) -> AugmentedStep:
    """One step of the augmented system from t to t + h (h < 0), from its slopes ``first`` at t where they are known.

    g is a quadrature: no right-hand side depends on it, so its stage values are never formed.
    """
    dy: list[Tensor] = []
    da: list[Tensor] = []
    sums: list[list[Tensor]] = [[], []]  # of g's increment and of its error
    slopes: Slopes | None = first
    for i, (row, c) in enumerate(zip(table.a, table.c, strict=True)):
        if i > 0 or slopes is None:
            y_i, a_i = weighted_sum(y, h, row, dy), weighted_sum(a, -h, row, da)
            slopes = field.vjp(t + c * h, y_i, theta, a_i)
        if i == 0:
            first = slopes
        dy.append(slopes[0])
        da.append(slopes[1])
        for total, weights in zip(sums, (table.b, table.b_error), strict=True):
            if weights is None or weights[i] == 0.0 or not slopes[2]:
                continue
            if total:
                torch._foreach_add_(total, list(slopes[2]), alpha=-h * weights[i])
            else:
                total += torch._foreach_mul(slopes[2], -h * weights[i])
    assert first is not None
    errors: list[Tensor] = []
    if table.b_error is not None:
        zero = torch.zeros_like(y)
        errors = [weighted_sum(zero, h, table.b_error, dy), weighted_sum(zero, -h, table.b_error, da), *sums[1]]
    return AugmentedStep(
        weighted_sum(y, h, table.b, dy),
        weighted_sum(a, -h, table.b, da),
        sums[0],
        errors,
        first,
        slopes if table.first_same_as_last else None,
    )
