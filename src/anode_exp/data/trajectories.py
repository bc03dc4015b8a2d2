"""Solutions of stiff systems at given times, as data to be fitted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from anode_exp.errors import UserError

Derivative = Callable[[float, "np.ndarray"], Sequence[float]]


@dataclass(frozen=True)
class System:
    """A system du/dt = f(t, u), its initial state and the times of its data.

    Attributes:
        times: maps the number of points and the stiffness to the times after 0, in increasing order.
    """

    size: int
    start: tuple[float, ...]
    derivative: Callable[[float], Derivative]
    times: Callable[[int, float], np.ndarray]


def _robertson(stiffness: float) -> Derivative:
    def f(t: float, u: np.ndarray) -> Sequence[float]:
        a, b, c = u
        first, second, third = 0.04 * a, 3e7 * b * b, 1e4 * b * c
        return third - first, first - third - second, second

    return f


def _van_der_pol(stiffness: float) -> Derivative:
    def f(t: float, u: np.ndarray) -> Sequence[float]:
        y, v = u
        return v, stiffness * (1 - y * y) * v - y

    return f


TRAJECTORIES: dict[str, System] = {
    # u' of Robertson's reaction with rates 0.04, 3e7, 1e4 (H. H. Robertson, 1966; PNODE's stiff example)
    "robertson": System(3, (1.0, 0.0, 0.0), _robertson, lambda points, _: np.geomspace(1e-5, 1e2, points)),
    # y'' = μ (1 − y²) y' − y from (2, 0), over one and a quarter periods of about 1.614 μ for large μ
    "van_der_pol": System(2, (2.0, 0.0), _van_der_pol, lambda points, mu: np.linspace(0.0, 2.0 * mu, points + 1)[1:]),
}


@dataclass(frozen=True)
class TrajectoryData:
    """One trajectory, every component scaled to [0, 1] over the training times.

    Attributes:
        times: of the training states, the first of them 0, [T + 1] on the CPU.
        test_times: the training times and the midpoints between them: geometric midpoints, if the times are spaced
            geometrically.
        train, test: scaled states, [1, T + 1, d] and [1, 2 T + 1, d].
        low, high: of each component, [d]: u = low + (high − low) · scaled.
    """

    times: Tensor
    test_times: Tensor
    train: Tensor
    test: Tensor
    low: Tensor
    high: Tensor

    @property
    def device(self) -> torch.device:
        return self.train.device

    @property
    def nbytes(self) -> int:
        return self.train.nbytes + self.test.nbytes

    def to(self, device: torch.device, dtype: torch.dtype = torch.float64) -> TrajectoryData:
        moved = (x.to(device, dtype) for x in (self.train, self.test, self.low, self.high))
        return TrajectoryData(self.times, self.test_times, *moved)


def halfway(times: np.ndarray) -> np.ndarray:
    """The times, which begin with 0, and the midpoints between them: arithmetic for equal steps, else geometric."""
    steps = np.diff(times)
    middle = (times[:-1] + times[1:]) / 2
    if not np.allclose(steps, steps[0]):
        middle[1:] = np.sqrt(times[1:-1] * times[2:])
    return np.sort(np.concatenate([times, middle]))


def load_trajectory(name: str, points: int, stiffness: float = 1.0) -> TrajectoryData:
    """The solution of a system at 0 and ``points`` later times, in float64: scipy's Radau, rtol 1e-11, atol 1e-14.

    Raises:
        UserError: if the system cannot be solved.
    """
    from scipy.integrate import solve_ivp

    system = TRAJECTORIES[name]
    times = np.concatenate([[0.0], system.times(points, stiffness)])
    fine = halfway(times)
    solution = solve_ivp(
        system.derivative(stiffness), (0.0, float(times[-1])), system.start, "Radau", fine, rtol=1e-11, atol=1e-14
    )
    if not solution.success:
        raise UserError(f"dataset={name}: cannot be solved with these settings ({solution.message})")
    states = torch.from_numpy(solution.y.T.copy())
    at_times = states[torch.from_numpy(np.isin(fine, times))]
    low, high = at_times.amin(0), at_times.amax(0)
    scaled, fine_scaled = ((x - low) / (high - low) for x in (at_times, states))
    as_tensor = torch.from_numpy
    return TrajectoryData(as_tensor(times), as_tensor(fine), scaled[None], fine_scaled[None], low, high)
