"""Full backpropagation through the solver's own operations."""

from __future__ import annotations

from torch import Tensor

from anode_exp.ode import Solver, Theta, TimeGrid, Tolerance, VectorField, solve_forward


class FullBackprop:
    """Discretise-then-optimise with everything kept: autograd records the whole solve.

    The exact gradient of the discrete solve, and the reference for the tests of other modes. For a block of N steps, s
    stages and L layers in f, it holds N s L activations and evaluates f in the forward solve only (s N).

    Source: ANODE (arXiv 1902.10298) Sec. II.
    """

    def solve(self, field: VectorField, y0: Tensor, theta: Theta, grid: TimeGrid | Tolerance, solver: Solver) -> Tensor:
        return solve_forward(field, y0, theta, grid, solver)[0]
