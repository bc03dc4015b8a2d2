"""Time grids, fixed or found by an adaptive solve, and tolerances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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


@dataclass(frozen=True)
class Tolerance:
    """Adaptive steps from t0 to t1, whose size keeps the estimated error of each below atol + rtol·|y|.

    Attributes:
        max_evaluations: most evaluations of f in one solve of one block in one direction.
        min_step: smallest step, in units of t; a solve that needs a smaller one fails.

    Raises:
        ValueError: if a tolerance is not positive, or t0 = t1.
    """

    rtol: float
    atol: float
    t0: float = 0.0
    t1: float = 1.0
    max_evaluations: int = 1000
    min_step: float = 1e-6

    def __post_init__(self) -> None:
        if not (self.rtol > 0 and self.atol > 0):
            raise ValueError(f"rtol is {self.rtol}, atol is {self.atol}; both must be above 0")
        if self.t0 == self.t1:
            raise ValueError(f"t0 and t1 are both {self.t0}; adaptive steps need an interval of time")

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
