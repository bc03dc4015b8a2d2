"""Adaptive steps: accuracy against closed forms, the count of evaluations, and errors of solves that cannot end."""

import math

import pytest
import torch
from conftest import Field, solver
from torch import nn

from anode_exp.ode import SolveFailed, State, StepController, Tolerance, VectorField, integrate, integrate_adaptive

EMBEDDED = ("heun", "bosh3", "dopri5")


class Decay(nn.Module):
    """dy/dt = −y², y = 1/(1+t)."""

    def forward(self, t, y):
        return -y * y


class Normed(nn.Module):
    """A field with running statistics that changes direction suddenly, so that steps are rejected."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3, dtype=torch.float64)
        self.rate = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, t, y):
        return self.rate * (1.0 if t < 0.6 else -1.0) * self.norm(y) - y * y * y


@pytest.mark.parametrize("name", EMBEDDED)
@pytest.mark.parametrize("backwards", [False, True])
def test_error_follows_the_tolerance(name, backwards):
    """y = 1/(1+t) from either end of [0, 3]."""
    t0, t1 = (3.0, 0.0) if backwards else (0.0, 3.0)
    y0 = torch.tensor([1 / (1 + t0)], dtype=torch.float64)
    errors, steps = [], []
    for tol in (1e-4, 1e-6, 1e-8):
        grid = Tolerance(tol, tol, t0, t1, max_evaluations=100_000)
        y1, taken = integrate_adaptive(VectorField(Decay()), y0, (), grid, solver(name))
        errors.append(float((y1 - 1 / (1 + t1)).abs()))
        steps.append(taken.n_steps)
        assert taken.times[0] == t0 and taken.times[-1] == t1
        assert errors[-1] < 20 * tol
    assert errors[0] > 10 * errors[1] > 100 * errors[2]
    assert steps[0] < steps[1] < steps[2]
    if name == "dopri5":
        assert steps[2] < 60


@pytest.mark.parametrize("name", EMBEDDED)
def test_a_fixed_solve_over_the_accepted_steps_is_the_same(name):
    field = VectorField(Field())
    y0 = torch.tensor([[0.3, -0.2, 0.9]], dtype=torch.float64)
    kept: list[State] = []
    stages: list[State] = []
    with torch.no_grad():
        y1, steps = integrate_adaptive(field, y0, field.theta, Tolerance(1e-5, 1e-5), solver(name), kept)
        integrate_adaptive(field, y0, field.theta, Tolerance(1e-5, 1e-5), solver(name), stages, keep_stages=True)
        kept_again: list[State] = []
        stages_again: list[State] = []
        again = integrate(field, y0, field.theta, steps, solver(name), kept_again)
        integrate(field, y0, field.theta, steps, solver(name), stages_again, keep_stages=True)
    assert steps.n_steps > 2 and torch.equal(y1, again)
    for ours, theirs in ((kept, kept_again), (stages, stages_again)):
        assert len(ours) == len(theirs) == steps.n_steps
        for a, b in zip(ours, theirs, strict=True):
            assert len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("name", "a_step", "reuses"), [("heun", 1, False), ("bosh3", 3, True), ("dopri5", 6, True)])
@pytest.mark.parametrize("grad", [False, True])
def test_rejected_steps_cost_evaluations_and_leave_no_trace(name, a_step, reuses, grad):
    field = VectorField(Normed())
    y0 = torch.linspace(-1, 2, 24, dtype=torch.float64).view(8, 3)
    with torch.set_grad_enabled(grad):
        y1, steps = integrate_adaptive(field, y0, field.theta, Tolerance(1e-4, 1e-4), solver(name))
    e = field.evaluations
    assert e.accepted == steps.n_steps and e.rejected > 0 and e.backward == 0
    firsts = 1 if reuses else e.accepted
    assert e.forward == firsts + 1 + a_step * (e.accepted + e.rejected), "first slopes, the probe, the stages"
    counted = firsts + a_step * e.accepted
    assert field.module.norm.num_batches_tracked == counted
    if grad:
        y1.sum().backward()
    again = VectorField(Normed())
    with torch.no_grad():
        for n in range(steps.n_steps):  # every evaluation of an accepted step once, and nothing else
            if n == 0 or not reuses:
                slope = again(steps.time(n), y0, again.theta)
            attempt = solver(name).attempt(again, again.theta, steps.time(n), steps.step_size(n), y0, slope)
            y0, slope = attempt.y, attempt.last_slope
    assert torch.equal(y0, y1)
    for key, value in again.module.state_dict().items():
        assert torch.equal(value, field.module.state_dict()[key]), key


def test_a_hopeless_solve_ends():
    class Blow(nn.Module):
        def forward(self, t, y):
            return y**3  # y = 1/√(1 − 2t): not beyond t = 1/2

    class NotFinite(nn.Module):
        def forward(self, t, y):
            return y * (math.nan if t > 0.3 else 1.0)

    y0 = torch.ones(2, dtype=torch.float64)
    with pytest.raises(SolveFailed, match=r"t = 0\.49.*needs a step of .*below min_step"):
        integrate_adaptive(VectorField(Blow()), y0, (), Tolerance(1e-6, 1e-6, max_evaluations=10**6), solver("dopri5"))
    with pytest.raises(SolveFailed, match="more than max_evaluations = 50"):
        integrate_adaptive(VectorField(Blow()), y0, (), Tolerance(1e-6, 1e-6, max_evaluations=50), solver("dopri5"))
    with pytest.raises(SolveFailed, match="below min_step"):
        integrate_adaptive(VectorField(NotFinite()), y0, (), Tolerance(1e-3, 1e-3), solver("bosh3"))


@pytest.mark.parametrize("slope", [math.inf, math.nan, 1e300])
@pytest.mark.parametrize("y0", [1.0, 0.0])
def test_a_solve_without_a_finite_start_ends_at_once(slope, y0):
    """The square of 1e300 is not finite either."""

    class Constant(nn.Module):
        def forward(self, t, y):
            return torch.full_like(y, slope)

    field = VectorField(Constant())
    with pytest.raises(SolveFailed, match="at t = 0: the state or its slope is not finite"):
        integrate_adaptive(
            field, torch.full((2,), y0, dtype=torch.float64), (), Tolerance(1e-3, 1e-3), solver("dopri5")
        )
    assert field.evaluations.total == 1


def test_a_step_that_is_not_a_number_ends_a_solve():
    with pytest.raises(SolveFailed, match="needs a step of nan, below min_step"):
        StepController(0.0, 1.0, math.nan, 2, Tolerance(1e-3, 1e-3)).judge(math.nan)


def test_what_cannot_be_adaptive():
    field, y0 = VectorField(Field()), torch.zeros(3, dtype=torch.float64)
    with pytest.raises(ValueError, match="rk4 has no error estimate"):
        integrate_adaptive(field, y0, field.theta, Tolerance(1e-3, 1e-3), solver("rk4"))
    w, v = field.theta
    with pytest.raises(ValueError, match="constant in time"):
        integrate_adaptive(field, y0, (w.expand(2, 3, 3), v), Tolerance(1e-3, 1e-3), solver("dopri5"))
    with pytest.raises(ValueError, match="rtol is 0"):
        Tolerance(0, 1e-3)
    with pytest.raises(ValueError, match=r"t0 and t1 are both 1\.0; adaptive steps need an interval"):
        Tolerance(1e-3, 1e-3, 1.0, 1.0)


def test_the_controller_in_closed_form():
    control = StepController(0.0, 1.0, 0.1, 2, Tolerance(1e-3, 1e-3))
    assert control.h == 0.1 and control.judge(0.25)
    assert control.t == 0.1
    h = 0.1 * 0.9 * 0.25 ** (-0.35)
    assert control.h == pytest.approx(h)
    assert not control.judge(4.0)
    h *= 0.9 / 2
    assert (control.t, control.h) == (0.1, pytest.approx(h))
    assert control.judge(0.01) and control.h == pytest.approx(h), "no growth after a rejection"
    assert not control.judge(math.nan) and control.h == pytest.approx(0.2 * h)
    assert control.judge(0.5)
    h = control._h = 2.0
    assert control.h == 1.0 - control.t and control.judge(0.0) and control.done and control.t == 1.0
