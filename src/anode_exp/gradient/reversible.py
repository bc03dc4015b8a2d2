"""The discrete adjoint of a reversible method: only the last state is kept, and the steps are undone one by one."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from anode_exp.gradient.base import ThetaGradient, current_autocast, vjp_through
from anode_exp.ode import Solver, Theta, TimeGrid, Tolerance, VectorField, end_state, with_inverse


class Reversible:
    """MALI: the gradient of the discrete solve, from the state at its end.

    Backwards over the steps, the evaluations in the inverse of a step also give its vector–Jacobian products, so the
    state at t_n and its adjoint are found together (``ReversibleSolver.reverse_step``). The method's start is
    differentiated last, at the reconstructed y0.

    It holds the last state, its adjoint and the graph of what a step evaluates at once, for any number of steps; the
    backward pass evaluates f as often as the forward pass. It is exact up to the rounding errors of the inverse steps,
    which the backward solve amplifies; ``study gradient_error`` measures them.

    Raises:
        ValueError: in ``solve``, for a method without an inverse, or for adaptive steps.

    Source: Zhuang et al., MALI, ICLR 2021 (arXiv 2102.04668); McCallum and Foster, arXiv 2410.11648.
    """

    def solve(self, field: VectorField, y0: Tensor, theta: Theta, grid: TimeGrid | Tolerance, solver: Solver) -> Tensor:
        if not isinstance(grid, TimeGrid):
            raise ValueError("gradient mode reversible needs fixed steps; give a TimeGrid")
        y1: Tensor = _Solve.apply(field, grid, with_inverse(solver), y0, *theta)
        return y1


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, field: VectorField, grid: TimeGrid, solver: Any, y0: Tensor, *theta: Tensor) -> Tensor:
        ctx.field, ctx.grid, ctx.solver = field, grid, solver
        ctx.autocast = current_autocast(y0.device.type)
        state = end_state(field, y0, theta, grid, solver)
        ctx.save_for_backward(*theta, *state)
        return state[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y1: Tensor) -> tuple[Any, ...]:
        field, grid, solver, needed = ctx.field, ctx.grid, ctx.solver, ctx.needs_input_grad[3:]
        saved = list(ctx.saved_tensors)
        ctx.maybe_clear_saved_tensors()  # unless the graph is retained: only the list holds them, and it is emptied
        gradient = ThetaGradient(saved[: len(needed) - 1], needed[1:])
        state = saved[len(needed) - 1 :]
        del saved
        a = [grad_y1, *(torch.zeros_like(x) for x in state[1:])]
        with ctx.autocast(), field.re_evaluation():
            per_step = gradient.per_step(field, grid.n_steps)
            for n in reversed(range(grid.n_steps)):
                add = partial(gradient.add, n)
                step = solver.reverse_step(field, per_step[n], grid.time(n), grid.step_size(n), state, a, add)
                state, a = map(list, step)
                del step
            start = partial(solver.start, field, per_step[0], grid.time(0))
            (a_y0,) = vjp_through(lambda y0: start(*y0), (state[0],), per_step[0], tuple(a), partial(gradient.add, 0))
        return None, None, None, a_y0 if needed[0] else None, *gradient.result
