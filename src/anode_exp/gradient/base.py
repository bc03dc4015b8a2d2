"""The interface of gradient modes: a solve whose result can be differentiated in y0 and θ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from anode_exp.ode import ExplicitRungeKutta, Solver, State, Theta, TimeGrid, Tolerance, Trajectory, VectorField


class GradientMode(Protocol):
    """How a solve is differentiated. Forward values are those of ``solve_forward`` in every mode, bit for bit."""

    def solve(self, field: VectorField, y0: Tensor, theta: Theta, grid: TimeGrid | Tolerance, solver: Solver) -> Tensor:
        """y(t1) of dy/dt = f(t, y, θ), y(t0) = y0, with this mode's gradients in y0 and θ.

        Args:
            y0: initial state, any shape.
            theta: f's parameters, leaves or not; constant in time, or with a leading axis of n_steps.
            grid: fixed steps, or a tolerance for adaptive steps. Step sizes are constants in the gradient.
        """
        ...


@dataclass
class WarmStart:
    """Where the next iterative solve begins: the last trajectory, and the indices of its output steps."""

    trajectory: Trajectory | None = None
    ends: tuple[int, ...] = ()


@runtime_checkable
class ThroughMode(GradientMode, Protocol):
    """A mode that solves over several consecutive grids in one piece."""

    def solve_through(
        self,
        field: VectorField,
        y0: Tensor,
        theta: Theta,
        grids: Sequence[TimeGrid | Tolerance],
        solver: Solver,
        warm_start: WarmStart | None = None,
    ) -> Tensor:
        """y at the end of every grid, [K, …]; each grid begins where the previous one ends."""
        ...


def solve_through(
    mode: GradientMode,
    field: VectorField,
    y0: Tensor,
    theta: Theta,
    grids: Sequence[TimeGrid | Tolerance],
    solver: Solver,
    warm_start: WarmStart | None = None,
) -> Tensor:
    """y at the end of every grid, [K, …]: in one piece if the mode can, else by a chain of solves."""
    if isinstance(mode, ThroughMode):
        return mode.solve_through(field, y0, theta, grids, solver, warm_start)
    outputs = []
    for grid in grids:
        y0 = mode.solve(field, y0, theta, grid, solver)
        outputs.append(y0)
    return torch.stack(outputs)


def explicit(solver: Solver) -> ExplicitRungeKutta:
    """The solver, which must be an explicit Runge–Kutta method: its tableau also steps the continuous adjoint.

    Raises:
        ValueError: if it is not one.
    """
    if not isinstance(solver, ExplicitRungeKutta):
        raise ValueError(
            f"{solver.name}: the continuous adjoint is solved by explicit Runge–Kutta methods only; use a gradient "
            "mode that differentiates the discrete solve, such as dto_checkpoint"
        )
    return solver


def current_autocast(device_type: str) -> Callable[[], AbstractContextManager[Any]]:
    """A factory of contexts with the current autocast settings, which a Function's backward does not inherit."""
    if not torch.amp.is_autocast_available(device_type):  # such as meta
        return nullcontext
    settings: dict[str, Any] = {
        "dtype": torch.get_autocast_dtype(device_type),
        "enabled": torch.is_autocast_enabled(device_type),
        "cache_enabled": torch.is_autocast_cache_enabled(),
    }
    return partial(torch.autocast, device_type, **settings)


class ThetaGradient:
    """∂J/∂θ, step by step: summed up for entries constant in time, a row per step for entries with one θ per step.

    Args:
        theta: the entries, as the solve got them.
        needed: which of them need a gradient.

    Attributes:
        theta: detached; otherwise hooks of a non-leaf θ would run twice, once in a backward pass and once outside it.
        result: the gradient of each entry, None where none is needed.
        wanted: the entries of ``result`` that are not None.
    """

    def __init__(self, theta: Sequence[Tensor], needed: Sequence[bool]) -> None:
        self.theta = tuple(p.detach().requires_grad_(need) for p, need in zip(theta, needed, strict=True))
        self.result = [torch.zeros_like(p) if p.requires_grad else None for p in self.theta]
        self.wanted = [total for total in self.result if total is not None]

    def per_step(self, field: VectorField, n_steps: int) -> list[Theta]:
        """θ of each step, requiring a gradient where its entry does."""
        with torch.enable_grad():  # otherwise an entry's rows would not require a gradient
            return field.theta_per_step(self.theta, n_steps)

    def add(self, n: int, gradients: Sequence[Tensor], factor: float = 1.0) -> None:
        """The contribution of step n, factor · gradients, to each entry that needs one, in order."""
        if self.wanted:
            rows = [x if x.shape == g.shape else x[n] for x, g in zip(self.wanted, gradients, strict=True)]
            torch._foreach_add_(rows, list(gradients), alpha=factor)


def vjp_through(
    function: Callable[[State], State],
    state: State,
    theta: Theta,
    a: State,
    add: Callable[[Sequence[Tensor]], None],
) -> State:
    """∂J/∂state from ``a`` = ∂J/∂function(state), through the function's graph; missing entries of ``a`` are 0.

    Args:
        add: receives ∂J/∂θ, for each entry of θ that requires a gradient.
    """
    with torch.enable_grad():
        state = tuple(x.detach().requires_grad_() for x in state)
        # A constant, such as the zeros that a multistep method starts from, is not part of the graph.
        ends = [(get_gradient_edge(x), a_x) for x, a_x in zip(function(state), a, strict=False) if x.requires_grad]
        wanted = (*state, *(p for p in theta if p.requires_grad))
        edges, a_edges = [edge for edge, _ in ends], [a_x for _, a_x in ends]
        gradients = torch.autograd.grad(edges, wanted, a_edges, materialize_grads=True)
    add(gradients[len(state) :])
    return gradients[: len(state)]
