"""Step sizes from error estimates: a PI controller."""

from __future__ import annotations

from anode_exp.ode.grid import Tolerance

SAFETY, SHRINK_AT_MOST, GROW_AT_MOST = 0.9, 0.2, 10.0


class SolveFailed(RuntimeError):
    """A solve that did not reach its end: too many evaluations of f, a step too small, or a stage without solution."""


class NewtonFailed(SolveFailed):
    """The equation of an implicit method's stage was not solved; a smaller step may succeed."""


class StepController:
    """Proportional–integral control of the step size: h ← h · 0.9 · e_n^(−0.7/k) · e_(n−1)^(0.4/k), within [0.2, 10].

    e is the error norm, k the order of the estimate in h. After a rejection h ← h · 0.9 · e^(−1/k), and the next
    step does not grow.

    Attributes:
        t, h: start and signed size of the next attempt; the last one ends exactly at t1.
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
        # If the rest is only slightly longer than a step, one step covers it, so that no tiny step remains.
        return left if abs(left) <= self._h * 1.001 else self._h if left > 0 else -self._h

    def judge(self, error: float) -> bool:
        """Whether the attempt of size h is accepted. Advances t if it is, and sets the next size.

        Raises:
            SolveFailed: if the next step would be smaller than ``min_step``.
        """
        h = self.h
        accepted = error <= 1.0  # False for NaN
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
        if not self.done and not self._h >= self._tolerance.min_step:  # also for NaN
            raise SolveFailed(
                f"adaptive solve at t = {self.t:.6g} needs a step of {self._h:.2g}, below min_step = "
                f"{self._tolerance.min_step:g}: the field is too stiff or not finite; loosen rtol and atol, or lower "
                "min_step"
            )
        return accepted


def check_evaluations(tolerance: Tolerance, evaluations: int, t: float) -> None:
    """Raises SolveFailed above ``max_evaluations``."""
    if evaluations > tolerance.max_evaluations:
        raise SolveFailed(
            f"adaptive solve reached t = {t:.6g} after {evaluations} evaluations of f, more than max_evaluations = "
            f"{tolerance.max_evaluations}: loosen rtol and atol, or raise max_evaluations"
        )
