"""Implicit methods: order, stability, and their adjoint against unrolled iterations, differences and gradcheck."""

import itertools
import math
from functools import cache

import pytest
import torch
from conftest import Field
from torch import nn

from anode_exp.gradient import GRADIENT_MODES, DtoCheckpoint, FullBackprop, Revolve, StageCheckpoint, StepCheckpoint
from anode_exp.ode import TimeGrid, Tolerance, VectorField, integrate, integrate_adaptive
from anode_exp.ode.controller import NewtonFailed
from anode_exp.ode.implicit import DiagonallyImplicitRungeKutta
from anode_exp.ode.integrate import integrate_halving
from anode_exp.ode.newton_krylov import NewtonKrylov, gmres
from anode_exp.ode.tableau import IMPLICIT_TABLEAUX

METHODS = tuple(IMPLICIT_TABLEAUX)
L_STABLE = ("backward_euler", "sdirk2", "tr_bdf2", "kvaerno3")


def method(name: str, **newton) -> DiagonallyImplicitRungeKutta:
    return DiagonallyImplicitRungeKutta(IMPLICIT_TABLEAUX[name], NewtonKrylov(**newton))


class Bernoulli(nn.Module):
    """dy/dt = −2 y² t: y = 1/(1 + t²) from 1."""

    def forward(self, t, y):
        return -2.0 * t * y * y


class Cosine(nn.Module):
    """dy/dt = λ (y − cos t) − sin t: y = cos t from 1, however stiff."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, t, y):
        return self.rate * (y - math.cos(t)) - math.sin(t)


class Linear(nn.Module):
    """dy/dt = A y, stiff: eigenvalues −1 and −1000 (1 + w)."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64))

    def forward(self, t, y):
        a, b = y.unbind(-1)
        return torch.stack([-a + self.w[1] * b, -1000.0 * (1 + self.w[0]) * b + self.w[2] * a], -1)


@pytest.mark.parametrize("name", METHODS)
def test_order(name):
    y0 = torch.ones(2, 1, dtype=torch.float64)
    errors = []
    for n in (80, 160):
        y1 = integrate(VectorField(Bernoulli()), y0, (), TimeGrid(n, 0.0, 2.0), method(name))
        errors.append(float((y1 - 0.2).abs().max()))
    slope = math.log2(errors[0] / errors[1])
    assert slope == pytest.approx(IMPLICIT_TABLEAUX[name].order, abs=0.15)


@pytest.mark.parametrize("linear", ["dense", "gmres"])
@pytest.mark.parametrize("name", L_STABLE)
def test_l_stability(name, linear):
    """A start that differs from the solution by 1: the difference is gone after the first steps of any size."""
    y0 = torch.full((3, 2), 2.0, dtype=torch.float64)
    y1 = integrate(VectorField(Cosine(-1e6)), y0, (), TimeGrid(10, 0.0, 1.0), method(name, linear=linear))
    assert (y1 - math.cos(1.0)).abs().max() < 1e-5


def gradients(mode, solver, f, y0, grid, theta=None):
    field = VectorField(f)
    y0 = y0.clone().requires_grad_()
    theta = field.theta if theta is None else tuple(p.clone().requires_grad_() for p in theta)
    y1 = mode.solve(field, y0, theta, grid, solver)
    (y1 * torch.linspace(-1, 1, y1.numel(), dtype=y1.dtype).view_as(y1)).sum().backward()
    return y1.detach(), [y0.grad, *(p.grad for p in theta)], field


def unrolled(name, f, y0, n, iterations=30):
    """The same solve with Newton's iterations written out and recorded by autograd: an independent reference."""
    table, theta = IMPLICIT_TABLEAUX[name], tuple(f.parameters())
    y, h = y0, 1.0 / n
    for step in range(n):
        slopes = []
        for c, row in zip(table.c, table.a, strict=True):
            z = y + h * sum((a * k for a, k in zip(row, slopes, strict=False)), torch.zeros_like(y))
            t, stage = step * h + c * h, z
            for _ in range(iterations if row[-1] else 0):
                function = lambda x, t=t: f(t, x)  # noqa: E731
                rows = torch.stack([torch.autograd.functional.jacobian(function, x, create_graph=True) for x in stage])
                matrix = torch.eye(y.shape[1], dtype=y.dtype) - h * row[-1] * rows
                residual = stage - z - h * row[-1] * f(t, stage)
                stage = stage - torch.linalg.solve(matrix, residual.unsqueeze(-1)).squeeze(-1)
            slopes.append(f(t, stage))
        y = y + h * sum(b * k for b, k in zip(table.b, slopes, strict=True))
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return y.detach(), [y0.grad, *(p.grad for p in theta)]


def close(ours, truth, rtol):
    for a, b in zip(ours, truth, strict=True):
        assert (a - b).norm() <= rtol * (1e-3 + b.norm())


