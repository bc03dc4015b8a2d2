"""Methods that carry more than y: exact modes against full backpropagation, and modes that must refuse them."""

import pytest
import torch
from conftest import Field
from torch import nn

from anode_exp.build import autocast_for
from anode_exp.gradient import (
    DtoCheckpoint,
    Equispaced,
    FullBackprop,
    ReverseAdjoint,
    Reversible,
    Revolve,
    StageCheckpoint,
    StepCheckpoint,
    StoredAdjoint,
)
from anode_exp.models import Autonomous
from anode_exp.ode import (
    TABLEAUX,
    AsynchronousLeapfrog,
    ReversibleRungeKutta,
    ReversibleSolver,
    TimeGrid,
    Tolerance,
    VectorField,
    integrate_adaptive,
)

MODES = {
    "full_backprop": FullBackprop(),
    "block": DtoCheckpoint(),
    "block, 2 passes": DtoCheckpoint(passes=2),
    "step, keep": StepCheckpoint(),
    "step, rebuild": StepCheckpoint(states="rebuild"),
    "step, revolve 1": Revolve(slots=1),
    "step, revolve 2": Revolve(slots=2),
    "step, equispaced 2": Equispaced(slots=2),
    "reversible": Reversible(),
}
N = 4


class AdamsBashforth:
    """A two-step method, with a zero slope before the first step: part of the state begins as a constant.

    The second part has another shape than y, and passes through a step unchanged.
    """

    name, order, static, nodes, start_nodes = "adams_bashforth", 1, True, (0.0,), ()

    def start(self, field, theta, t, y):
        return y, y.sum(), torch.zeros_like(y)

    def step(self, field, theta, t, h, state):
        y, total, before = state
        slope = field(t, y, theta)
        return y + h * (1.5 * slope - 0.5 * before + 0.1 * total), total, slope


class Count(AdamsBashforth):
    """y unchanged, with its start: J depends on y0 only through what was made from it."""

    def start(self, field, theta, t, y):
        return y, field(t, y, theta)

    def step(self, field, theta, t, h, state):
        return state[1] * (t + h), state[1]


METHODS = {
    "alf": AsynchronousLeapfrog(),
    "alf, damped": AsynchronousLeapfrog(0.8),
    "reversible rk2": ReversibleRungeKutta(),
    "reversible bosh3": ReversibleRungeKutta(TABLEAUX["bosh3"], 0.9),
    "adams_bashforth": AdamsBashforth(),
    "count": Count(),
}
PAIRS = [(m, k) for m in METHODS for k in MODES if k != "reversible" or isinstance(METHODS[m], ReversibleSolver)]


def theta_of(module, per_step):
    w, v = (p.detach().clone() for p in module.parameters())
    if per_step:
        w = torch.stack([w * s for s in (1.0, 0.5, -0.3, 0.7)])
    return w.requires_grad_(), v.requires_grad_()


@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_every_exact_mode_has_the_gradient_of_full_backpropagation(method, per_step):
    """Output to the last bit, gradients in y0 and in a non-leaf θ to rounding."""

    def solved(mode):
        module = Field()
        y0 = torch.tensor([[0.3, -0.2, 0.9], [1.0, 0.1, -0.5]], dtype=torch.float64, requires_grad=True)
        w, v = theta_of(module, per_step)
        y1 = MODES[mode].solve(VectorField(module), y0, (2 * w, v.sin()), TimeGrid(N, 0.5, 1.75), METHODS[method])
        weights = torch.linspace(-1, 1, y1.numel(), dtype=torch.float64).view_as(y1)
        return y1, torch.autograd.grad((y1 * weights).sum(), (y0, w, v))

    y1, truth = solved("full_backprop")
    assert all(g.abs().max() > 1e-3 for g in truth)
    for mode in (mode for name, mode in PAIRS if name == method):
        ours, gradients = solved(mode)
        assert torch.equal(ours, y1), mode
        for a, b in zip(gradients, truth, strict=True):
            assert (a - b).norm() <= 1e-14 * b.norm(), mode


@pytest.mark.parametrize(
    ("method", "mode"), [(m, k) for m, k in PAIRS if m == "alf" or (k == "full_backprop" and m != "count")]
)
def test_gradcheck(method, mode):
    module = Field()
    y0 = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)

    def solve(y0, w, v):
        return MODES[mode].solve(VectorField(module), y0, (w, v), TimeGrid(N), METHODS[method])

    assert torch.autograd.gradcheck(solve, (y0, *theta_of(module, True)))


@pytest.mark.parametrize("frozen", ["w", "v"])
@pytest.mark.parametrize("mode", MODES)
def test_frozen_parameters_and_an_input_without_gradient(mode, frozen):
    def gradients(mode):
        module = Field()
        getattr(module, frozen).requires_grad_(False)
        field = VectorField(module)
        y0 = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64)
        MODES[mode].solve(field, y0, field.theta, TimeGrid(N), AsynchronousLeapfrog()).sum().backward()
        return [p.grad for p in module.parameters()]

    ours, truth = gradients(mode), gradients("full_backprop")
    assert [g is None for g in ours] == [g is None for g in truth] and None in truth
    for a, b in zip(ours, truth, strict=True):
        assert b is None or (a - b).norm() <= 1e-14 * b.norm()


