"""Gradient mode reversible: exact to rounding in networks, flat in memory, and what it refuses."""

import pytest
import torch
from conftest import Field

from anode_exp.gradient import FullBackprop, Reversible
from anode_exp.models import MODELS, OdeBlock, TimedBatchNorm, ode_blocks, take_evaluations
from anode_exp.ode import (
    TABLEAUX,
    AsynchronousLeapfrog,
    ExplicitRungeKutta,
    ReversibleRungeKutta,
    TimeGrid,
    Tolerance,
    VectorField,
)
from anode_exp.training.peak_memory import peak_while

METHODS = {"alf": AsynchronousLeapfrog(), "alf, damped": AsynchronousLeapfrog(0.9), "rk2": ReversibleRungeKutta()}


def network(mode, method, n_steps, norm="batch", times=None):
    torch.manual_seed(0)

    def make(f):
        if times:
            f.time_norms(times, affine_intervals=2)
        return OdeBlock(f, method, TimeGrid(n_steps), mode)

    return MODELS["squeezenext"](10, make, norm=norm, field_norm=norm, width=0.5)


def gradient(net, images):
    out = net(images)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return torch.cat([p.grad.flatten() for p in net.parameters()]), [out.detach(), *net.buffers()]


@pytest.mark.parametrize(("method", "norm"), [*((m, "batch") for m in METHODS), ("alf", "group")])
def test_squeezenext_to_rounding(method, norm):
    """Gradient to 1e-12 of its norm; output and running statistics to the last bit."""
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    ours, same = gradient(network(Reversible(), METHODS[method], 4, norm).double(), images)
    truth, as_before = gradient(network(FullBackprop(), METHODS[method], 4, norm).double(), images)
    assert (ours - truth).norm() <= 1e-12 * truth.norm()
    assert all(torch.equal(a, b) for a, b in zip(same, as_before, strict=True))


def test_norms_by_time_have_statistics_wherever_f_is_evaluated():
    """Two steps: at 0 in the start, at 1/4 and 3/4 in the steps, each one evaluation."""
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    times = [0.0, 0.25, 0.75]
    found = [network(mode, AsynchronousLeapfrog(), 2, times=times).double() for mode in (Reversible(), FullBackprop())]
    (ours, same), (truth, as_before) = (gradient(net, images) for net in found)
    assert (ours - truth).norm() <= 1e-12 * truth.norm()
    assert all(torch.equal(a, b) for a, b in zip(same, as_before, strict=True))
    first = next(m for m in next(ode_blocks(found[0])).f if isinstance(m, TimedBatchNorm))
    assert first.running_mean.abs().amin(1).gt(0).all(), "each set advanced"


def test_a_gradient_taken_twice():
    """A retained graph keeps the last state."""
    y0 = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    y1 = Reversible().solve(VectorField(Field()), y0, tuple(Field().parameters()), TimeGrid(3), AsynchronousLeapfrog())
    first, second = (torch.autograd.grad(y1.sum(), y0, retain_graph=keep)[0] for keep in (True, False))
    assert torch.equal(first, second) and first.any()


@pytest.mark.parametrize("method", ["alf", "rk2"])
def test_memory_is_flat_in_the_number_of_steps(method):
    images = torch.randn(4, 3, 32, 32)

    def peak(mode, n_steps):
        net = network(mode, METHODS[method], n_steps)
        own = [*net.parameters(), *net.buffers(), images]

        def step():
            net.zero_grad()
            net(images).sum().backward()

        return peak_while(step, own.copy, None)

    few, many = peak(Reversible(), 2), peak(Reversible(), 8)
    assert many == pytest.approx(few, rel=0.01)
    assert many < 0.6 * peak(FullBackprop(), 2)


def test_evaluations():
    block = OdeBlock(Field(), ReversibleRungeKutta(TABLEAUX["bosh3"]), TimeGrid(5), Reversible())
    block(torch.ones(3, dtype=torch.float64)).sum().backward()
    (counted,) = take_evaluations(block)
    assert (counted.forward, counted.backward) == (2 * 3 * 5, 2 * 3 * 5)


@pytest.mark.parametrize(
    ("grid", "solver", "message"),
    [
        (TimeGrid(2), ExplicitRungeKutta(TABLEAUX["rk2"]), "rk2 has no inverse step; .* alf or reversible_rk"),
        (Tolerance(1e-3, 1e-3), AsynchronousLeapfrog(), "gradient mode reversible needs fixed steps"),
    ],
)
def test_what_it_refuses_before_the_first_evaluation(grid, solver, message):
    field = VectorField(Field())
    with pytest.raises(ValueError, match=message):
        Reversible().solve(field, torch.ones(3, dtype=torch.float64), field.theta, grid, solver)
    assert field.evaluations.total == 0
