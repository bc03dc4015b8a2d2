"""Reversible methods: their inverse, their order, and where damping and coupling keep them stable."""

import math

import pytest
import torch
from conftest import Field
from torch import nn

from anode_exp.ode import (
    TABLEAUX,
    AsynchronousLeapfrog,
    ReversibleRungeKutta,
    TimeGrid,
    VectorField,
    end_state,
    integrate,
    with_inverse,
)

METHODS = {
    "alf": AsynchronousLeapfrog(),
    "alf, damped": AsynchronousLeapfrog(0.8),
    **{name: ReversibleRungeKutta(tableau, 0.5) for name, tableau in TABLEAUX.items()},
    "rk2, coupling 0.99": ReversibleRungeKutta(),
}


class Swing(nn.Module):
    """dy/dt = y cos t, so y(t) = y(0) exp(sin t)."""

    def forward(self, t, y):
        return y * math.cos(t)


class Decay(nn.Module):
    """dy/dt = −y."""

    def forward(self, t, y):
        return -y


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_the_inverse_undoes_a_step(name, backwards):
    method, field = METHODS[name], VectorField(Field())
    grid = TimeGrid(8, 1.5, 0.0) if backwards else TimeGrid(8, 0.0, 1.5)
    y0 = torch.tensor([[0.3, -0.2, 0.9], [1.0, 0.1, -0.5]], dtype=torch.float64)
    begin = method.start(field, field.theta, grid.time(0), y0)
    state = end_state(field, y0, field.theta, grid, method)
    assert (state[0] - y0).norm() > 0.5
    for n in reversed(range(8)):
        state = method.inverse(field, field.theta, grid.time(n), grid.step_size(n), state)
    for ours, theirs in zip(state, begin, strict=True):
        assert (ours - theirs).norm() <= (1e-14 if name in ("alf", "rk2, coupling 0.99") else 1e-12) * theirs.norm()


def error(method, n_steps):
    y0 = torch.ones(1, dtype=torch.float64)
    y1 = integrate(VectorField(Swing()), y0, (), TimeGrid(n_steps, 0.0, 2.0), method)
    return abs(float(y1) - math.exp(math.sin(2.0)))


@pytest.mark.parametrize("name", [name for name in METHODS if name != "dopri5"])
def test_order(name):
    method = METHODS[name]
    assert math.log2(error(method, 256) / error(method, 512)) == pytest.approx(method.order, abs=0.05)


def test_order_of_dormand_prince():
    """With few steps, so that its error is above rounding."""
    assert math.log2(error(METHODS["dopri5"], 8) / error(METHODS["dopri5"], 16)) > 4.6


def test_what_damping_does_to_the_error():
    """The term of order 1 is proportional to (1 − η)/(2η) h; undamped there is none."""
    n, damped = 1000, {eta: error(AsynchronousLeapfrog(eta), 1000) for eta in (0.6, 0.8, 0.9)}
    constants = [e * n / ((1 - eta) / (2 * eta)) for eta, e in damped.items()]
    assert max(constants) == pytest.approx(min(constants), rel=0.02)
    assert error(AsynchronousLeapfrog(), n) < 0.01 * min(damped.values())


def test_what_damping_does_to_stability():
    """dy/dt = −y: stable up to steps of 2(1 − η)/η, so undamped an oscillation grows with any step."""
    assert decayed(AsynchronousLeapfrog(), 0.25) > 1e6
    assert decayed(AsynchronousLeapfrog(0.8), 0.4) < 1e-6 < 1e6 < decayed(AsynchronousLeapfrog(0.8), 0.6)


def test_what_coupling_does_to_stability():
    """dy/dt = −y: y − z is multiplied by λ R(h) in every step, R(h) ≈ exp(h) the tableau's growth of e^t."""
    rk4 = TABLEAUX["rk4"]
    assert decayed(ReversibleRungeKutta(rk4, 0.7), 0.25) < 1e-6 < 1e6 < decayed(ReversibleRungeKutta(rk4, 0.9), 0.25)


def decayed(method, h):
    """|y| after 800 steps of size h from 1."""
    grid = TimeGrid(800, 0.0, 800 * h)
    return abs(float(integrate(VectorField(Decay()), torch.ones(1, dtype=torch.float64), (), grid, method)))


@pytest.mark.parametrize("damping", [0.5, 0.4, 1.01, float("nan")])
def test_damping_out_of_range(damping):
    with pytest.raises(ValueError, match=r"give a number above 0\.5, at most 1"):
        AsynchronousLeapfrog(damping)


@pytest.mark.parametrize("coupling", [0.0, 1.5])
def test_coupling_out_of_range(coupling):
    with pytest.raises(ValueError, match="give a number above 0, at most 1"):
        ReversibleRungeKutta(coupling=coupling)


@pytest.mark.parametrize("name", METHODS)
def test_nodes_are_the_times_of_evaluations(name):
    """BatchNorm needs statistics at these times: within a step, and in the start."""
    times = []

    class Seen(nn.Module):
        def forward(self, t, y):
            times.append(t)
            return y

    method, field, y = METHODS[name], VectorField(Seen()), torch.ones(1)
    state = method.start(field, (), 0.0, y)
    assert tuple(times) == method.start_nodes
    times.clear()
    method.step(field, (), 0.0, 1.0, state)
    assert {round(t, 9) for t in times} == {round(c, 9) for c in method.nodes}


def test_a_method_without_an_inverse():
    with pytest.raises(ValueError, match=r"Plain has no inverse step; .* alf or reversible_rk"):

        class Plain:
            name = "Plain"

        with_inverse(Plain())
