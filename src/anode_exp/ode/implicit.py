"""Diagonally implicit Runge–Kutta methods for stiff systems, and their exact discrete adjoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from anode_exp.ode.explicit import weighted_sum
from anode_exp.ode.newton_krylov import NewtonKrylov
from anode_exp.ode.solver import Attempt, State
from anode_exp.ode.tableau import ImplicitTableau
from anode_exp.ode.vector_field import Theta, VectorField


class DiagonallyImplicitRungeKutta:
    """Solver by the method of a tableau whose stages are solved one after another by Newton's method.

        Y_i = y + h Σ_{j<i} a_ij k_j + h a_ii k_i,   k_i = f(t + c_i h, Y_i),   y(t + h) = y + h Σ_i b_i k_i.

    Stages with a_ii = 0 are explicit. A stage's k is (Y − z)/(h a_ii), where z is the known part of its sum: f(Y) would
    multiply the error left by Newton's method by the stiffness. Running statistics advance once per stage, in an
    evaluation at the converged state. Backpropagation differentiates a converged stage by the implicit function
    theorem, not through its iterations.

    Args:
        newton: how stages are solved.
    """

    static = False
    start_nodes: tuple[float, ...] = ()

    def __init__(self, tableau: ImplicitTableau, newton: NewtonKrylov | None = None) -> None:
        self.tableau, self.newton = tableau, newton or NewtonKrylov()
        self.name, self.order, self.nodes = tableau.name, tableau.order, tableau.c
        self.error_order = None if tableau.b_error is None else tableau.order

    def start(self, field: VectorField, theta: Theta, t: float, y: Tensor) -> State:
        return (y,)

    def step(
        self, field: VectorField, theta: Theta, t: float, h: float, state: State, stages: list[Tensor] | None = None
    ) -> State:
        """y(t + h) from y(t). ``stages`` receives the stage states Y_i."""
        (y,) = state
        y1, _ = self._stages(field, theta, t, h, y, [], stages)
        return (y1,)

    def attempt(self, field: VectorField, theta: Theta, t: float, h: float, y: Tensor, first: Tensor) -> Attempt:
        """A step with its error estimate h Σ_i b_error_i k_i; ``first`` = f(t, y) is its explicit stage's slope."""
        assert self.tableau.b_error is not None
        stages = [y]
        y1, slopes = self._stages(field, theta, t, h, y, [first], stages)
        with torch.no_grad():
            error = weighted_sum(torch.zeros_like(y), h, self.tableau.b_error, slopes)
        return Attempt(y1, error, slopes[-1] if self.tableau.stiffly_accurate else None, stages)

    def _stages(
        self,
        field: VectorField,
        theta: Theta,
        t: float,
        h: float,
        y: Tensor,
        slopes: list[Tensor],
        stages: list[Tensor] | None,
    ) -> tuple[Tensor, list[Tensor]]:
        """y(t + h) and the slopes of all stages, given the first ones."""
        table, known, y_i = self.tableau, len(slopes), y
        for c, row in zip(table.c[known:], table.a[known:], strict=True):
            z = weighted_sum(y, h, row[:-1], slopes)
            at = t + c * h
            if row[-1] == 0.0:
                y_i = z
                slopes.append(field(at, y_i, theta))
            else:
                y_i = _Stage.apply(self.newton, field, at, h * row[-1], z, *theta)
                slopes.append((y_i - z) / (h * row[-1]))
            if stages is not None:
                stages.append(y_i)
        return (y_i if table.stiffly_accurate else weighted_sum(y, h, table.b, slopes)), slopes

    def stage_states(self, field: VectorField, theta: Theta, t: float, h: float, state: State) -> list[Tensor]:
        stages: list[Tensor] = []
        self.step(field, theta, t, h, state, stages)
        return stages

    def adjoint_step(
        self,
        field: VectorField,
        theta: Theta,
        t: float,
        h: float,
        stages: list[Tensor],
        a: State,
        add: Callable[[Sequence[Tensor], float], None],
    ) -> State:
        """The adjoint of one step, written out; a linear system per implicit stage, from the last to the first.

            (I − h a_ii J_i)ᵀ κ_i = h b_i α_{n+1} + h Σ_{j>i} a_ji λ_j,   λ_i = J_iᵀ κ_i,   J_i = ∂f/∂y(Y_i),
            α_n = α_{n+1} + Σ_i λ_i,   and ∂J/∂θ gains (∂f/∂θ(Y_i))ᵀ κ_i.

        Source: PNODE (arXiv 2206.01298); Hager, Numer. Math. 87, 2000.
        """
        table = self.tableau
        (end,) = a
        lambdas: dict[int, Tensor] = {}
        for i in reversed(range(table.stages)):
            terms = [(table.b[i], end), *((table.a[j][i], x) for j, x in lambdas.items())]
            mu = sum((h * w * x for w, x in terms if w != 0.0), torch.zeros_like(end))
            at, y_i, c = t + table.c[i] * h, stages.pop(), h * table.a[i][i]
            if c == 0.0:
                _, lambdas[i], of_theta = field.vjp(at, y_i, theta, mu)
            else:
                _, lambdas[i], of_theta = self.newton.solve_adjoint(field, theta, at, c, y_i, mu)
            add(of_theta, 1.0)
        return (end + sum(lambdas.values(), torch.zeros_like(end)),)


class _Stage(torch.autograd.Function):
    """Y(z, θ) with Y = z + c f(t, Y, θ), and its gradient by the implicit function theorem."""

    @staticmethod
    def forward(
        ctx: Any, newton: NewtonKrylov, field: VectorField, t: float, c: float, z: Tensor, *theta: Tensor
    ) -> Tensor:
        with field.untraced():  # iterations leave running statistics unchanged
            y = newton.solve(field, theta, t, c, z, z)
        field(t, y, theta)  # at the converged state they advance
        ctx.newton, ctx.field, ctx.t, ctx.c = newton, field, t, c
        ctx.save_for_backward(y, *theta)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, a: Tensor) -> tuple[Any, ...]:
        y, *theta = ctx.saved_tensors
        needed = ctx.needs_input_grad[5:]
        detached = tuple(p.detach().requires_grad_(need) for p, need in zip(theta, needed, strict=True))
        with ctx.field.re_evaluation():
            w, _, of_theta = ctx.newton.solve_adjoint(ctx.field, detached, ctx.t, ctx.c, y, a)
        gradients = iter(of_theta)
        return None, None, None, None, w, *(ctx.c * next(gradients) if need else None for need in needed)