@pytest.mark.parametrize("mode", MODES)
def test_running_statistics_advance_in_forward_evaluations_only(mode):
    """BatchNorm in f: the start's evaluation counts once too, and every mode leaves the statistics of full_backprop."""

    def trained(mode):
        torch.manual_seed(0)
        f = Autonomous(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh()).double()
        field, y0 = VectorField(f), torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
        MODES[mode].solve(field, y0, field.theta, TimeGrid(N), AsynchronousLeapfrog()).square().sum().backward()
        return list(f.buffers()), [y0.grad, *(p.grad for p in f.parameters())], field.evaluations.forward

    ours, gradients, evaluations = trained(mode)
    truth, exact, _ = trained("full_backprop")
    assert evaluations == int(ours[-1]) == 1 + N
    assert all(torch.equal(a, b) for a, b in zip(ours, truth, strict=True))
    assert not torch.equal(ours[0], torch.zeros(3, dtype=torch.float64))
    ours, truth = (torch.cat([g.flatten() for g in found]) for found in (gradients, exact))
    assert (ours - truth).norm() <= 1e-14 * truth.norm()


@pytest.mark.parametrize(
    ("mode", "backward"),
    [
        ("full_backprop", 0),
        ("block", 1 + N),
        ("step, keep", N + 1),  # the graphs of N steps and of the start
        ("step, rebuild", 1 + (N - 1) + N + 1),
        ("step, revolve 1", 1 + (N - 1) + N + 1 + 3),  # p(4, 1) = 3
        ("step, revolve 2", 1 + (N - 1) + N + 1 + 1),  # p(4, 2) = 1
        ("reversible", N + 1),
    ],
)
def test_evaluations_of_f(mode, backward):
    field = VectorField(Field())
    y0 = torch.ones(3, dtype=torch.float64)
    MODES[mode].solve(field, y0, field.theta, TimeGrid(N), AsynchronousLeapfrog()).sum().backward()
    assert (field.evaluations.forward, field.evaluations.backward) == (1 + N, backward)


@pytest.mark.parametrize("mode", MODES)
def test_autocast_reaches_the_start_and_the_steps(mode):
    """The backward pass is outside of autocast, as in training."""
    seen = []

    class Linear(nn.Linear):
        def forward(self, x):
            out = super().forward(x)
            seen.append(out.dtype)
            return out

    def run(mode):
        torch.manual_seed(0)
        field, y0 = VectorField(Autonomous(Linear(3, 3), nn.Tanh())), torch.randn(4, 3, requires_grad=True)
        with autocast_for("bf16", torch.device("cpu"))():
            y1 = MODES[mode].solve(field, y0, field.theta, TimeGrid(N), AsynchronousLeapfrog())
        y1.sum().backward()
        return [y1.detach(), y0.grad, *(p.grad for p in field.theta)]

    truth = run("full_backprop")
    seen.clear()
    ours = run(mode)
    assert torch.equal(ours[0], truth[0]) and ours[0].dtype == torch.float32
    for a, b in zip(ours, truth, strict=True):
        assert (a - b).norm() <= 0.02 * b.norm()
    assert set(seen) == {torch.bfloat16} and len(seen) >= (1 if mode == "full_backprop" else 2) * (1 + N)


@pytest.mark.parametrize("mode", MODES)
def test_hooks_fire_once(mode):
    leaves = theta_of(Field(), False)
    theta = tuple(2 * leaf for leaf in leaves)
    y0 = torch.ones(3, dtype=torch.float64, requires_grad=True)
    fired = []
    for i, entry in enumerate((*theta, *leaves, y0)):
        entry.register_hook(lambda grad, i=i: fired.append(i))
    MODES[mode].solve(VectorField(Field()), y0, theta, TimeGrid(N), AsynchronousLeapfrog()).sum().backward()
    assert sorted(fired) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        (StageCheckpoint(), "alf has no stage states .* use the unit step or block"),
        (StageCheckpoint(states="rebuild"), "alf has no stage states .* use the unit step or block"),
        (Revolve("stage", 2), "alf has no stage states .* use the unit step or block"),
        (Equispaced("stage", 2), "alf has no stage states .* use the unit step or block"),
        (ReverseAdjoint(), "alf: the continuous adjoint .* explicit Runge–Kutta methods only"),
        (StoredAdjoint(), "alf: the continuous adjoint .* explicit Runge–Kutta methods only"),
    ],
)
def test_modes_that_need_more_of_a_method_refuse_it_before_the_first_evaluation(mode, message):
    field = VectorField(Field())
    with pytest.raises(ValueError, match=message):
        mode.solve(field, torch.ones(3, dtype=torch.float64), field.theta, TimeGrid(N), AsynchronousLeapfrog())
    assert field.evaluations.total == 0


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "reversible"])
def test_adaptive_steps_refuse_a_method_without_an_error_estimate(mode):
    field, y0, tolerance = VectorField(Field()), torch.ones(3, dtype=torch.float64), Tolerance(1e-3, 1e-3)
    with pytest.raises(ValueError, match="alf has no error estimate; adaptive steps need one"):
        MODES[mode].solve(field, y0, field.theta, tolerance, AsynchronousLeapfrog())
    with pytest.raises(ValueError, match="alf has no error estimate; adaptive steps need one"):
        integrate_adaptive(field, y0, field.theta, tolerance, AsynchronousLeapfrog())
    assert field.evaluations.total == 0
