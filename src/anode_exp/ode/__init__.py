"""What an ODE solve is: vector field, tableau, step, time loop. Knows torch only."""

from anode_exp.ode.integrate import TimeGrid, integrate
from anode_exp.ode.runge_kutta import ExplicitRungeKutta, weighted_sum
from anode_exp.ode.tableau import TABLEAUX, ButcherTableau
from anode_exp.ode.vector_field import Evaluations, Theta, VectorField

__all__ = [
    "TABLEAUX",
    "ButcherTableau",
    "Evaluations",
    "ExplicitRungeKutta",
    "Theta",
    "TimeGrid",
    "VectorField",
    "integrate",
    "weighted_sum",
]
