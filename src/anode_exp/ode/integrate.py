"""Time grids, fixed and found, and the time loop over one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from anode_exp.ode.runge_kutta import ExplicitRungeKutta
from anode_exp.ode.vector_field import Theta, VectorField


@dataclass(frozen=True)
class TimeGrid:
    """n_steps equal steps from t0 to t1: t_n = t0 + n h with h = (t1 − t0) / n_steps; t1 < t0 runs backwards.

    Raises:
        ValueError: if n_steps < 1.
    """

    n_steps: int
    t0: float = 0.0
    t1: float = 1.0

    def __post_init__(self) -> None:
        if self.n_steps < 1:
            raise ValueError(f"n_steps is {self.n_steps}; a time grid needs at least 1 step")

    def time(self, n: int) -> float:
        return self.t0 + n * self.step_size(n)

    def step_size(self, n: int) -> float:
        return (self.t1 - self.t0) / self.n_steps


@dataclass(frozen=True)
class Steps:
    """The steps that an adaptive solve accepted: the n-th begins at times[n] and is sizes[n] long."""

    times: tuple[float, ...]
    sizes: tuple[float, ...]

    @property
    def n_steps(self) -> int:
        return len(self.sizes)

    def time(self, n: int) -> float:
        """t_n for 0 ≤ n ≤ n_steps."""
        return self.times[n]

    def step_size(self, n: int) -> float:
        return self.sizes[n]


def integrate(
    field: VectorField,
    y0: Tensor,
    theta: Theta,
    grid: TimeGrid | Steps,
    solver: ExplicitRungeKutta,
    kept: list[Tensor] | None = None,
    keep_stages: bool = False,
) -> Tensor:
    """Solve dy/dt = f(t, y, θ), y(t0) = y0, over the grid.

    Args:
        y0: initial state, any shape.
        theta: one entry a parameter of f, constant in time or with a leading axis of n_steps.
        kept: receives the state at the start of every step, or with ``keep_stages`` every stage state of every step.

    Returns:
        y(t1), of y0's shape and dtype. Nothing is read on the host, so a CUDA graph can capture the solve.
    """
    y = y0
    for n, theta_n in enumerate(field.theta_per_step(theta, grid.n_steps)):
        if kept is not None and not keep_stages:
            kept.append(y)
        y = solver.step(field, theta_n, grid.time(n), grid.step_size(n), y, kept if keep_stages else None)
    return y
