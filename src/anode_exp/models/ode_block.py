"""A network layer that is an ODE solve."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from anode_exp.gradient.base import GradientMode
from anode_exp.models.evolution import Evolution
from anode_exp.ode import Evaluations, Solver, TimeGrid, Tolerance, VectorField


class OdeBlock(nn.Module):
    """y ↦ y(t1) with dy/dt = f(t, y), y(t0) = y: f's module, a solver, a time grid and a gradient mode.

    A residual block y + f(y) is this with one Euler step on [0, 1] (ANODE Eq. 1).

    Args:
        f: module called as ``f(t, y)``, returning dy/dt of y's shape.
        evolution: lets f's weights evolve in time; without it they are constant.

    Raises:
        ValueError: for weights that change per step with adaptive steps.
    """

    def __init__(
        self,
        f: nn.Module,
        solver: Solver,
        grid: TimeGrid | Tolerance,
        gradient: GradientMode,
        evolution: Evolution | None = None,
    ) -> None:
        if evolution is not None and evolution.coupling == "joint" and isinstance(grid, Tolerance):
            raise ValueError("weights that evolve with the activations need fixed steps, with one θ per step")
        super().__init__()
        self.f = f
        self.solver = solver
        self.grid = grid
        self.gradient = gradient
        self.evolution = evolution
        self.field = VectorField(f)

    def forward(self, y: Tensor) -> Tensor:
        """y: [B, C, H, W], or any shape f takes."""
        theta = self.field.theta
        if self.evolution is not None:
            theta = self.evolution(theta, self.grid.n_steps if isinstance(self.grid, TimeGrid) else 1)
        return self.gradient.solve(self.field, y, theta, self.grid, self.solver)

    def extra_repr(self) -> str:
        return f"solver={self.solver.name}, {self.grid}, gradient={type(self.gradient).__name__}"


def ode_blocks(network: nn.Module) -> Iterator[OdeBlock]:
    return (m for m in network.modules() if isinstance(m, OdeBlock))


def take_evaluations(network: nn.Module) -> list[Evaluations]:
    """Evaluations of f in each ODE block of a network since the last call."""
    taken = []
    for block in ode_blocks(network):
        taken.append(block.field.evaluations)
        block.field.evaluations = Evaluations()
    return taken


def count_parameters(network: nn.Module) -> dict[str, int]:
    """Number of parameters in all (``total``) and in ODE blocks (``ode_blocks``)."""
    return {
        "total": sum(p.numel() for p in network.parameters()),
        "ode_blocks": sum(p.numel() for block in ode_blocks(network) for p in block.parameters()),
    }
