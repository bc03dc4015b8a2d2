"""Adaptive steps: a tolerance in place of a grid, a PI controller, and the solve that finds its own steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anode_exp.ode.integrate import Steps, TimeGrid, integrate
from anode_exp.ode.runge_kutta import ExplicitRungeKutta
from anode_exp.ode.vector_field import Theta, VectorField

SAFETY, SHRINK_AT_MOST, GROW_AT_MOST = 0.9, 0.2, 10.0


class SolveFailed(RuntimeError):
    """An adaptive solve that would not end: too many evaluations of f, or too small a step."""


@dataclass(frozen=True)
class Tolerance:
    """Steps from t0 to t1 of whatever size keeps the estimated error of each below atol + rtol·|y|.

    Attributes:
        max_evaluations: of f, in one solve of one block in one direction.
        min_step: in units of t; a step that must be smaller ends the solve.

    Raises:
        ValueError: if a tolerance is not positive.
    """

    rtol: float
    atol: float
    t0: float = 0.0
    t1: float = 1.0
    max_evaluations: int = 1000
    min_step: float = 1e-6

    def __post_init__(self) -> None:
        if not (self.rtol > 0 and self.atol > 0):
            raise ValueError(f"rtol is {self.rtol}, atol {self.atol}; both must be above 0")

    def scale(self, y: Tensor, y1: Tensor) -> Tensor:
        return self.atol + self.rtol * torch.maximum(y.abs(), y1.abs())

    @torch.no_grad()
    def error_norm(self, errors: Sequence[Tensor], before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
        """max over parts of the root mean square of error / (atol + rtol·max(|before|, |after|)); ≤ 1 is accepted."""
        norms = [rms(e / self.scale(y, y1)) for e, y, y1 in zip(errors, before, after, strict=True) if e.numel()]
        return float(torch.stack(norms).max()) if norms else 0.0


def rms(x: Tensor) -> Tensor:
    """Root mean square, at least in float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).square().mean().sqrt()


class StepController:
    """Proportional–integral control of the step size: h ← h · 0.9 · e_n^(−0.7/k) · e_(n−1)^(0.4/k), within [0.2, 10].

    e is the error norm, k the order of the estimate in h. After a rejection h ← h · 0.9 · e^(−1/k), and the step after
    one does not grow.

    Attributes:
        t, h: where the next attempt begins, and its signed size; the last one ends at t1 exactly.
        done: whether t1 is reached.

    Source: Gustafsson, ACM TOMS 17(4), 1991; Hairer, Wanner, Solving ODEs II, IV.2.
    """

    def __init__(self, t0: float, t1: float, h: float, k: int, tolerance: Tolerance) -> None:
        self.t, self.t1, self._k, self._tolerance = t0, t1, k, tolerance
        self._h = abs(h)
        self._previous, self._rejected = 1.0, False

    @property
    def done(self) -> bool:
        return self.t == self.t1

    @property
    def h(self) -> float:
        left = self.t1 - self.t
        # A rest that is all but a step is taken whole, not cut into a step and a crumb.
        return left if abs(left) <= self._h * 1.001 else self._h if left > 0 else -self._h

    def judge(self, error: float) -> bool:
        """Whether the attempt of size h is accepted; moves on if it is, and sets the next size.

        Raises:
            SolveFailed: if the next step would be smaller than ``min_step``.
        """
        h = self.h
        accepted = error <= 1.0  # not so for NaN
        if accepted:
            e = max(error, 1e-10)
            factor = SAFETY * e ** (-0.7 / self._k) * self._previous ** (0.4 / self._k)
            factor = min(max(factor, SHRINK_AT_MOST), 1.0 if self._rejected else GROW_AT_MOST)
            self._previous, self._rejected = e, False
            self.t = self.t1 if h == self.t1 - self.t else self.t + h
        else:
            factor = max(SAFETY * error ** (-1 / self._k), SHRINK_AT_MOST) if error < float("inf") else SHRINK_AT_MOST
            self._rejected = True
        self._h = abs(h) * factor
        if not self.done and self._h < self._tolerance.min_step:
            raise SolveFailed(
                f"adaptive solve at t = {self.t:.6g} needs a step of {self._h:.2g}, below min_step = "
                f"{self._tolerance.min_step:g}: the field is too stiff or not finite; loosen rtol and atol, or lower "
                "min_step"
            )
        return accepted


