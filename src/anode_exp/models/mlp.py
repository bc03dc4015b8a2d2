"""A multilayer perceptron as the vector field of a trajectory, and the network that solves through given times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from anode_exp.gradient.base import WarmStart, solve_through
from anode_exp.models.layers import ACTIVATIONS, MakeOdeBlock
from anode_exp.models.ode_block import OdeBlock
from anode_exp.ode import Trajectory


class Mlp(nn.Sequential):
    """f(t, y) = W_L σ(… σ(W_1 y)), without t.

    PNODE's network for Robertson's system is 3-5-5-5-5-5-5-3 with GELU, no bias and std 0.5 (arXiv 2206.01298).

    Args:
        size: numbers in a state.
        hidden: width of each hidden layer.
        std: weights are drawn from N(0, std²), and biases are 0; None leaves both as PyTorch draws them.
    """

    def __init__(self, size: int, hidden: Sequence[int], activation: str, bias: bool, std: float | None) -> None:
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise((size, *hidden, size)):
            layers += [nn.Linear(n_in, n_out, bias), ACTIVATIONS[activation]()]
        super().__init__(*layers[:-1])
        for layer in self:
            if isinstance(layer, nn.Linear) and std is not None:
                nn.init.normal_(layer.weight, 0.0, std)
                if bias:
                    nn.init.zeros_(layer.bias)

    def forward(self, t: float, y: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(y)


class TrajectoryNetwork(nn.Module):
    """(y0, times) ↦ y at the times: one solve through all intervals, each taken in the block's steps.

    In training an implicit solve with ``gradient=batched_adjoint`` begins from the trajectory of the last call. This
    trajectory is part of the network's state, so that a resumed run continues bit for bit.
    """

    def __init__(self, block: OdeBlock) -> None:
        super().__init__()
        self.block = block
        self.warm_start = WarmStart()

    def forward(self, y0: Tensor, times: Tensor) -> Tensor:
        """y0: [B, d]; times: [T + 1] on the CPU, y0's first. Returns [B, T, d]."""
        block = self.block
        grids = [replace(block.grid, t0=t0, t1=t1) for t0, t1 in pairwise(times.tolist())]
        warm = self.warm_start if self.training and torch.is_grad_enabled() else None
        states = solve_through(block.gradient, block.field, y0, block.field.theta, grids, block.solver, warm)
        return states.transpose(0, 1)

    def get_extra_state(self) -> dict[str, Any]:
        warm = self.warm_start
        return {"trajectory": None if warm.trajectory is None else vars(warm.trajectory), "ends": list(warm.ends)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        trajectory, device = None, next(self.parameters()).device
        if state["trajectory"] is not None:
            trajectory = Trajectory(**{name: x.to(device) for name, x in state["trajectory"].items()})
        self.warm_start = WarmStart(trajectory, tuple(state["ends"]))


def mlp(
    size: int,
    make_ode_block: MakeOdeBlock,
    hidden: Sequence[int],
    activation: str,
    bias: bool = True,
    weight_std: float | None = None,
) -> TrajectoryNetwork:
    """A trajectory network whose f is an ``Mlp``."""
    block = make_ode_block(Mlp(size, hidden, activation, bias, weight_std))
    assert isinstance(block, OdeBlock)
    return TrajectoryNetwork(block)
