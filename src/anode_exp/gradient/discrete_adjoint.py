"""The discrete adjoint from checkpoints: exact gradients of the discrete solve without keeping all of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from anode_exp.gradient.base import current_autocast
from anode_exp.ode import ExplicitRungeKutta, Theta, TimeGrid, VectorField, integrate


class DtoCheckpoint:
    """ANODE: keep a block's input alone, and solve the block again with a graph when its gradient is due.

    Discretise-then-optimise: α_n = (I + h ∂f(y_n)/∂y)ᵀ α_{n+1} for Euler, and the adjoint of the step for any other
    method, so the gradient is that of full backpropagation, to the last bit where kernels are deterministic.

    For M blocks of N steps, s stages and L layers in f it holds M inputs and, one block at a time, N s L activations;
    the backward pass evaluates f s N times a block.

    Source: ANODE (arXiv 1902.10298) Sec. V, Eqs. 18–24.
    """

    def solve(self, field: VectorField, y0: Tensor, theta: Theta, grid: TimeGrid, solver: ExplicitRungeKutta) -> Tensor:
        return _BlockCheckpoint.apply(field, grid, solver, y0, *theta)


class _BlockCheckpoint(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, field: VectorField, grid: TimeGrid, solver: ExplicitRungeKutta, y0: Tensor, *theta: Tensor
    ) -> Tensor:
        ctx.field, ctx.grid, ctx.solver = field, grid, solver
        ctx.autocast = current_autocast(y0.device.type)
        ctx.save_for_backward(y0, *theta)
        return integrate(field, y0, theta, grid, solver)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y1: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        needed = ctx.needs_input_grad[3:]
        # Detached, or the hooks of a θ that is no leaf would fire once in here and once outside.
        y0, *theta = (x.detach().requires_grad_(need) for x, need in zip(saved, needed, strict=True))
        with torch.enable_grad(), ctx.autocast(), ctx.field.re_evaluation():
            y1 = integrate(ctx.field, y0, tuple(theta), ctx.grid, ctx.solver)
        wanted = [x for x in (y0, *theta) if x.requires_grad]
        # y0 and θ in one pass over the graph
        grads = iter(torch.autograd.grad(y1, wanted, grad_y1, allow_unused=True))
        return None, None, None, *(next(grads) if need else None for need in needed)
