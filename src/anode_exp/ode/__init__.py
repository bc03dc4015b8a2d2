"""What an ODE solve is: vector field, tableau, step, time loop. Knows torch only."""

from anode_exp.ode.controller import SolveFailed, StepController, check_evaluations
from anode_exp.ode.explicit import ExplicitRungeKutta, weighted_sum
from anode_exp.ode.grid import Steps, TimeGrid, Tolerance
from anode_exp.ode.integrate import integrate, integrate_adaptive, solve_forward
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
