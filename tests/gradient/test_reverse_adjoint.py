"""The reverse-time adjoint against torchdiffeq, an augmented ODE written out independently, and closed forms."""

import pytest
import torch
from conftest import IMAGE_MODELS, Field, make_ode_block, solver
from torch import nn
from torchdiffeq import odeint_adjoint

from anode_exp.gradient import FullBackprop, ReverseAdjoint
from anode_exp.models import MODELS
from anode_exp.ode import TABLEAUX, TimeGrid, VectorField

Y0 = torch.tensor([[0.3, -0.2, 0.9], [1.0, 0.1, -0.5]], dtype=torch.float64)


def our_gradient(mode, tableau: str, n_steps: int) -> list[torch.Tensor]:
    module = Field()
    field = VectorField(module)
    y0 = Y0.clone().requires_grad_()
    y1 = mode.solve(field, y0, field.theta, TimeGrid(n_steps), solver(tableau))
    (y1 * torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)).sum().backward()
    return [y1.detach(), y0.grad, module.w.grad, module.v.grad]


@pytest.mark.parametrize(("tableau", "theirs"), [("euler", "euler"), ("rk2", "midpoint"), ("heun", "heun2")])
@pytest.mark.parametrize("n_steps", [1, 3, 8])
def test_equals_torchdiffeq_on_the_same_grid(tableau, theirs, n_steps):
    module = Field()
    y0 = Y0.clone().requires_grad_()
    options = {"step_size": 1 / n_steps}
    y1 = odeint_adjoint(
        module,
        y0,
        torch.tensor([0.0, 1.0], dtype=torch.float64),
        method=theirs,
        options=options,
        adjoint_options=options,
    )[-1]
    (y1 * torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)).sum().backward()
    truth = [y1.detach(), y0.grad, module.w.grad, module.v.grad]
    for ours, theirs_ in zip(our_gradient(ReverseAdjoint(), tableau, n_steps), truth, strict=True):
        torch.testing.assert_close(ours, theirs_, rtol=1e-11, atol=1e-13)


def augmented_solve(tableau: str, n_steps: int) -> list[torch.Tensor]:
    """The augmented system as one flat vector, stepped with every stage of the tableau, unused ones included."""
    table = TABLEAUX[tableau]
    module = Field()
    w0, v0 = (p.detach() for p in module.parameters())
    shapes = [Y0.shape, Y0.shape, w0.shape, v0.shape]
    sizes = [s.numel() for s in shapes]

    def f(t, y, w, v):
        return torch.func.functional_call(module, {"w": w, "v": v}, (t, y))

    def rk(rhs, t, h, x):
        k = []
        for c, row in zip(table.c, table.a, strict=True):
            k.append(rhs(t + c * h, x + h * sum((a * k_j for a, k_j in zip(row, k, strict=True)), torch.zeros_like(x))))
        return x + h * sum(b * k_i for b, k_i in zip(table.b, k, strict=True))

    def augmented(t, x):
        y, a, _, _ = (part.view(s) for part, s in zip(x.split(sizes), shapes, strict=True))
        dy, pullback = torch.func.vjp(lambda y, w, v: f(t, y, w, v), y, w0, v0)
        return torch.cat([dy.flatten(), *(-g.flatten() for g in pullback(a))])

    y, h = Y0.clone(), 1 / n_steps
    for n in range(n_steps):
        y = rk(lambda t, x: f(t, x, w0, v0), n * h, h, y)
    y1 = y
    a = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64).expand_as(y)
    x = torch.cat([y.flatten(), a.flatten(), torch.zeros(sizes[2] + sizes[3], dtype=torch.float64)])
    for n in reversed(range(n_steps)):
        x = rk(augmented, (n + 1) * h, -h, x)
    _, grad_y, grad_w, grad_v = (part.view(s) for part, s in zip(x.split(sizes), shapes, strict=True))
    return [y1, grad_y, grad_w, grad_v]


@pytest.mark.parametrize("tableau", TABLEAUX)
@pytest.mark.parametrize("n_steps", [1, 3])
def test_equals_the_augmented_system_written_out(tableau, n_steps):
    with torch.no_grad():
        truth = augmented_solve(tableau, n_steps)
    for ours, theirs in zip(our_gradient(ReverseAdjoint(), tableau, n_steps), truth, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("tableau", TABLEAUX)
def test_converges_to_the_exact_gradient_with_the_methods_order(tableau):
    def error(n_steps):
        exact = our_gradient(FullBackprop(), tableau, n_steps)
        ours = our_gradient(ReverseAdjoint(), tableau, n_steps)
        return max(float((x - y).norm()) for x, y in zip(ours, exact, strict=True))

    coarse, fine = error(8), error(16)
    assert coarse > 1e-9, "the two gradients are the same: nothing was reversed"
    assert coarse / fine > 0.7 * 2 ** TABLEAUX[tableau].order


def test_one_euler_step_in_closed_form():
    """ANODE Eq. 10 at the reversed trajectory's start: α0 = α1 (1 + ∂f/∂y(y1)), where the exact one has y0 (Eq. 9)."""

    class Square(nn.Module):
        def forward(self, t, y):
            return y * y

    for mode, at in ((ReverseAdjoint(), "y1"), (FullBackprop(), "y0")):
        y0 = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
        y1 = mode.solve(VectorField(Square()), y0, (), TimeGrid(1), solver("euler"))
        (3 * y1).backward()
        where = (y1 if at == "y1" else y0).detach()
        torch.testing.assert_close(y0.grad, 3 * (1 + 2 * where))


def test_theta_of_the_step_that_is_reversed():
    """Euler, f = θ_n y: reversing step n uses θ_n, and its gradient lands in the n-th row."""

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.s = nn.Parameter(torch.ones(1, dtype=torch.float64))

        def forward(self, t, y):
            return self.s * y

    rates = torch.tensor([[0.5], [-1.0], [2.0]], dtype=torch.float64, requires_grad=True)
    y0 = torch.tensor([1.5], dtype=torch.float64, requires_grad=True)
    y = ReverseAdjoint().solve(VectorField(Scale()), y0, (rates,), TimeGrid(3), solver("euler"))
    y.sum().backward()
    h, a, state, expected = 1 / 3, 1.0, y.item(), []
    for rate in reversed(rates.detach().flatten().tolist()):
        expected.insert(0, h * a * state)  # ∂f/∂θ at the start of the reversed step
        state, a = state - h * rate * state, a + h * rate * a
    assert rates.grad.flatten().tolist() == pytest.approx(expected, rel=1e-14)
    assert y0.grad.item() == pytest.approx(a, rel=1e-14)


# bf16 is emulated on many CPUs, and slow: for one network; resnet18 is as resnet10
@pytest.mark.parametrize(
    ("model", "precision"), [*((m, "fp32") for m in IMAGE_MODELS if m != "resnet18"), ("resnet4", "bf16")]
)
def test_leaves_the_buffers_that_full_backpropagation_leaves(model, precision):
    def buffers(mode):
        torch.manual_seed(0)
        network = MODELS[model](10, make_ode_block(mode, "rk2", 2))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            out = network(torch.randn(2, 3, 32, 32))
        out.float().square().sum().backward()
        assert all(p.grad is not None and p.grad.shape == p.shape for p in network.parameters())
        return dict(network.named_buffers())

    ours, theirs = buffers("reverse_adjoint"), buffers("full_backprop")
    assert ours.keys() == theirs.keys() and len(ours) > 0
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
