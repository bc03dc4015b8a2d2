"""Flows against closed forms, autograd's Jacobian, and each other."""

import math

import pytest
import torch
from conftest import solver

from anode_exp.gradient import GRADIENT_MODES
from anode_exp.models import OdeBlock
from anode_exp.models.normalizing_flow import FlowField, NormalizingFlow, Velocity
from anode_exp.ode import TimeGrid, Tolerance, VectorField

EXACT = [mode for mode in GRADIENT_MODES if mode not in ("reverse_adjoint", "stored_adjoint", "batched_adjoint")]


def flow(mode="full_backprop", size=2, hidden=(6, 5), n_steps=3, blocks=1, activation="softplus", grid=None,
         steps_of=None, tableau="rk4"):  # fmt: skip
    """A flow whose steps are those that a gradient mode needs: ``mode``, or ``steps_of`` to compare with it."""
    torch.manual_seed(0)
    fields = [FlowField(size, hidden, activation).double() for _ in range(blocks)]
    grid = grid or TimeGrid(n_steps)
    method = solver(tableau, steps_of or mode)
    return NormalizingFlow([OdeBlock(f, method, grid, GRADIENT_MODES[mode]()) for f in fields])


def samples(n=7, size=2, seed=1):
    return torch.randn(n, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("hidden", [(), (5,), (6, 5), (4, 6, 5)])
@pytest.mark.parametrize("activation", ["softplus", "gelu"])
def test_the_trace_and_its_estimate_are_of_autograds_jacobian(hidden, activation):
    torch.manual_seed(0)
    velocity, z, e, t = Velocity(3, hidden, activation).double(), 2 * samples(4, 3), samples(4, 3, 2), 0.3
    jacobian = torch.stack([torch.autograd.functional.jacobian(lambda x: velocity(t, x[None])[0], row) for row in z])
    v, trace = velocity.with_trace(t, z)
    torch.testing.assert_close(trace[:, 0], jacobian.diagonal(dim1=1, dim2=2).sum(1), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(v, velocity(t, z), rtol=1e-14, atol=1e-14)
    _, tangent = velocity.with_tangents(t, z, e)
    torch.testing.assert_close(tangent, torch.einsum("bij,bj->bi", jacobian, e), rtol=1e-13, atol=1e-13)
    times = torch.full((4, 1), t, dtype=torch.float64)  # a time for each row
    for ours, theirs in zip(velocity.with_trace(times, z), (v, trace), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


def test_a_layer_by_hand():
    torch.manual_seed(0)
    velocity, z = Velocity(2, ()).double(), samples()
    (layer,) = velocity.layers
    gate = torch.sigmoid(layer.gate(torch.tensor([[0.7]], dtype=torch.float64)))
    shift = layer.shift(torch.tensor([[0.7]], dtype=torch.float64))
    torch.testing.assert_close(velocity(0.7, z), layer.linear(z) * gate + shift, rtol=1e-14, atol=1e-14)


def test_an_affine_flow_has_a_gaussian_density_and_samples_it():
    """dz/dt = A z + c is z(1) = exp(A) x + m: x is normal with mean −exp(−A) m and covariance exp(−A) exp(−A)ᵀ."""
    network = flow(hidden=(), n_steps=30)
    (layer,) = network.blocks[0].f.velocity.layers
    with torch.no_grad():
        layer.gate.weight.zero_()
        layer.shift.weight.zero_()
    a = (torch.sigmoid(layer.gate.bias)[:, None] * layer.linear.weight).detach()
    c = (torch.sigmoid(layer.gate.bias) * layer.linear.bias).detach()
    end = torch.linalg.matrix_exp(a)
    inverse = torch.linalg.inv(end)
    m = torch.linalg.solve(a, (end - torch.eye(2, dtype=a.dtype)) @ c)
    truth = torch.distributions.MultivariateNormal(-inverse @ m, inverse @ inverse.T)
    x = samples()
    torch.testing.assert_close(network(x), truth.log_prob(x), rtol=1e-7, atol=0)
    torch.testing.assert_close(network.log_prob(x), truth.log_prob(x), rtol=1e-4, atol=0)
    torch.testing.assert_close(network.sample(x), (x - m) @ inverse.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size, hidden, blocks", [(2, (6, 5), 1), (3, (8,), 2)])
def test_the_log_density_is_that_of_the_change_of_variables(size, hidden, blocks):
    network, x = flow(size=size, hidden=hidden, blocks=blocks), samples(3, size)
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(2.0)
    tight = Tolerance(1e-9, 1e-9, max_evaluations=5000)
    z = network.normals(x, tight)
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1)
    step, columns = 1e-4, []
    for i in range(size):
        by = step * torch.eye(size, dtype=torch.float64)[i]
        columns.append((network.normals(x + by, tight) - network.normals(x - by, tight)) / (2 * step))
    truth = normal + torch.linalg.slogdet(torch.stack(columns, 2)).logabsdet
    torch.testing.assert_close(network.log_prob(x, tight), truth, rtol=1e-6, atol=1e-6)


def test_hutchinsons_estimate_is_right_on_average():
    """For a flow affine in z the estimate is linear in eeᵀ, so it is exact on average over all four signs of ±1."""
    network, x = flow(hidden=(), n_steps=4), samples(1)
    signs = torch.tensor([[a, b] for a in (-1.0, 1.0) for b in (-1.0, 1.0)], dtype=torch.float64)
    estimates = network(x.expand(4, -1), signs)
    assert estimates.std() > 1e-3
    torch.testing.assert_close(estimates.mean(0, keepdim=True), network(x), rtol=1e-12, atol=0)


def gradients(mode, noisy, solves=1, **settings):
    network = flow(mode, **settings)
    losses = []
    for i in range(solves):  # the noise of each solve is its own
        noise = samples(seed=10 + i) if noisy else None
        losses.append(network(samples(seed=i), noise).mean())
    sum(losses).backward()
    return torch.cat([p.grad.flatten() for p in network.parameters()])


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("mode", EXACT)
def test_exact_modes_agree_with_two_solves_before_one_backward_pass(mode, noisy):
    truth, found = (gradients(m, noisy, solves=2, steps_of=mode) for m in ("full_backprop", mode))
    assert (found - truth).norm() <= 1e-14 * truth.norm()


def test_exact_modes_agree_on_adaptive_steps_and_the_reverse_time_adjoint_does_not():
    grid = Tolerance(1e-3, 1e-3)
    for steps in ({"grid": TimeGrid(3)}, {"grid": grid, "tableau": "dopri5"}):
        wrong, right = (gradients(m, True, **steps) for m in ("reverse_adjoint", "full_backprop"))
        assert 1e-12 < (wrong - right).norm() / right.norm() < 0.1
    network = flow("stage_checkpoint", grid=grid, tableau="dopri5")
    network(samples(), samples(seed=3)).sum().backward()
    found = torch.cat([p.grad.flatten() for p in network.parameters()])
    network.zero_grad()
    network.blocks[0].gradient = GRADIENT_MODES["full_backprop"]()
    network(samples(), samples(seed=3)).sum().backward()
    truth = torch.cat([p.grad.flatten() for p in network.parameters()])
    assert (found - truth).norm() <= 1e-13 * truth.norm()


@pytest.mark.parametrize("noisy", [False, True])
def test_gradcheck(noisy):
    network, noise = flow("stage_checkpoint", hidden=(3, 3), n_steps=1), samples(2) if noisy else None
    assert torch.autograd.gradcheck(lambda x: network(x, noise), samples(2).requires_grad_())
    names = [name for name, _ in network.named_parameters()]

    def of(*parameters):
        return torch.func.functional_call(network, dict(zip(names, parameters, strict=True)), (samples(2), noise))

    if not noisy:
        network.blocks[0].gradient = GRADIENT_MODES["full_backprop"]()
        values = tuple(p.detach().clone().requires_grad_() for p in network.parameters())
        assert torch.autograd.gradcheck(of, values)


def test_samples_go_back_to_where_they_came_from_and_densities_integrate_to_one():
    network = flow()
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(2.0)
    network.float()
    normals = samples(500).float()
    assert (network.normals(network.sample(normals)) - normals).abs().max() < 1e-4
    axis = torch.linspace(-12, 12, 161)
    grid = torch.cartesian_prod(axis, axis)
    integral = network.log_prob(grid).double().exp().sum() * (axis[1] - axis[0]) ** 2
    assert math.isclose(integral, 1.0, abs_tol=1e-3)


def test_evaluations_are_counted_and_compiled_fields_agree():
    network, x, noise = flow("stage_checkpoint"), samples(), samples(seed=5)
    plain = network(x, noise)
    network.log_prob(x)
    assert network.blocks[0].field.evaluations.forward == 12
    network.blocks[0].field.compile(backend="aot_eager", batch_size=len(x))
    torch.testing.assert_close(network(x, noise), plain, rtol=1e-13, atol=0)
    network(x, noise).sum().backward()
    found = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    other = flow("full_backprop")
    other(x, noise).sum().backward()
    for ours, theirs in zip(found, other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.grad, rtol=1e-11, atol=1e-13)


def test_an_activation_with_a_kink_is_refused():
    with pytest.raises(ValueError, match=r"activation=relu.*choose one of softplus, gelu"):
        Velocity(2, (3,), "relu")


def test_the_field_is_a_vector_field_of_one_state():
    f = FlowField(2, (3, 3)).double()
    field = VectorField(f)
    assert field(0.5, torch.zeros(4, 3, dtype=torch.float64), field.theta).shape == (4, 3)
    assert field(0.5, torch.zeros(4, 5, dtype=torch.float64), field.theta).shape == (4, 5)
