"""The discrete adjoint of a whole trajectory, batched over its steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from anode_exp.gradient.base import ThetaGradient, WarmStart
from anode_exp.ode import (
    DiagonallyImplicitRungeKutta,
    ExplicitRungeKutta,
    Solver,
    State,
    Theta,
    TimeGrid,
    Tolerance,
    Trajectory,
    VectorField,
    adjoint_at_once,
    newton_at_once,
    solve_forward,
)


class BatchedAdjoint:
    """The exact discrete adjoint of Runge–Kutta steps, with f evaluated at all stages of all steps at once.

    For states of few numbers per sample, where a step costs little more than its kernel launches: all Jacobians of a
    trajectory come from one evaluation of f, and so do all products with ∂f/∂θ (``ode.at_once`` has the equations).
    All N s stage states are kept, and the backward pass holds the graph of all N s evaluations. f must not mix samples,
    and must accept a tensor of times, [rows, 1].

    With a ``WarmStart`` an implicit solve on fixed steps begins from the last solve's trajectory and uses Newton's
    method for all steps at once; if that does not converge, it is solved step by step. Its values equal those of the
    step-by-step solve to the tolerance of Newton's method.

    Source: PNODE (arXiv 2206.01298) for the adjoint of the steps.
    """

    def solve(self, field: VectorField, y0: Tensor, theta: Theta, grid: TimeGrid | Tolerance, solver: Solver) -> Tensor:
        return self.solve_through(field, y0, theta, [grid], solver)[0]

    def solve_through(
        self,
        field: VectorField,
        y0: Tensor,
        theta: Theta,
        grids: Sequence[TimeGrid | Tolerance],
        solver: Solver,
        warm_start: WarmStart | None = None,
    ) -> Tensor:
        """y at the end of every grid, [K, B, d], of one solve over consecutive grids.

        Args:
            y0: [B, d].
            theta: constant in time.

        Raises:
            ValueError: for a solver that is not Runge–Kutta, a state that is not [B, d], or a θ that changes per step.
        """
        if not isinstance(solver, ExplicitRungeKutta | DiagonallyImplicitRungeKutta):
            raise ValueError(f"{solver.name}: only Runge–Kutta methods have an adjoint that is batched over steps")
        if y0.dim() != 2:
            raise ValueError(f"a state of shape {tuple(y0.shape)}: the batched adjoint takes states [B, d]")
        if any(entry.shape != p.shape for entry, p in zip(theta, field.theta, strict=True)):
            raise ValueError("the batched adjoint needs a θ constant in time; use stage_checkpoint")
        return _SolveThrough.apply(field, grids, solver, warm_start, y0, *theta)


class _SolveThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        field: VectorField,
        grids: Sequence[TimeGrid | Tolerance],
        solver: ExplicitRungeKutta | DiagonallyImplicitRungeKutta,
        warm_start: WarmStart | None,
        y0: Tensor,
        *theta: Tensor,
    ) -> Tensor:
        found: Trajectory | None = None
        ends: tuple[int, ...] = ()
        if not isinstance(solver, DiagonallyImplicitRungeKutta):
            warm_start = None
        elif warm_start is not None:
            found, ends = _warm(field, grids, solver, warm_start, y0, theta)
        if found is None:
            found, ends = _step_by_step(field, grids, solver, y0, theta)
        if warm_start is not None:
            warm_start.trajectory, warm_start.ends = found, ends
        ctx.field, ctx.tableau, ctx.ends = field, solver.tableau, ends
        ctx.save_for_backward(found.times, found.sizes, found.stages, found.states, *theta)
        return found.states[list(ends)]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, a: Tensor) -> tuple[Any, ...]:
        times, sizes, stages, states, *theta = ctx.saved_tensors
        needed = ctx.needs_input_grad[4:]
        gradient = ThetaGradient(theta, needed[1:])
        gradients: list[Tensor | None] = [None] * len(states)
        for end, given in zip(ctx.ends, a.unbind(0), strict=True):
            gradients[end] = given
        steps = Trajectory(times, sizes, stages, states)
        with ctx.field.re_evaluation():
            of_y0, of_theta = adjoint_at_once(ctx.field, gradient.theta, ctx.tableau, steps, gradients)
        gradient.add(0, of_theta)
        return None, None, None, None, of_y0 if needed[0] else None, *gradient.result


def _warm(
    field: VectorField,
    grids: Sequence[TimeGrid | Tolerance],
    solver: DiagonallyImplicitRungeKutta,
    warm_start: WarmStart,
    y0: Tensor,
    theta: Theta,
) -> tuple[Trajectory | None, tuple[int, ...]]:
    """The solve from the last trajectory, if that has the same steps."""
    last = warm_start.trajectory
    if last is None or last.states.shape[1:] != y0.shape or not all(isinstance(grid, TimeGrid) for grid in grids):
        return None, ()
    steps = [(grid.time(n), grid.step_size(n)) for grid in grids for n in range(grid.n_steps)]  # type: ignore[union-attr]
    same = torch.stack([last.times, last.sizes], 1)
    if len(steps) != len(same) or not torch.equal(same, same.new_tensor(steps)):
        return None, ()
    found = newton_at_once(field, theta, solver.tableau, y0, last, solver.newton.tolerance(y0))
    return found, warm_start.ends


def _step_by_step(
    field: VectorField,
    grids: Sequence[TimeGrid | Tolerance],
    solver: ExplicitRungeKutta | DiagonallyImplicitRungeKutta,
    y0: Tensor,
    theta: Theta,
) -> tuple[Trajectory, tuple[int, ...]]:
    times: list[float] = []
    sizes: list[float] = []
    kept: list[State] = []
    ends, outputs, y = [], [], y0
    for grid in grids:
        y, steps = solve_forward(field, y, theta, grid, solver, kept, keep_stages=True)
        times += [steps.time(n) for n in range(steps.n_steps)]
        sizes += [steps.step_size(n) for n in range(steps.n_steps)]
        ends.append(len(times))
        outputs.append(y)
    stages = torch.stack([torch.stack(step) for step in kept], 1)
    # Between outputs, states are only a guess: the last stage of the step.
    states = torch.cat([y0[None], stages[-1]]).index_copy(0, torch.tensor(ends, device=y.device), torch.stack(outputs))
    return Trajectory(y0.new_tensor(times), y0.new_tensor(sizes), stages, states), tuple(ends)