def check_evaluations(tolerance: Tolerance, evaluations: int, t: float) -> None:
    """Raises SolveFailed beyond ``max_evaluations``."""
    if evaluations > tolerance.max_evaluations:
        raise SolveFailed(
            f"adaptive solve reached t = {t:.6g} after {evaluations} evaluations of f, more than max_evaluations = "
            f"{tolerance.max_evaluations}: loosen rtol and atol, or raise max_evaluations"
        )


@torch.no_grad()
def _first_step(field: VectorField, theta: Theta, y0: Tensor, slope: Tensor, tolerance: Tolerance, order: int) -> float:
    """A first step whose error an explicit Euler step estimates; one evaluation of f.

    Source: Hairer, Nørsett, Wanner, Solving ODEs I, II.4.
    """
    sign = 1.0 if tolerance.t1 > tolerance.t0 else -1.0
    scale = tolerance.scale(y0, y0)
    d0, d1 = float(rms(y0 / scale)), float(rms(slope / scale))
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
    solver: ExplicitRungeKutta,
    kept: list[Tensor] | None = None,
    keep_stages: bool = False,
) -> tuple[Tensor, Steps]:
    """Solve dy/dt = f(t, y, θ), y(t0) = y0, to the tolerance.

    A rejected step leaves running statistics as they were, and the evaluation for the first step size does too. Where
    the method's last stage is the next step's first, it is evaluated once.

    Args:
        theta: constant in time.
        kept: as for ``integrate``, for accepted steps.

    Returns:
        y(t1), bit for bit that of ``integrate`` over the accepted steps, and those.

    Raises:
        SolveFailed: beyond ``max_evaluations``, or below ``min_step``.
        ValueError: if the method has no error estimate, or θ has a value for every step.
    """
    if any(entry.shape != p.shape for entry, p in zip(theta, field.theta, strict=True)):
        raise ValueError("adaptive steps need a θ constant in time: how many steps there will be is not known")
    table = solver.embedded
    if table.b_error is None:
        raise ValueError(f"{table.name} has no error estimate; adaptive steps need one: heun, bosh3 or dopri5")
    before = field.evaluations.total
    y, t = y0, tolerance.t0
    first = field(t, y, theta)
    with field.trial():
        h = _first_step(field, theta, y, first, tolerance, table.order)
    control = StepController(t, tolerance.t1, h, table.order, tolerance)
    slope: Tensor | None = first
    times, sizes = [t], []
    while not control.done:
        check_evaluations(tolerance, field.evaluations.total - before, control.t)
        if slope is None:
            slope = field(control.t, y, theta)
        t, h = control.t, control.h
        with field.trial() as trial:
            attempt = solver.attempt(field, theta, t, h, y, slope)
            error = tolerance.error_norm([attempt.error], [y], [attempt.y])
            accepted = control.judge(error)
            trial.keep = accepted
        field.count_step(accepted)
        if accepted:
            if kept is not None:
                kept += attempt.stages if keep_stages else [y]
            y, slope = attempt.y, attempt.last_slope
            times.append(control.t)
            sizes.append(h)
    return y, Steps(tuple(times), tuple(sizes))


def solve_forward(
    field: VectorField,
    y0: Tensor,
    theta: Theta,
    grid: TimeGrid | Tolerance,
    solver: ExplicitRungeKutta,
    kept: list[Tensor] | None = None,
    keep_stages: bool = False,
) -> tuple[Tensor, TimeGrid | Steps]:
    """``integrate`` over a given grid, or ``integrate_adaptive`` to a tolerance: y(t1) and the steps taken."""
    if isinstance(grid, Tolerance):
        return integrate_adaptive(field, y0, theta, grid, solver, kept, keep_stages)
    return integrate(field, y0, theta, grid, solver, kept, keep_stages), grid
