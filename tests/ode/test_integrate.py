import pytest
import torch
from conftest import Field, solver
from torch import nn

from anode_exp.ode import TABLEAUX, TimeGrid, VectorField, integrate


def test_a_grid_needs_a_step():
    with pytest.raises(ValueError, match="n_steps is 0"):
        TimeGrid(0)


def test_linear_problem_in_closed_form():
    """dy/dt = λ y: n Euler steps multiply by (1 + λ/n)^n, n midpoint steps by (1 + λ/n + (λ/n)²/2)^n."""

    class Linear(nn.Module):
        def forward(self, t, y):
            return -1.5 * y

    y0, n, z = torch.tensor([2.0], dtype=torch.float64), 5, -1.5 / 5
    for name, factor in (("euler", 1 + z), ("rk2", 1 + z + z * z / 2), ("heun", 1 + z + z * z / 2)):
        y1 = integrate(VectorField(Linear()), y0, (), TimeGrid(n), solver(name))
        torch.testing.assert_close(y1, y0 * factor**n, rtol=1e-14, atol=0)


def test_backwards_and_forwards_meet_at_fine_steps(field_module):
    field = VectorField(field_module)
    y0 = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64)
    with torch.no_grad():
        y1 = integrate(field, y0, field.theta, TimeGrid(50), solver("dopri5"))
        back = integrate(field, y1, field.theta, TimeGrid(50, 1.0, 0.0), solver("dopri5"))
    torch.testing.assert_close(back, y0, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", TABLEAUX)
def test_theta_may_change_from_step_to_step(field_module, name):
    """A leading axis of n_steps is the same as single steps, each with its own θ."""
    field, n = VectorField(field_module), 3
    w = torch.stack([field_module.w.detach() * (1 + i) for i in range(n)])
    y = y0 = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64)
    for i in range(n):
        (y,) = solver(name).step(field, (w[i], field_module.v), i / n, 1 / n, (y,))
    y1 = integrate(field, y0, (w, field_module.v), TimeGrid(n), solver(name))
    torch.testing.assert_close(y1, y, rtol=1e-13, atol=0)


def test_theta_of_a_wrong_shape_is_refused(field_module):
    field = VectorField(field_module)
    with pytest.raises(ValueError, match=r"theta for w has shape \(2, 3, 3\); allowed are \(3, 3\).*\(4, 3, 3\)"):
        integrate(field, torch.zeros(3), (torch.zeros(2, 3, 3), field_module.v), TimeGrid(4), solver("euler"))


def test_a_field_that_changes_the_shape_is_refused():
    class Wrong(nn.Module):
        def forward(self, t, y):
            return y[:1]

    with pytest.raises(ValueError, match=r"\(3,\) to \(1,\)"):
        VectorField(Wrong())(0.0, torch.zeros(3), ())


def test_theta_replaces_the_parameters_and_leaves_them_alone():
    module = Field()
    field = VectorField(module)
    y = torch.ones(3, dtype=torch.float64)
    before = module.w.detach().clone()
    other = field(1.0, y, (torch.zeros(3, 3, dtype=torch.float64), module.v))
    torch.testing.assert_close(other, torch.tanh(module.v) + 0.5 * y)
    torch.testing.assert_close(field(1.0, y, field.theta), module(1.0, y))
    assert torch.equal(module.w, before)


def test_re_evaluation_counts_apart_and_leaves_running_statistics_alone():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(2)

        def forward(self, t, y):
            return self.norm(y)

    field = VectorField(Normed())
    y = torch.randn(4, 2, 3, 3)
    first = field(0.0, y, field.theta)
    before = {k: v.clone() for k, v in field.module.state_dict().items()}
    assert before["norm.num_batches_tracked"] == 1
    with field.re_evaluation():
        again = field(0.0, y, field.theta)
        bad = field(0.0, y * torch.inf, field.theta)
    assert torch.equal(first, again)
    assert not bad.isfinite().all()
    for key, value in field.module.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert (field.evaluations.forward, field.evaluations.backward) == (1, 2)
    field(0.0, y, field.theta)
    assert field.module.norm.num_batches_tracked == 2


def test_dropout_cannot_be_evaluated_again():
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, t, y):
            return self.drop(y)

    field = VectorField(Dropping())
    with pytest.raises(ValueError, match="dropout"), field.re_evaluation():
        pass
    field.module.eval()
    with field.re_evaluation():
        field(0.0, torch.ones(2), ())