@pytest.mark.parametrize("linear", ["dense", "gmres"])
@pytest.mark.parametrize("name", METHODS)
def test_the_adjoint_is_that_of_unrolled_iterations(name, linear):
    y0 = torch.tensor([[0.3, -0.2, 0.9], [1.0, 0.5, -0.4]], dtype=torch.float64)
    y1, ours, _ = gradients(FullBackprop(), method(name, linear=linear, rtol=1e-14), Field(), y0, TimeGrid(3))
    truth_y1, truth = unrolled(name, Field(), y0.clone().requires_grad_(), 3, 8)
    torch.testing.assert_close(y1, truth_y1, rtol=1e-12, atol=1e-12)
    close(ours, truth, 1e-10)


EXACT = {
    "dto_checkpoint": DtoCheckpoint(),
    "step keep": StepCheckpoint(),
    "step rebuild": StepCheckpoint(states="rebuild"),
    "stage keep": StageCheckpoint(),
    "stage rebuild": StageCheckpoint(states="rebuild"),
    "revolve step 2": Revolve("step", 2),
    "revolve stage 3": Revolve("stage", 3),
}


Y0 = torch.tensor([[0.3, -0.2, 0.9], [1.0, 0.5, -0.4]], dtype=torch.float64)


@cache
def full_backprop(name, grid):
    return gradients(FullBackprop(), method(name), Field(), Y0, grid)[:2]


@pytest.mark.parametrize(("name", "mode"), list(itertools.product(METHODS, EXACT)))
def test_every_exact_mode_is_full_backprop(name, mode):
    grid = TimeGrid(5)
    y1, truth = full_backprop(name, grid)
    again, ours, _ = gradients(EXACT[mode], method(name), Field(), Y0, grid)
    assert torch.equal(y1, again)
    close(ours, truth, 1e-11)


@pytest.mark.parametrize("name", METHODS)
def test_gradcheck_on_a_stiff_linear_system(name):
    f, solver = Linear(), method(name)
    field = VectorField(f)
    y0 = torch.tensor([[1.0, 0.5]], dtype=torch.float64, requires_grad=True)
    w = f.w.detach().clone().requires_grad_()
    for mode in (FullBackprop(), StageCheckpoint()):
        assert torch.autograd.gradcheck(
            lambda y, w, mode=mode: mode.solve(field, y, (w,), TimeGrid(4), solver), (y0, w), rtol=1e-6, atol=1e-8
        )


@pytest.mark.parametrize("name", METHODS)
def test_a_linear_system_in_closed_form(name):
    """One step multiplies by the method's stability function of h A, computed with matrices here."""
    table, f = IMPLICIT_TABLEAUX[name], Linear()
    identity = torch.eye(2, dtype=torch.float64)
    matrix = torch.stack([f(0.0, e) for e in identity], 1).detach()
    h, slopes = 0.25, []
    for row in table.a:
        known = identity + h * sum((a * k for a, k in zip(row, slopes, strict=False)), 0 * identity)
        slopes.append(torch.linalg.solve(identity - h * row[-1] * matrix, matrix @ known))
    step = identity + h * sum(b * k for b, k in zip(table.b, slopes, strict=True))
    y0 = torch.tensor([[1.0, 0.5], [-2.0, 0.1]], dtype=torch.float64)
    y1 = integrate(VectorField(f), y0, VectorField(f).theta, TimeGrid(4), method(name))
    torch.testing.assert_close(y1.detach(), y0 @ torch.linalg.matrix_power(step, 4).T, rtol=1e-10, atol=1e-12)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)

    def forward(self, t, y):
        return torch.tanh(self.norm(self.conv(y)))


@pytest.mark.parametrize("mode", ["full_backprop", "dto_checkpoint", "stage_checkpoint", "step_checkpoint"])
def test_running_statistics_advance_once_a_stage(mode):
    """In the evaluation at the converged state, in every mode, and not in the backward pass."""
    torch.manual_seed(0)
    f, y0 = Normed().double(), torch.randn(4, 2, 5, 5, dtype=torch.float64)
    field = VectorField(f)
    before = f.norm.running_mean.clone()
    y = GRADIENT_MODES[mode]().solve(
        field, y0.requires_grad_(), field.theta, TimeGrid(2), method("sdirk2", linear="gmres")
    )
    statistics = [x.clone() for x in f.buffers()]
    y.sum().backward()
    assert int(f.norm.num_batches_tracked) == 4 and not torch.equal(f.norm.running_mean, before)
    assert all(torch.equal(a, b) for a, b in zip(statistics, f.buffers(), strict=True))


def test_gmres_solves_and_gives_up():
    torch.manual_seed(0)
    matrix = torch.eye(30, dtype=torch.float64) + 0.3 * torch.randn(30, 30, dtype=torch.float64)
    right = torch.randn(30, dtype=torch.float64)
    x = gmres(lambda v: matrix @ v, right, 1e-12, 30)
    torch.testing.assert_close(x, torch.linalg.solve(matrix, right), rtol=1e-9, atol=1e-9)
    with pytest.raises(NewtonFailed, match="did not converge with 3 basis vectors"):
        gmres(lambda v: matrix @ v, right, 1e-12, 3)
    assert torch.equal(gmres(lambda v: matrix @ v, torch.zeros(30), 1e-12, 3), torch.zeros(30))


