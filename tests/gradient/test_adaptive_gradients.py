"""Gradients through adaptive solves: exact modes over the accepted steps, the reverse-time adjoint by torchdiffeq."""

from functools import cache

import pytest
import torch
from conftest import Field, make_ode_block, solver
from torchdiffeq import odeint_adjoint

from anode_exp.gradient import (
    DiscreteAdjoint,
    DtoCheckpoint,
    Equispaced,
    FullBackprop,
    ReverseAdjoint,
    Revolve,
    StageCheckpoint,
    StepCheckpoint,
    StoredAdjoint,
)
from anode_exp.models import MODELS, OdeBlock, ode_blocks
from anode_exp.ode import TimeGrid, Tolerance, VectorField, integrate, integrate_adaptive

Y0 = torch.tensor([[0.3, -0.2, 0.9], [1.0, 0.1, -0.5]], dtype=torch.float64)
WEIGHTS = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
EXACT: dict[str, FullBackprop | DiscreteAdjoint] = {
    "block": DtoCheckpoint(),
    "step, keep": StepCheckpoint(),
    "step, rebuild": StepCheckpoint(states="rebuild"),
    "stage, keep": StageCheckpoint(),
    "stage, rebuild": StageCheckpoint(states="rebuild"),
    "stage, revolve 2": Revolve(unit="stage", slots=2),
    "step, equispaced 3": Equispaced(slots=3),
}


def gradient(mode, grid, name="dopri5"):
    module = Field()
    field = VectorField(module)
    y0 = Y0.clone().requires_grad_()
    y1 = mode.solve(field, y0, field.theta, grid, solver(name))
    (y1 * WEIGHTS).sum().backward()
    return [y1.detach(), y0.grad, module.w.grad, module.v.grad], field.evaluations


@pytest.mark.parametrize("name", ["heun", "bosh3", "dopri5"])
def test_exact_modes_differentiate_the_accepted_steps(name):
    field = VectorField(Field())
    with torch.no_grad():
        _, steps = integrate_adaptive(field, Y0, field.theta, Tolerance(1e-4, 1e-4), solver(name))
    y0 = Y0.clone().requires_grad_()
    y1 = integrate(field, y0, field.theta, steps, solver(name))
    (y1 * WEIGHTS).sum().backward()
    truth = [y1.detach(), y0.grad, field.module.w.grad, field.module.v.grad]
    assert steps.n_steps > 2
    for label, mode in {"full": FullBackprop(), **EXACT}.items():
        found, _ = gradient(mode, Tolerance(1e-4, 1e-4), name)
        for ours, theirs in zip(found, truth, strict=True):
            assert (ours - theirs).norm() <= 1e-14 * theirs.norm(), label


@pytest.mark.parametrize("tolerance", [1e-6, 1e-9])
def test_reverse_adjoint_agrees_with_torchdiffeq(tolerance):
    """To the tolerance of both: the two choose their steps with different controllers."""
    module, calls = Field(), 0

    def count(*_):
        nonlocal calls
        calls += 1

    module.register_forward_hook(count)
    y0 = Y0.clone().requires_grad_()
    times = torch.tensor([0.0, 1.0], dtype=torch.float64)
    y1 = odeint_adjoint(module, y0, times, method="dopri5", rtol=tolerance, atol=tolerance)[-1]
    forward = calls
    (y1 * WEIGHTS).sum().backward()
    truth = [y1.detach(), y0.grad, module.w.grad, module.v.grad]
    found, evaluations = gradient(ReverseAdjoint(), Tolerance(tolerance, tolerance))
    for ours, theirs in zip(found, truth, strict=True):
        assert (ours - theirs).abs().max() < 30 * tolerance
    assert 0.5 < evaluations.forward / forward < 2
    assert 0.5 < evaluations.backward / (calls - forward) < 2
    assert evaluations.backward_accepted > 2
    exact, _ = gradient(FullBackprop(), Tolerance(tolerance, tolerance))
    assert all((x - y).abs().max() < 30 * tolerance for x, y in zip(found, exact, strict=True))


def test_a_loose_reverse_adjoint_is_not_the_gradient():
    loose, _ = gradient(ReverseAdjoint(), Tolerance(0.1, 0.1))
    exact, _ = gradient(FullBackprop(), Tolerance(0.1, 0.1))
    assert torch.equal(loose[0], exact[0])
    assert max(float((x - y).norm() / y.norm()) for x, y in zip(loose[1:], exact[1:], strict=True)) > 1e-4


class Jump(torch.nn.Module):
    """A field that changes direction suddenly, so that steps are rejected."""

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, t, y):
        return self.f(t, y) * (1.0 if t < 0.6 else -4.0)


