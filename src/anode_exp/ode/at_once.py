"""All steps of a solve at once: the linearised solve, Newton's method for the whole trajectory, and its adjoint.

A diagonally implicit or explicit Runge–Kutta method with steps h_n, stage states Y_ni, for d numbers per sample:

    Y_ni = y_n + h_n Σ_{j≤i} a_ij f(t_n + c_j h_n, Y_nj),   y_{n+1} = y_n + h_n Σ_i b_i f(t_n + c_i h_n, Y_ni).

With J_ni = ∂f/∂y(Y_ni), a change δy_n moves the stages by P_ni δy_n and the next state by M_n δy_n:

    (I − h a_ii J_i) P_i = I + h Σ_{j<i} a_ij J_j P_j,   M = I + h Σ_i b_i J_i P_i.

All of this is batched over steps: one evaluation of f serves every stage of every step, and only products of d×d
matrices with vectors are computed step by step. Shapes: N steps, s stages, B samples of d numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anode_exp.ode.controller import NewtonFailed
from anode_exp.ode.newton_krylov import change_of, linearised, solved
from anode_exp.ode.tableau import ButcherTableau, ImplicitTableau
from anode_exp.ode.vector_field import Theta, VectorField

MOST_ITERATIONS = 25
"""Most iterations of Newton's method for all steps. If it needs more, solving step by step is faster."""

LARGEST_CHANGE = 0.06
"""Largest relative change of a state in one iteration. Where trajectories diverge, Newton's method overshoots."""


@dataclass(frozen=True)
class Trajectory:
    """The steps of a solve and its states.

    Attributes:
        times, sizes: t_n and h_n, [N].
        stages: Y_ni, [s, N, B, d].
        states: y_0 … y_N, [N + 1, B, d].
    """

    times: Tensor
    sizes: Tensor
    stages: Tensor
    states: Tensor


def coefficients(tableau: ButcherTableau | ImplicitTableau) -> list[tuple[float, ...]]:
    """Rows of a up to and including the diagonal, which is 0 in explicit tableaux."""
    return [row + (0.0,) * (i + 1 - len(row)) for i, row in enumerate(tableau.a)]


def stage_times(tableau: ButcherTableau | ImplicitTableau, times: Tensor, sizes: Tensor) -> Tensor:
    """t_n + c_i h_n, [s, N]."""
    return times + times.new_tensor(tableau.c)[:, None] * sizes


