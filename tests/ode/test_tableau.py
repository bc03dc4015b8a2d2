import math

import pytest
import scipy.integrate
import torch
from torch import nn

from anode_exp.ode import TABLEAUX, ButcherTableau, ExplicitRungeKutta, TimeGrid, VectorField, integrate

EVALUATIONS = {"euler": 1, "rk2": 2, "heun": 2, "bosh3": 3, "rk4": 4, "dopri5": 6}


class Rational(nn.Module):
    """dy/dt = −2 t y², y(0) = 1: y = 1/(1 + t²). Depends on time, so wrong stage times show."""

    def forward(self, t, y):
        return -2 * t * y * y


def error(name: str, n_steps: int) -> float:
    y0 = torch.ones(1, dtype=torch.float64)
    y1 = integrate(VectorField(Rational()), y0, (), TimeGrid(n_steps, 0.0, 2.0), ExplicitRungeKutta(TABLEAUX[name]))
    return abs(float(y1) - 1 / 5)


@pytest.mark.parametrize("name", TABLEAUX)
def test_convergence_order(name):
    slope = math.log2(error(name, 64) / error(name, 128))
    assert slope == pytest.approx(TABLEAUX[name].order, abs=0.25)


@pytest.mark.parametrize("name", TABLEAUX)
def test_evaluations_a_step(name):
    field = VectorField(Rational())
    integrate(field, torch.ones(1), (), TimeGrid(3), ExplicitRungeKutta(TABLEAUX[name]))
    assert field.evaluations.forward == 3 * EVALUATIONS[name]


def test_every_tableau_has_its_evaluations_stated():
    assert set(EVALUATIONS) == set(TABLEAUX)


@pytest.mark.parametrize(("name", "theirs"), [("dopri5", scipy.integrate.RK45), ("bosh3", scipy.integrate.RK23)])
def test_coefficients_are_scipys(name, theirs):
    ours = TABLEAUX[name]
    s = theirs.n_stages
    for i in range(s):
        assert list(ours.a[i]) == pytest.approx(list(theirs.A[i, :i]), abs=1e-15)
    assert list(ours.b[:s]) == pytest.approx(list(theirs.B), abs=1e-15)
    assert list(ours.c[:s]) == pytest.approx(list(theirs.C), abs=1e-15)
    assert list(ours.b_error) == pytest.approx([-e for e in theirs.E], abs=1e-15)  # SciPy's E is embedded − solution


def test_the_embedded_method_of_heun_is_euler():
    heun = TABLEAUX["heun"]
    assert [b - e for b, e in zip(heun.b, heun.b_error, strict=True)] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": ((), (0.4,))}, "row 1 of a sums to 0.4"),
        ({"b": (0.5, 0.4)}, "b sums to"),
        ({"b_error": (0.5, 0.5)}, "b_error sums to 1"),
        ({"b_error": (0.0,)}, "1 weights for 2 stages"),
        ({"a": ((), (0.5, 0.0))}, "same 2 explicit stages"),
        ({"c": (0.0,)}, "same 2 explicit stages"),
    ],
)
def test_an_inconsistent_tableau_is_refused(change, message):
    good = {"a": ((), (0.5,)), "b": (0.0, 1.0), "c": (0.0, 0.5), "order": 2, "reference": ""}
    ButcherTableau("good", **good)
    with pytest.raises(ValueError, match=message):
        ButcherTableau("bad", **{**good, **change})
