"""The parts of an ODE solve: vector field, solver, time grid, time loop. Imports torch only."""

from collections.abc import Callable
from functools import partial

from anode_exp.ode.at_once import Trajectory, adjoint_at_once, newton_at_once
from anode_exp.ode.controller import NewtonFailed, SolveFailed, StepController, check_evaluations
from anode_exp.ode.explicit import ExplicitRungeKutta, weighted_sum
from anode_exp.ode.grid import Steps, TimeGrid, Tolerance
from anode_exp.ode.implicit import DiagonallyImplicitRungeKutta
from anode_exp.ode.integrate import end_state, integrate, integrate_adaptive, solve_forward
from anode_exp.ode.newton_krylov import NewtonKrylov, linearised
from anode_exp.ode.reversible import AsynchronousLeapfrog, ReversibleRungeKutta
from anode_exp.ode.solver import (
    EmbeddedSolver,
    ReversibleSolver,
    Solver,
    StageSolver,
    State,
    with_inverse,
    with_stages,
)
from anode_exp.ode.tableau import IMPLICIT_TABLEAUX, TABLEAUX, ButcherTableau, ImplicitTableau
from anode_exp.ode.vector_field import Evaluations, Theta, VectorField

SOLVERS: dict[str, Callable[..., Solver]] = {
    **{name: partial(ExplicitRungeKutta, tableau) for name, tableau in TABLEAUX.items()},
    **{name: partial(DiagonallyImplicitRungeKutta, tableau) for name, tableau in IMPLICIT_TABLEAUX.items()},
    "alf": AsynchronousLeapfrog,
    "reversible_rk": ReversibleRungeKutta,
}
"""Name → what makes the solver; implicit ones take a ``NewtonKrylov``, reversible ones their coefficients."""

__all__ = [
    "IMPLICIT_TABLEAUX",
    "SOLVERS",
    "TABLEAUX",
    "AsynchronousLeapfrog",
    "ButcherTableau",
    "DiagonallyImplicitRungeKutta",
    "EmbeddedSolver",
    "Evaluations",
    "ExplicitRungeKutta",
    "ImplicitTableau",
    "NewtonFailed",
    "NewtonKrylov",
    "ReversibleRungeKutta",
    "ReversibleSolver",
    "SolveFailed",
    "Solver",
    "StageSolver",
    "State",
    "StepController",
    "Steps",
    "Theta",
    "TimeGrid",
    "Tolerance",
    "Trajectory",
    "VectorField",
    "adjoint_at_once",
    "check_evaluations",
    "end_state",
    "integrate",
    "integrate_adaptive",
    "linearised",
    "newton_at_once",
    "solve_forward",
    "weighted_sum",
    "with_inverse",
    "with_stages",
]