@cache
def differentiated(mode):
    """A network after one backward pass through solves with rejected steps."""
    torch.manual_seed(0)
    network = MODELS["resnet4"](10, make_ode_block(mode, "bosh3"))
    for block in ode_blocks(network):
        block.grid = Tolerance(1e-2, 1e-2)
        block.f = Jump(block.f)
        block.field = VectorField(block.f)
    torch.manual_seed(1)
    network.double()(torch.randn(2, 3, 32, 32, dtype=torch.float64)).square().sum().backward()
    return network


FULL = FullBackprop()


@pytest.mark.parametrize("mode", [StageCheckpoint(), ReverseAdjoint(), StoredAdjoint()])
def test_networks_train_and_leave_the_same_buffers(mode):
    ours, truth = differentiated(mode), differentiated(FULL)
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), truth.buffers(), strict=True))
    rejected = sum(b.field.evaluations.rejected for b in ode_blocks(ours))
    assert rejected > 0, "nothing was rejected: the test says nothing of rejections"
    g, g_true = (torch.cat([p.grad.flatten() for p in n.parameters()]) for n in (ours, truth))
    error = float((g - g_true).norm() / g_true.norm())
    assert error <= 1e-13 if isinstance(mode, StageCheckpoint) else 1e-6 < error < 1


class Square(torch.nn.Module):
    def forward(self, t, y):
        return y * y


def test_stored_adjoint_of_one_euler_step_in_closed_form():
    """ANODE Eq. 10: α0 = α1 (1 + ∂f/∂y(y1))."""
    y0 = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    y1 = StoredAdjoint().solve(VectorField(Square()), y0, (), TimeGrid(1), solver("euler"))
    (3 * y1).backward()
    torch.testing.assert_close(y0.grad, 3 * (1 + 2 * y1.detach()))


def test_stored_adjoint_of_one_midpoint_step_in_closed_form():
    """y' = y², one midpoint step: the inner state is the cubic through both ends with the field's slopes there."""
    y0 = torch.tensor([0.4], dtype=torch.float64, requires_grad=True)
    y1 = StoredAdjoint().solve(VectorField(Square()), y0, (), TimeGrid(1), solver("rk2"))
    (3 * y1).backward()
    a, b = y0.item(), y1.item()
    middle = (a + b) / 2 + (a * a - b * b) / 8
    half = 3 + 0.5 * 2 * b * 3
    assert y0.grad.item() == pytest.approx(3 + 2 * middle * half, rel=1e-14)


@pytest.mark.parametrize("name", ["euler", "rk2", "heun", "bosh3", "rk4"])
def test_stored_adjoint_converges_with_the_methods_order(name):
    def error(n_steps):
        exact, _ = gradient(FullBackprop(), TimeGrid(n_steps), name)
        ours, _ = gradient(StoredAdjoint(), TimeGrid(n_steps), name)
        assert torch.equal(exact[0], ours[0])
        return max(float((x - y).norm()) for x, y in zip(ours[1:], exact[1:], strict=True))

    order = solver(name).tableau.order
    coarse, fine = error(16), error(32)
    assert coarse > 1e-8, "exact: nothing is inconsistent"
    assert 0.7 * 2**order < coarse / fine < 3 * 2**order


def test_stored_adjoint_counts_its_evaluations():
    for name, extra in (("euler", 0), ("heun", 0), ("rk2", 1), ("rk4", 1)):
        _, evaluations = gradient(StoredAdjoint(), TimeGrid(5), name)
        assert evaluations.backward == 5 * (solver(name).tableau.stages + extra), name


def test_an_ode_block_takes_a_tolerance():
    block = OdeBlock(Field(), solver("dopri5"), Tolerance(1e-3, 1e-3), DtoCheckpoint())
    block(Y0).sum().backward()
    assert block.field.evaluations.accepted > 0 and "rtol=0.001" in repr(block)


def test_batch_norm_by_time_under_adaptive_steps():
    """Statistics, weight and bias interpolated at times that the solve finds: exact, the same buffers in every mode."""

    def result(mode):
        torch.manual_seed(0)

        def make(f):
            f.time_norms([m / 10 for m in range(11)], between=True, affine_intervals=4)
            return OdeBlock(f, solver("bosh3"), Tolerance(1e-2, 1e-2), mode)

        network = MODELS["resnet4"](10, make).double()
        for name, p in network.named_parameters():
            if name.endswith("_offset"):
                torch.nn.init.normal_(p, std=0.5)
        network(torch.randn(2, 3, 32, 32, dtype=torch.float64)).square().sum().backward()
        return torch.cat([p.grad.flatten() for p in network.parameters()]), list(network.buffers())

    truth, buffers = result(FullBackprop())
    for label, mode in EXACT.items():
        found, theirs = result(mode)
        assert (found - truth).norm() <= 1e-13 * truth.norm(), label
        assert all(torch.equal(a, b) for a, b in zip(buffers, theirs, strict=True)), label
    other, theirs = result(ReverseAdjoint())
    assert (other - truth).norm() > 1e-6 * truth.norm()
    assert all(torch.equal(a, b) for a, b in zip(buffers, theirs, strict=True)), "the backward solve leaves no trace"
