"""The interface of ODE methods: one differentiable step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from anode_exp.ode.vector_field import Theta, VectorField

State = tuple[Tensor, ...]
"""What a method carries from step to step: y first, then its other tensors, floating point and of any shape."""


class Solver(Protocol):
    """A one-step method for dy/dt = f(t, y, θ), with θ constant within a step.

    Attributes:
        name: of the method.
        order: p: the error over a fixed interval is O(h^p).
        static: whether a step performs the same operations at every call. A CUDA graph can capture only such steps, and
            a byte budget can plan only for them.
        nodes: times in [0, 1], in units of the step, at which a step evaluates f.
        start_nodes: the same for ``start``, in units of the first step.
    """

    name: str
    order: int
    static: bool
    nodes: tuple[float, ...]
    start_nodes: tuple[float, ...]

    def start(self, field: VectorField, theta: Theta, t: float, y: Tensor) -> State:
        """The initial state of a solve from y at time t, with the θ of the first step."""
        ...

    def step(self, field: VectorField, theta: Theta, t: float, h: float, state: State) -> State:
        """The state at t + h, differentiable by autograd in the state and in θ."""
        ...


@runtime_checkable
class StageSolver(Solver, Protocol):
    """A method with stage states Y_i, with the adjoint step written out: a stage can be a unit of checkpointing."""

    def step(
        self, field: VectorField, theta: Theta, t: float, h: float, state: State, stages: list[Tensor] | None = None
    ) -> State:
        """As ``Solver.step``; ``stages`` receives the stage states."""
        ...

    def stage_states(self, field: VectorField, theta: Theta, t: float, h: float, state: State) -> list[Tensor]:
        """The stage states of one step."""
        ...

    def adjoint_step(
        self,
        field: VectorField,
        theta: Theta,
        t: float,
        h: float,
        stages: list[Tensor],
        a: State,
        add: Callable[[Sequence[Tensor], float], None],
    ) -> State:
        """The adjoint of one step: ∂J/∂state from ``a`` = ∂J/∂state of the step's end.

        Args:
            stages: the step's stage states; emptied, so that each is freed as soon as it is used.
            add: receives gradients in θ and a factor for them.
        """
        ...


def with_stages(solver: Solver) -> StageSolver:
    """The solver, which must have stage states.

    Raises:
        ValueError: if it has none.
    """
    if not isinstance(solver, StageSolver):
        raise ValueError(f"{solver.name} has no stage states with an adjoint step; use the unit step or block")
    return solver


@dataclass
class Attempt:
    """One step that may be rejected: y(t + h), its error estimate, f there if the method evaluates it, stage states."""

    y: Tensor
    error: Tensor
    last_slope: Tensor | None
    stages: list[Tensor]


@runtime_checkable
class EmbeddedSolver(Solver, Protocol):
    """A method that may have an error estimate, for adaptive steps. Its state is y only.

    Attributes:
        error_order: k: the estimate is O(h^k); None without one.
    """

    error_order: int | None

    def attempt(self, field: VectorField, theta: Theta, t: float, h: float, y: Tensor, first: Tensor) -> Attempt:
        """A step with its error estimate, from the slope ``first`` = f(t, y)."""
        ...


@runtime_checkable
class ReversibleSolver(Solver, Protocol):
    """A method whose step has an inverse in closed form: the last state is enough to go back to the first."""

    def inverse(self, field: VectorField, theta: Theta, t: float, h: float, state: State) -> State:
        """The state at t from that at t + h: undoes ``step``, up to rounding."""
        ...

    def reverse_step(
        self,
        field: VectorField,
        theta: Theta,
        t: float,
        h: float,
        state: list[Tensor],
        a: list[Tensor],
        add: Callable[[Sequence[Tensor], float], None],
    ) -> tuple[State, State]:
        """The state at t and its adjoint ∂J/∂state, from those at t + h, with the evaluations of one ``inverse``.

        Args:
            state, a: emptied, so that each tensor is freed as soon as it is used.
            add: receives gradients in θ and a factor for them.
        """
        ...


def with_inverse(solver: Solver) -> ReversibleSolver:
    """The solver, whose step must have an inverse.

    Raises:
        ValueError: if it has none.
    """
    if not isinstance(solver, ReversibleSolver):
        raise ValueError(
            f"{solver.name} has no inverse step; gradient mode reversible needs one; use alf or reversible_rk"
        )
    return solver