class Explodes(nn.Module):
    def forward(self, t, y):
        return torch.exp(50 * y)


def test_a_stage_without_solution_says_so():
    with pytest.raises(NewtonFailed, match="Newton's method at t = 1"):
        integrate(
            VectorField(Explodes()), torch.ones(1, 1, dtype=torch.float64), (), TimeGrid(1), method("backward_euler")
        )


class Pole(nn.Module):
    """dy/dt = 3 w y²: y = 1/(1/y0 − 3 w t), with a pole that prevents long steps of backward Euler."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))

    def forward(self, t, y):
        return 3.0 * self.w * y * y


def test_a_step_whose_stages_are_not_solved_is_halved():
    """Y = y + 3 h Y² has no real solution for 12 h y > 1; the gradient is that of the steps taken, in every mode."""
    y0, grid = torch.tensor([[0.2]], dtype=torch.float64), TimeGrid(2)
    y1, truth, field = gradients(FullBackprop(), method("backward_euler"), Pole(), y0, grid)
    assert field.evaluations.rejected >= 1 and y1.item() > 0.5
    for mode in EXACT.values():
        again, ours, _ = gradients(mode, method("backward_euler"), Pole(), y0, grid)
        assert torch.equal(y1, again)
        close(ours, truth, 1e-11)
    epsilon = 1e-6
    ahead, back = (
        gradients(FullBackprop(), method("backward_euler"), Pole(), y0 + d, grid)[0] for d in (epsilon, -epsilon)
    )
    assert float(truth[0]) == pytest.approx(float(-(ahead - back) / (2 * epsilon)), rel=1e-5)


class Growth(nn.Module):
    """dy/dt = w y."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))

    def forward(self, t, y):
        return self.w * y


@pytest.mark.parametrize("linear", ["dense", "gmres"])
def test_a_step_whose_matrix_is_singular_is_halved(linear):
    """I − h J = 0 in backward Euler with h = w = 1; two steps of 1/2 multiply by 4."""
    y0 = torch.tensor([[0.2], [0.3]], dtype=torch.float64)
    y1, _, field = gradients(StageCheckpoint(), method("backward_euler", linear=linear), Growth(), y0, TimeGrid(1))
    torch.testing.assert_close(y1, 4 * y0)
    assert field.evaluations.rejected == 1
    with pytest.raises(NewtonFailed, match="I − cJ of an implicit stage is singular"):
        NewtonKrylov(linear).solve_adjoint(field, field.theta, 0.0, 1.0, y0, y0)


class OnlyShortSteps(NewtonKrylov):
    def solve(self, field, theta, t, c, z, guess):
        if c > 0.2:
            raise NewtonFailed("too long")
        return super().solve(field, theta, t, c, z, guess)


def test_a_step_that_is_halved_leaves_no_trace_in_running_statistics():
    """The first stage of crank_nicolson is explicit: it has advanced them when the second one fails."""
    found = []
    for n_steps, newton in ((2, OnlyShortSteps("gmres")), (4, NewtonKrylov("gmres"))):
        torch.manual_seed(0)
        field = VectorField(Normed().double())
        y0 = torch.randn(4, 2, 5, 5, dtype=torch.float64)
        crank_nicolson = DiagonallyImplicitRungeKutta(IMPLICIT_TABLEAUX["crank_nicolson"], newton)
        y1, _ = integrate_halving(field, y0, field.theta, TimeGrid(n_steps), crank_nicolson)
        found.append([y1, *field.module.buffers()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_adaptive_steps_follow_a_stiff_solution():
    """Few steps where the explicit method needs thousands, and the error of the tolerance."""
    y0 = torch.full((2, 1), 1.5, dtype=torch.float64)
    tolerance = Tolerance(1e-6, 1e-8, 0.0, 2.0, max_evaluations=100_000, min_step=1e-14)
    y1, steps = integrate_adaptive(VectorField(Cosine(-1e6)), y0, (), tolerance, method("kvaerno3"))
    assert (y1 - math.cos(2.0)).abs().max() < 1e-5 and steps.n_steps < 200
    with pytest.raises(ValueError, match="sdirk2 has no error estimate"):
        integrate_adaptive(VectorField(Cosine(-1.0)), y0, (), tolerance, method("sdirk2"))


@pytest.mark.parametrize("mode", EXACT)
def test_adaptive_gradients_are_those_of_the_steps_taken(mode):
    tolerance = Tolerance(1e-4, 1e-4)
    y1, truth = full_backprop("kvaerno3", tolerance)
    again, ours, _ = gradients(EXACT[mode], method("kvaerno3"), Field(), Y0, tolerance)
    assert torch.equal(y1, again)
    close(ours, truth, 1e-9)
