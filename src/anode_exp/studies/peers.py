"""Other libraries' ways to differentiate a solve, in the form of gradient modes, to compare with this project's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchdiffeq import odeint_adjoint

from anode_exp.config.schema import TORCHDIFFEQ_METHODS
from anode_exp.gradient import GradientMode
from anode_exp.ode import Solver, Theta, TimeGrid, Tolerance, VectorField, solve_forward


class TorchCheckpoint:
    """``torch.utils.checkpoint`` around each block's solve: the peer of ``dto_checkpoint``."""

    def solve(self, field: VectorField, y0: Tensor, theta: Theta, grid: TimeGrid | Tolerance, solver: Solver) -> Tensor:
        def run(y: Tensor) -> Tensor:
            return solve_forward(field, y, theta, grid, solver)[0]

        return checkpoint(run, y0, use_reentrant=False)


class TorchdiffeqAdjoint:
    """torchdiffeq's ``odeint_adjoint``: the continuous adjoint, the peer of ``reverse_adjoint``.

    On a fixed grid of equal steps, or to a tolerance, where the backward solve has its own steps. Its ``rk4`` is the
    3/8 rule: as many evaluations as the classical method, but a different solution.
    """

    def solve(self, field: VectorField, y0: Tensor, theta: Theta, grid: TimeGrid | Tolerance, solver: Solver) -> Tensor:
        """Raises KeyError for a solver that ``TORCHDIFFEQ_METHODS`` does not have."""
        settings: dict[str, Any] = {"method": TORCHDIFFEQ_METHODS[isinstance(grid, Tolerance)][solver.name]}
        if isinstance(grid, Tolerance):
            settings |= {"rtol": grid.rtol, "atol": grid.atol}
        else:
            settings |= {"options": {"step_size": (grid.t1 - grid.t0) / grid.n_steps}}
        times = torch.tensor([grid.t0, grid.t1], dtype=y0.dtype)
        return odeint_adjoint(_Module(field, theta), y0, times, adjoint_params=theta, **settings)[-1]


class _Module(nn.Module):
    """f as torchdiffeq calls it. It reads t on the host, for norms by time; on CUDA this waits for the device."""

    def __init__(self, field: VectorField, theta: Theta) -> None:
        super().__init__()
        self.field, self.theta = field, theta

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        # torchdiffeq solves forwards without a graph, and backwards with one of each evaluation.
        if torch.is_grad_enabled():
            with self.field.re_evaluation():
                return self.field(float(t.detach()), y, self.theta)
        return self.field(float(t.detach()), y, self.theta)


PEERS: dict[str, type[GradientMode]] = {
    "torch_checkpoint": TorchCheckpoint,
    "torchdiffeq_adjoint": TorchdiffeqAdjoint,
}
"""Name of ``baseline`` → mode, in ``bench`` and in a study's ``gradients``."""
