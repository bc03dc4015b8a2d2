"""Trajectories of stiff systems, against the project's own solvers and known facts about the systems."""

import numpy as np
import pytest
import torch

from anode_exp.data import TRAJECTORIES, load_trajectory
from anode_exp.data.trajectories import halfway
from anode_exp.ode import SOLVERS, Tolerance, VectorField, solve_forward


class OfSystem(torch.nn.Module):
    def __init__(self, name, stiffness):
        super().__init__()
        self.derivative = TRAJECTORIES[name].derivative(stiffness)

    def forward(self, t, y):
        return torch.stack(self.derivative(t, y.unbind(-1)), -1)


@pytest.mark.parametrize(
    ("name", "points", "stiffness", "solver", "tolerance"),
    [("robertson", 8, 1.0, "kvaerno3", 1e-7), ("van_der_pol", 6, 5.0, "dopri5", 1e-9)],
)
def test_data_are_the_solution_of_the_system(name, points, stiffness, solver, tolerance):
    data = load_trajectory(name, points, stiffness)
    field, y = VectorField(OfSystem(name, stiffness)), torch.tensor([TRAJECTORIES[name].start], dtype=torch.float64)
    assert data.times[0] == 0 and len(data.times) == points + 1 and data.train.shape == (1, points + 1, y.shape[1])
    for i in range(points):
        t0, t1 = data.times[i : i + 2].tolist()
        grid = Tolerance(tolerance, tolerance * 1e-3, t0=t0, t1=t1, max_evaluations=100_000, min_step=1e-12)
        y = solve_forward(field, y, (), grid, SOLVERS[solver]())[0]
        scaled = (y - data.low) / (data.high - data.low)
        assert (scaled - data.train[:, i + 1]).abs().max() < 1e-4, t1


def test_scaled_states_fill_the_unit_interval_and_mass_is_kept():
    data = load_trajectory("robertson", 40)
    assert torch.equal(data.train.amin(1), torch.zeros(1, 3).double())
    assert torch.equal(data.train.amax(1), torch.ones(1, 3).double())
    states = data.low + (data.high - data.low) * data.test
    assert (states.sum(-1) - 1).abs().max() < 1e-10
    # at t = 100, between the values at 40 and 400 that the textbooks print, (0.7158, 9.18e-6) and (0.4505, 3.22e-6)
    assert 0.4505 < states[0, -1, 0] < 0.7158 and 3.22e-6 < states[0, -1, 1] < 9.18e-6


def test_test_times_are_the_training_times_and_those_between():
    data = load_trajectory("robertson", 4)
    assert torch.equal(data.test_times[::2], data.times) and torch.equal(data.test[:, ::2], data.train)
    between = data.test_times[1::2].tolist()
    assert between[0] == pytest.approx(0.5e-5) and between[1:] == pytest.approx(
        [(a * b) ** 0.5 for a, b in zip(data.times[1:-1].tolist(), data.times[2:].tolist(), strict=True)]
    )
    assert halfway(np.array([0.0, 1.0, 2.0, 3.0])).tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3]
