"""A compiled field gives the same gradients in every mode, and raises an error when it cannot be compiled."""

import pytest
import torch
from conftest import make_ode_block
from torch import nn

from anode_exp.gradient import GRADIENT_MODES
from anode_exp.models import OdeBlock, ode_blocks
from anode_exp.models.layers import Autonomous
from anode_exp.ode import TABLEAUX, ExplicitRungeKutta, Tolerance, VectorField


def network(mode: str, norms: str = "shared", n_steps: int = 3) -> nn.Sequential:
    """Two blocks of one class and different sizes."""
    torch.manual_seed(0)

    def block(c):
        f = Autonomous(nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c), nn.ReLU(inplace=True))
        if norms == "adaptive":
            f.time_norms([m / 4 for m in range(5)], between=True, affine_intervals=4)
            return OdeBlock(f, ExplicitRungeKutta(TABLEAUX["bosh3"]), Tolerance(1e-3, 1e-3), GRADIENT_MODES[mode]())
        if norms == "by time":
            f.time_norms([n / (2 * n_steps) for n in range(2 * n_steps)], affine_intervals=4)
        return make_ode_block(mode, "rk2", n_steps)(f)

    return nn.Sequential(block(3), nn.Conv2d(3, 5, 1), block(5)).double()


@pytest.mark.parametrize("mode", ["dto_checkpoint", "stage_checkpoint", "reverse_adjoint"])
def test_the_same_gradients_and_buffers(mode):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    eager, compiled = network(mode), network(mode)
    for block in ode_blocks(compiled):
        block.field.compile(backend="aot_eager")
    for _ in range(2):
        for n in (eager, compiled):
            n.zero_grad()
            n(images).square().sum().backward()
    for ours, theirs in zip(compiled.parameters(), eager.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() <= 1e-13 * (1 + theirs.grad.norm())
    for ours, theirs in zip(compiled.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2, "nothing was compiled"


def test_other_batches_and_evaluations_compile_nothing():
    """An epoch's smaller last batch, and evaluations, run the module uncompiled, with the same numbers."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager, compiled = network("dto_checkpoint"), network("dto_checkpoint")
    for block in ode_blocks(compiled):
        block.field.compile(backend="aot_eager", batch_size=4)

    def graphs(size, training=True):
        images = torch.randn(size, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
        outputs = []
        for n in (eager, compiled):
            n.train(training).zero_grad()
            with torch.set_grad_enabled(training):
                outputs.append(n(images))
            if training:
                outputs[-1].square().sum().backward()
        torch.testing.assert_close(*outputs, rtol=1e-13, atol=1e-13)
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    whole = graphs(4)
    assert whole > 0
    assert graphs(3) == graphs(7, training=False) == graphs(4, training=False) == graphs(4) == whole


@pytest.mark.parametrize(("norms", "mode"), [("by time", "dto_checkpoint"), ("adaptive", "step_checkpoint")])
def test_norms_by_time(norms, mode):
    """Time is an input of the compiled code: same results as without, and no more graphs for more steps."""
    graphs = {}
    for n_steps in (2, 5) if norms == "by time" else (0,):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        eager, compiled = network(mode, norms, n_steps), network(mode, norms, n_steps)
        for block in ode_blocks(compiled):
            block.field.compile(backend="aot_eager")
        for size in (4, 3, 4):
            images = torch.randn(size, 3, 8, 8, dtype=torch.float64)
            for n in (eager, compiled):
                n.zero_grad()
                n.train()(images).square().sum().backward()
            with torch.no_grad():
                torch.testing.assert_close(compiled.eval()(images), eager.eval()(images), rtol=1e-13, atol=1e-13)
        for ours, theirs in zip(compiled.parameters(), eager.parameters(), strict=True):
            assert (ours.grad - theirs.grad).norm() <= 1e-13 * (1 + theirs.grad.norm())
        for ours, theirs in zip(compiled.buffers(), eager.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
        graphs[n_steps] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert len(set(graphs.values())) == 1 and 2 <= graphs[n_steps] <= 20


def test_what_cannot_be_one_graph_is_an_error():
    class Reads(nn.Module):
        def forward(self, t, y):
            return y * float(y.sum().item() > 0) if bool(y.sum() > 0) else y

    field = VectorField(Reads())
    field.compile(backend="aot_eager")
    with pytest.raises(Exception, match=r"(?i)graph|data-dependent|unsupported"):
        field(0.0, torch.ones(3), ())
