"""The time loop: over a grid, or over steps that a controller chooses."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

from anode_exp.ode.controller import NewtonFailed, SolveFailed, StepController, check_evaluations
from anode_exp.ode.grid import Steps, TimeGrid, Tolerance, rms
from anode_exp.ode.solver import EmbeddedSolver, Solver, State, with_stages
from anode_exp.ode.vector_field import Theta, VectorField

MOST_HALVINGS = 10
"""How often a step of a fixed grid is halved at most if its stages cannot be solved."""


def integrate(
    field: VectorField,
    y0: Tensor,
    theta: Theta,
    grid: TimeGrid | Steps,
    solver: Solver,
    kept: list[State] | None = None,
    keep_stages: bool = False,
) -> Tensor:
    """Solve dy/dt = f(t, y, θ), y(t0) = y0, over the grid.

    Args:
        y0: initial state, any shape.
        theta: one entry per parameter of f, constant in time or with a leading axis of n_steps.
        kept: receives the state at the start of every step, or with ``keep_stages`` the stage states of every step.
        keep_stages: for a ``StageSolver``.

    Returns:
        y(t1), of y0's shape and dtype. Nothing is read on the host, so a CUDA graph can capture the solve.
    """
    return end_state(field, y0, theta, grid, solver, kept, keep_stages)[0]


def end_state(
    field: VectorField,
    y0: Tensor,
    theta: Theta,
    grid: TimeGrid | Steps,
    solver: Solver,
    kept: list[State] | None = None,
    keep_stages: bool = False,
) -> State:
    """As ``integrate``, but returns the whole state at t1."""
    per_step = field.theta_per_step(theta, grid.n_steps)
    step = _keeping(solver, kept, keep_stages)
    state = solver.start(field, per_step[0], grid.time(0), y0)
    for n, theta_n in enumerate(per_step):
        state = step(field, theta_n, grid.time(n), grid.step_size(n), state)
    return state


def _keeping(solver: Solver, kept: list[State] | None, keep_stages: bool) -> Callable[..., State]:
    """The solver's step; ``kept`` receives the start state, or the stage states, of each step that succeeds."""
    if kept is None:
        return solver.step

    def step(field: VectorField, theta: Theta, t: float, h: float, state: State) -> State:
        after = solver.step(field, theta, t, h, state)
        kept.append(state)
        return after

    if not keep_stages:
        return step
    staged = with_stages(solver)

    def step_by_stages(field: VectorField, theta: Theta, t: float, h: float, state: State) -> State:
        stages: list[Tensor] = []
        after = staged.step(field, theta, t, h, state, stages)
        kept.append(tuple(stages))
        return after

    return step_by_stages


@torch.no_grad()
def _first_step(field: VectorField, theta: Theta, y0: Tensor, slope: Tensor, tolerance: Tolerance, order: int) -> float:
    """The size of the first step, estimated by an explicit Euler step; one evaluation of f.

    Raises:
        SolveFailed: if the state or its slope is not finite.

    Source: Hairer, Nørsett, Wanner, Solving ODEs I, II.4.
    """
    sign = 1.0 if tolerance.t1 > tolerance.t0 else -1.0
    scale = tolerance.scale(y0, y0)
    d0, d1 = float(rms(y0 / scale)), float(rms(slope / scale))
    if not math.isfinite(d0 + d1):
        raise SolveFailed(
            f"adaptive solve at t = {tolerance.t0:.6g}: the state or its slope is not finite, or so large that its "
            "norm is not; scale them down"
        )
    h0 = 1e-6 if min(d0, d1) < 1e-5 else 0.01 * d0 / d1
    h0 = min(h0, abs(tolerance.t1 - tolerance.t0))
    other = field(tolerance.t0 + sign * h0, y0 + sign * h0 * slope, theta)
    d2 = float(rms((other - slope) / scale)) / h0
    largest = max(d1, d2)
    h1 = max(1e-6, 1e-3 * h0) if largest <= 1e-15 else (0.01 / largest) ** (1 / (order + 1))
    return min(100 * h0, h1)