def slopes_and_jacobians(
    field: VectorField, theta: Theta, times: Tensor, stages: Tensor, keep: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """f [s, N, B, d] and J [s, N, B, d, d] at all stages, from one call of f with a tensor of times.

    Args:
        keep: keep the graph of f.

    Returns:
        f, J, and the output of the call, whose first s·N·B rows are those of the stages; with its graph if ``keep``.
    """
    *shape, batch, d = stages.shape
    rows = times[..., None].expand(*shape, batch).reshape(-1, 1)
    field.count(len(rows) // batch - 1)  # the call is one evaluation for each stage of each step
    values, jacobian = linearised(field, theta, rows, stages.reshape(-1, d), keep)
    field.evaluations.jacobians += len(rows) // batch
    return values[: len(rows)].detach().view(stages.shape), jacobian.view(*stages.shape, d), values


def _stage_changes(
    tableau: ButcherTableau | ImplicitTableau, h: Tensor, jacobian: Tensor, right: Tensor
) -> tuple[list[Tensor], Tensor]:
    """X_i with (I − h a_ii J_i) X_i = right_i + h Σ_{j<i} a_ij J_j X_j, and h Σ_i b_i J_i X_i; columns are independent.

    Args:
        h: [N, 1, 1, 1].
        right: [s, N, B, d, columns].

    Raises:
        NewtonFailed: if a matrix is singular.
    """
    identity = torch.eye(jacobian.shape[-1], dtype=h.dtype, device=h.device)
    changes: list[Tensor] = []
    moved: list[Tensor] = []  # J_i X_i
    for i, row in enumerate(coefficients(tableau)):
        x = right[i]
        terms = [a * m for a, m in zip(row, moved, strict=False) if a != 0.0]
        if terms:
            x = x + h * sum(terms[1:], terms[0])
        if row[i] != 0.0:
            x = solved(identity - h * row[i] * jacobian[i], x)
        changes.append(x)
        moved.append(jacobian[i] @ x)
    terms = [b * m for b, m in zip(tableau.b, moved, strict=True) if b != 0.0]
    return changes, h * sum(terms[1:], terms[0])


def newton_at_once(
    field: VectorField,
    theta: Theta,
    tableau: ButcherTableau | ImplicitTableau,
    y0: Tensor,
    guess: Trajectory,
    rtol: float,
) -> Trajectory | None:
    """The trajectory from y0 by Newton's method for all stages of all steps together, from a guess with the same steps.

    Each iteration evaluates f and its Jacobians once for all stages, and solves the linearised equations from the
    first step to the last; a change above ``LARGEST_CHANGE`` of a state is scaled down to that. It has converged when
    the error left is below rtol of every stage: the last change times ρ / (1 − ρ), where ρ is the ratio of the last two
    (E. Hairer and G. Wanner, Solving Ordinary Differential Equations II, IV.8).

    Returns:
        The trajectory, or None if it has not converged after ``MOST_ITERATIONS``, the iterates are not finite, or a
        matrix is singular.
    """
    h = guess.sizes[:, None, None, None]
    times = stage_times(tableau, guess.times, guess.sizes)
    stages, states = guess.stages, torch.cat([y0[None], guess.states[1:]])
    eye = torch.eye(y0.shape[-1], dtype=y0.dtype, device=y0.device).expand(*stages.shape, -1)
    before = float("nan")
    for _ in range(MOST_ITERATIONS):
        field.evaluations.newton += 1
        slopes, jacobian, _ = slopes_and_jacobians(field, theta, times, stages)
        step = h[..., 0] * slopes
        wrong = torch.stack([
            stages[i] - states[:-1] - sum(a * k for a, k in zip(row, step, strict=False) if a != 0.0)
            for i, row in enumerate(coefficients(tableau))
        ])  # fmt: skip
        end = states[1:] - states[:-1] - sum(b * k for b, k in zip(tableau.b, step, strict=True))
        try:
            changes, at_end = _stage_changes(tableau, h, jacobian, torch.cat([eye, -wrong[..., None]], -1))
        except NewtonFailed:
            return None
        matrices = (at_end[..., :-1] + eye[0]).unbind(0)
        constants = (at_end[..., -1:] - end[..., None]).unbind(0)
        moves = [torch.zeros_like(constants[0])]
        for matrix, constant in zip(matrices, constants, strict=True):
            moves.append(torch.baddbmm(constant, matrix, moves[-1]))
        of_states = torch.stack(moves)
        of_stages = torch.stack([x[..., -1] + (x[..., :-1] @ of_states[:-1])[..., 0] for x in changes])
        change = change_of(of_stages.flatten(0, 2), stages.flatten(0, 2))
        if not change < float("inf"):
            return None
        part = min(1.0, LARGEST_CHANGE / change) if change > 0 else 1.0
        stages, states = stages + part * of_stages, states + part * of_states[..., 0]
        ratio = change / before
        # At the limit of rounding, changes stop shrinking before they are below the tolerance.
        rounding = ratio >= 1.0 and change <= rtol**0.75
        if change <= rtol or rounding or (ratio < 1.0 and change * ratio / (1.0 - ratio) <= rtol):
            return Trajectory(guess.times, guess.sizes, stages, states)
        before = change if part == 1.0 else float("nan")  # a reduced change does not show how fast they shrink
    return None


def adjoint_at_once(
    field: VectorField,
    theta: Theta,
    tableau: ButcherTableau | ImplicitTableau,
    steps: Trajectory,
    gradients: Sequence[Tensor | None],
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """∂J/∂y_0 and ∂J/∂θ of J = J(y_0, …, y_N), from ∂J/∂y_n for 0 ≤ n ≤ N, None where J does not depend on y_n.

        α_N = ∂J/∂y_N,   α_n = M_nᵀ α_{n+1} + ∂J/∂y_n,
        (I − h a_ii J_i)ᵀ κ_i = h b_i α_{n+1} + h Σ_{j>i} a_ji J_jᵀ κ_j,   ∂J/∂θ = Σ_n Σ_i (∂f/∂θ(Y_ni))ᵀ κ_ni:

    the adjoint of ``DiagonallyImplicitRungeKutta.adjoint_step`` for all steps, with one evaluation of f per stage.

    Returns:
        ∂J/∂y_0 [B, d], and ∂J/∂θ of the entries of θ that require a gradient.

    Raises:
        NewtonFailed: if a matrix I − h a_ii J_i is singular.
    """
    h = steps.sizes[:, None, None, None]
    times = stage_times(tableau, steps.times, steps.sizes)
    with torch.enable_grad():
        _, jacobian, values = slopes_and_jacobians(field, theta, times, steps.stages, keep=True)
    s, n, batch, d = steps.stages.shape
    eye = torch.eye(d, dtype=h.dtype, device=h.device)
    _, at_end = _stage_changes(tableau, h, jacobian, eye.expand(s, n, batch, d, d))
    transposed = (at_end + eye).mT.unbind(0)
    a = torch.zeros_like(steps.states[0])[..., None]
    alphas: list[Tensor] = []  # α_N … α_1
    for m in reversed(range(n + 1)):
        given = gradients[m]
        a = a if given is None else a + given[..., None]
        if m > 0:
            alphas.append(a)
            a = transposed[m - 1] @ a
    alpha = torch.stack(alphas[::-1])
    rows = coefficients(tableau)
    kappas: list[Tensor] = [alpha] * s
    lambdas: dict[int, Tensor] = {}  # J_iᵀ κ_i
    for i in reversed(range(s)):
        right = h * (tableau.b[i] * alpha + sum(rows[j][i] * x for j, x in lambdas.items()))
        if rows[i][i] != 0.0:
            right = solved((eye - h * rows[i][i] * jacobian[i]).mT, right)
        kappas[i] = right
        lambdas[i] = jacobian[i].mT @ right
    wanted = [p for p in theta if p.requires_grad]
    if not wanted:
        return a[..., 0], ()
    kappa = torch.stack(kappas).reshape(-1, d)
    seeds = torch.cat([kappa, kappa.new_zeros(len(values) - len(kappa), d)])
    return a[..., 0], torch.autograd.grad(values, wanted, seeds, materialize_grads=True)
