"""A trajectory's adjoint, all steps at once, against the same steps one by one, autograd and differences."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from anode_exp.gradient import BatchedAdjoint, FullBackprop, StageCheckpoint, WarmStart, solve_through
from anode_exp.ode import SOLVERS, TABLEAUX, NewtonKrylov, TimeGrid, Tolerance, VectorField, adjoint_at_once
from anode_exp.ode.controller import NewtonFailed

TIMES = (0.0, 0.1, 0.5, 1.7)
IMPLICIT = ("backward_euler", "crank_nicolson", "sdirk2", "tr_bdf2", "kvaerno3")


class F(nn.Module):
    """tanh(W y + t v) − 3 y: depends on time; samples are independent."""

    def __init__(self):
        super().__init__()
        self.linear, self.v = nn.Linear(3, 3), nn.Parameter(torch.randn(3))
        self.unused = nn.Parameter(torch.zeros(2))

    def forward(self, t, y):
        return torch.tanh(self.linear(y) + t * self.v) - 3 * y


def setting():
    torch.manual_seed(0)
    return VectorField(F().double()), torch.randn(4, 3, dtype=torch.float64, requires_grad=True)


def grids(n_steps=2):
    return [TimeGrid(n_steps, t0, t1) for t0, t1 in pairwise(TIMES)]


def gradients(mode, solver, steps, **keywords):
    """y at the later times, the gradient of a function of all of them, and the counted evaluations."""
    field, y0 = setting()
    y = solve_through(mode, field, y0, field.theta, steps, solver, **keywords)
    weights = torch.arange(1, 1 + y.numel(), dtype=y.dtype).sin().view(y.shape)
    (weights * y.square()).sum().backward()
    f = field.module
    found = [y0.grad, f.v.grad, f.linear.weight.grad, f.linear.bias.grad, f.unused.grad]
    return y.detach(), found, field.evaluations


@pytest.mark.parametrize("name", [name for name in SOLVERS if hasattr(SOLVERS[name](), "tableau")])
def test_it_is_the_adjoint_of_the_steps_one_by_one(name):
    y, ours, counts = gradients(BatchedAdjoint(), SOLVERS[name](), grids())
    same, theirs, expected = gradients(StageCheckpoint(), SOLVERS[name](), grids())
    assert torch.equal(y, same) and counts.forward == expected.forward
    assert counts.backward <= expected.backward, "one evaluation for each stage of each step"
    for mine, other in zip(ours[:-1], theirs[:-1], strict=True):
        assert (mine - other).norm() <= 1e-13 * other.norm()
    assert ours[-1] is None or not ours[-1].any(), "a parameter that f does not use"


def test_every_tableau_is_among_them():
    assert {*IMPLICIT, *TABLEAUX} == {name for name in SOLVERS if hasattr(SOLVERS[name](), "tableau")}


@pytest.mark.parametrize("name", ["rk2", "dopri5"])
def test_it_is_full_backpropagation_through_explicit_steps(name):
    _, ours, _ = gradients(BatchedAdjoint(), SOLVERS[name](), grids(3))
    _, theirs, _ = gradients(FullBackprop(), SOLVERS[name](), grids(3))
    for mine, other in zip(ours[:-1], theirs[:-1], strict=True):
        assert (mine - other).norm() <= 1e-13 * other.norm()


@pytest.mark.parametrize("name", ["dopri5", "kvaerno3"])
def test_it_takes_adaptive_steps(name):
    chosen = [Tolerance(1e-5, 1e-5, t0=t0, t1=t1) for t0, t1 in pairwise(TIMES)]
    y, ours, counts = gradients(BatchedAdjoint(), SOLVERS[name](), chosen)
    same, theirs, expected = gradients(StageCheckpoint(), SOLVERS[name](), chosen)
    assert torch.equal(y, same) and counts.accepted == expected.accepted > 6
    for mine, other in zip(ours[:-1], theirs[:-1], strict=True):
        assert (mine - other).norm() <= 1e-13 * other.norm()


@pytest.mark.parametrize("name", ["crank_nicolson", "sdirk2"])
def test_finite_differences_agree(name):
    field, y0 = setting()
    weight, solver = field.module.linear.weight, SOLVERS[name](NewtonKrylov(rtol=1e-14))

    def solve(y, w):
        theta = tuple(w if p is weight else p for p in field.theta)
        return BatchedAdjoint().solve_through(field, y, theta, grids(), solver)

    assert torch.autograd.gradcheck(solve, (y0, weight.detach().clone().requires_grad_()), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("name", IMPLICIT)
def test_a_warm_start_gives_what_a_cold_one_gives(name):
    field, y0 = setting()
    solver, warm = SOLVERS[name](), WarmStart()
    first = BatchedAdjoint().solve_through(field, y0, field.theta, grids(), solver, warm)
    cold = field.evaluations.newton
    assert warm.trajectory.stages.shape == (len(solver.tableau.b), 6, 4, 3) and warm.ends == (2, 4, 6)
    with torch.no_grad():
        for p in field.module.parameters():
            p += 1e-2 * torch.randn_like(p)
    field.evaluations.newton = 0
    again = BatchedAdjoint().solve_through(field, y0, field.theta, grids(), solver, warm)
    assert field.evaluations.newton <= 4 < cold, "for all steps together, not for each"
    (ours,) = torch.autograd.grad(again.square().sum(), field.module.v)
    expected = BatchedAdjoint().solve_through(field, y0, field.theta, grids(), solver)
    (theirs,) = torch.autograd.grad(expected.square().sum(), field.module.v)
    assert (first - expected).abs().max() > 1e-4, "another trajectory than the one it began from"
    assert (again - expected).abs().max() < 1e-11 and (ours - theirs).abs().max() < 1e-11


@pytest.mark.parametrize("spoil", ["values", "times", "batch"])
def test_a_warm_start_that_leads_nowhere_is_solved_step_by_step(spoil):
    field, y0 = setting()
    solver, warm = SOLVERS["crank_nicolson"](), WarmStart()
    steps = grids()
    expected = BatchedAdjoint().solve_through(field, y0, field.theta, steps, solver, warm)
    if spoil == "values":
        warm.trajectory.stages[0, 3] = float("nan")
    elif spoil == "times":
        steps = [TimeGrid(2, 2 * grid.t0, 2 * grid.t1) for grid in steps]
    else:
        y0 = torch.cat([y0, y0]).detach().requires_grad_()
    expected = BatchedAdjoint().solve_through(field, y0, field.theta, steps, solver)
    found = BatchedAdjoint().solve_through(field, y0, field.theta, steps, solver, warm)
    assert torch.equal(found, expected)
    assert warm.trajectory.states.isfinite().all() and warm.trajectory.states.shape[1] == len(y0)


def test_singular_matrices():
    """With a warm start the solve is then step by step, where steps are halved; an adjoint fails."""

    class Growth(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

        def forward(self, t, y):
            return self.w * y

    field, y0 = VectorField(Growth()), torch.ones(2, 1, dtype=torch.float64)
    solver, warm = SOLVERS["backward_euler"](), WarmStart()
    BatchedAdjoint().solve_through(field, y0, field.theta, [TimeGrid(1)], solver, warm)
    guess = warm.trajectory
    with torch.no_grad():
        field.module.w.fill_(1.0)  # I − h w = 0
    y = BatchedAdjoint().solve_through(field, y0, field.theta, [TimeGrid(1)], solver, warm)
    torch.testing.assert_close(y[0], 4 * y0)
    assert len(warm.trajectory.sizes) == 2
    with pytest.raises(NewtonFailed, match="singular"):
        adjoint_at_once(field, field.theta, solver.tableau, guess, [None, y0])


def test_what_it_does_not_take():
    field, y0 = setting()
    with pytest.raises(ValueError, match="takes states"):
        BatchedAdjoint().solve(field, y0[None], field.theta, TimeGrid(2), SOLVERS["rk2"]())
    with pytest.raises(ValueError, match="constant in time"):
        per_step = tuple(torch.stack([p, p]) for p in field.theta)
        BatchedAdjoint().solve(field, y0, per_step, TimeGrid(2), SOLVERS["rk2"]())
    with pytest.raises(ValueError, match="only Runge–Kutta"):
        BatchedAdjoint().solve(field, y0, field.theta, TimeGrid(2), type("Other", (), {"name": "other"})())