def integrate_adaptive(
    field: VectorField,
    y0: Tensor,
    theta: Theta,
    tolerance: Tolerance,
    solver: Solver,
    kept: list[State] | None = None,
    keep_stages: bool = False,
) -> tuple[Tensor, Steps]:
    """Solve dy/dt = f(t, y, θ), y(t0) = y0, to the tolerance.

    Rejected steps, and the evaluation for the first step size, leave running statistics unchanged. Where the method's
    last stage is the next step's first, it is evaluated once.

    Args:
        theta: constant in time.
        kept: as for ``integrate``, for accepted steps.

    Returns:
        y(t1), bit for bit that of ``integrate`` over the accepted steps, and the accepted steps.

    Raises:
        SolveFailed: above ``max_evaluations``, below ``min_step``, or if the state or its slope at t0 is not finite.
        ValueError: if the method has no error estimate, or θ has a value for every step.
    """
    if any(entry.shape != p.shape for entry, p in zip(theta, field.theta, strict=True)):
        raise ValueError("adaptive steps need a θ constant in time, because the number of steps is not known")
    order = solver.error_order if isinstance(solver, EmbeddedSolver) else None
    if not isinstance(solver, EmbeddedSolver) or order is None:
        raise ValueError(
            f"{solver.name} has no error estimate; adaptive steps need one: heun, bosh3, dopri5 or kvaerno3"
        )
    before = field.evaluations.total
    y, t = y0, tolerance.t0
    first = field(t, y, theta)
    with field.trial():
        h = _first_step(field, theta, y, first, tolerance, order)
    control = StepController(t, tolerance.t1, h, order, tolerance)
    slope: Tensor | None = first
    times, sizes = [t], []
    while not control.done:
        check_evaluations(tolerance, field.evaluations.total - before, control.t)
        if slope is None:
            slope = field(control.t, y, theta)
        t, h = control.t, control.h
        attempt, error = None, float("inf")
        with field.trial() as trial:
            with suppress(NewtonFailed):  # a smaller step may have a solution
                attempt = solver.attempt(field, theta, t, h, y, slope)
                error = tolerance.error_norm([attempt.error], [y], [attempt.y])
            accepted = control.judge(error)
            trial.keep = accepted
        field.count_step(accepted)
        if accepted and attempt is not None:
            if kept is not None:
                kept.append(tuple(attempt.stages) if keep_stages else (y,))
            y, slope = attempt.y, attempt.last_slope
            times.append(control.t)
            sizes.append(h)
    return y, Steps(tuple(times), tuple(sizes))


def integrate_halving(
    field: VectorField,
    y0: Tensor,
    theta: Theta,
    grid: TimeGrid,
    solver: Solver,
    kept: list[State] | None = None,
    keep_stages: bool = False,
) -> tuple[Tensor, TimeGrid | Steps]:
    """``integrate``, but a step whose stages cannot be solved is taken in two halves, recursively.

    A step that failed leaves running statistics unchanged.

    Returns:
        y(t1) and the steps taken: the grid itself where none was halved.

    Raises:
        NewtonFailed: for a step below 2^−MOST_HALVINGS of the grid's, or where θ has a value for every step.
    """
    per_step = field.theta_per_step(theta, grid.n_steps)
    constant = all(entry.shape == p.shape for entry, p in zip(theta, field.theta, strict=True))
    step = _keeping(solver, kept, keep_stages)
    state = solver.start(field, per_step[0], grid.time(0), y0)
    times, sizes = [grid.time(0)], []
    for n, theta_n in enumerate(per_step):
        left = [(grid.time(n), grid.step_size(n), 0)]
        while left:
            t, h, halvings = left.pop()
            try:
                with field.trial() as trial:
                    state = step(field, theta_n, t, h, state)
                    trial.keep = True
            except NewtonFailed:
                if halvings == MOST_HALVINGS or not constant:
                    raise
                field.count_step(False)
                left += [(t + h / 2, h / 2, halvings + 1), (t, h / 2, halvings + 1)]
                continue
            times.append(t + h)
            sizes.append(h)
    return state[0], grid if len(sizes) == grid.n_steps else Steps(tuple(times), tuple(sizes))


def solve_forward(
    field: VectorField,
    y0: Tensor,
    theta: Theta,
    grid: TimeGrid | Tolerance,
    solver: Solver,
    kept: list[State] | None = None,
    keep_stages: bool = False,
) -> tuple[Tensor, TimeGrid | Steps]:
    """y(t1) and the steps taken.

    ``integrate_adaptive`` for a tolerance; for a grid ``integrate``, or ``integrate_halving`` if the solver is not
    static.
    """
    if isinstance(grid, Tolerance):
        return integrate_adaptive(field, y0, theta, grid, solver, kept, keep_stages)
    if not solver.static:
        return integrate_halving(field, y0, theta, grid, solver, kept, keep_stages)
    return integrate(field, y0, theta, grid, solver, kept, keep_stages), grid
