"""What an ODE solve is: vector field, tableau, step, time loop. Knows torch only."""

from anode_exp.ode.adaptive import (
    SolveFailed,
    StepController,
    Tolerance,
    check_evaluations,
    integrate_adaptive,
    solve_forward,
)
from anode_exp.ode.integrate import Steps, TimeGrid, integrate
from anode_exp.ode.runge_kutta import ExplicitRungeKutta, weighted_sum
from anode_exp.ode.tableau import TABLEAUX, ButcherTableau
from anode_exp.ode.vector_field import Evaluations, Theta, VectorField

__all__ = [
    "TABLEAUX",
    "ButcherTableau",
    "Evaluations",
    "ExplicitRungeKutta",
    "SolveFailed",
    "StepController",
    "Steps",
    "Theta",
    "TimeGrid",
    "Tolerance",
    "VectorField",
    "check_evaluations",
    "integrate",
    "integrate_adaptive",
    "solve_forward",
    "weighted_sum",
]
