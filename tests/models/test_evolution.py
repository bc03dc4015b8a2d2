"""Weights that evolve in time: their flow against independent solutions, and exact gradients into w0 and p."""

import itertools

import pytest
import torch
from conftest import IMAGE_MODELS, make_ode_block
from torch import nn

from anode_exp.build import build_model, build_optimizer
from anode_exp.config.compose import composed
from anode_exp.errors import UserError
from anode_exp.gradient import GRADIENT_MODES, DtoCheckpoint, FullBackprop, Revolve, StageCheckpoint, StepCheckpoint
from anode_exp.models import (
    COUPLINGS,
    EVOLUTION_ACTIVATIONS,
    MODELS,
    SHARINGS,
    Evolution,
    OdeBlock,
    ReactionDiffusionAdvection,
    count_parameters,
    ode_blocks,
)
from anode_exp.ode import TABLEAUX, ExplicitRungeKutta, TimeGrid, Tolerance
from anode_exp.training.step import set_learning_rate

SHAPES = [(4, 3, 3, 3), (4, 3, 5, 5), (4, 3, 1, 3), (4, 3, 3, 1), (4, 3, 1, 1), (2, 2, 4, 2)]
EXACT = [DtoCheckpoint(), StepCheckpoint(), StepCheckpoint(states="rebuild"), StageCheckpoint(),
         StageCheckpoint(states="rebuild"), Revolve(slots=2), Revolve(unit="stage", slots=2)]  # fmt: skip


def randomised(module: nn.Module, scale: float = 0.3) -> nn.Module:
    """Coefficients away from 0, diffusion positive."""
    generator = torch.Generator().manual_seed(3)
    for flow in (m for m in module.modules() if isinstance(m, ReactionDiffusionAdvection)):
        for name, p in flow.named_parameters():
            value = scale * torch.randn(p.shape, generator=generator)
            p.data.copy_(value.abs() + 0.05 if name == "tau" else value)
    return module


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sharing", SHARINGS)
def test_the_flow_is_the_exponential_of_the_spectral_operator(shape, sharing):
    """Against torch.fft in complex numbers: every mode grows by exp(t (ρ − τ|ω|² + i υ·ω))."""
    flow = randomised(ReactionDiffusionAdvection(torch.Size(shape), sharing)).double()
    exact = ReactionDiffusionAdvection(torch.Size(shape), sharing).double()
    torch.manual_seed(0)
    w0 = torch.randn(shape, dtype=torch.float64)
    found = flow.evolve(w0, 0.25, 0.25, 4, 10)
    frequencies = [2 * torch.pi * torch.fft.fftfreq(k, dtype=torch.float64) for k in shape[2:]]
    grid = torch.meshgrid(*frequencies, indexing="ij")
    squared = sum(g.square() for g in grid)
    axes = [g for g, k in zip(grid, shape[2:], strict=True) if k > 1]
    tau = torch.zeros_like(flow.rho) if flow.tau is None else flow.tau
    axes = [torch.where(g == -torch.pi, 0.0, g) for g in axes]  # for an even size, the frequency without a derivative
    turn = sum((flow.upsilon[i][..., None, None] * g for i, g in enumerate(axes)), torch.zeros(1, 1, 1, 1))
    symbol = flow.rho[..., None, None] - tau[..., None, None] * squared + 1j * turn
    for n in range(4):
        modes = torch.fft.fft2(w0) * torch.exp((0.25 + 0.25 * n) * symbol)
        torch.testing.assert_close(found[n], torch.fft.ifft2(modes).real, atol=1e-6, rtol=1e-6)
    assert exact.evolve(w0, 0.25, 0.25, 4, 10).sub(w0).abs().max() == 0, "p = 0 is constant weights"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sharing", SHARINGS)
def test_the_gradient_of_the_flow(shape, sharing):
    """gradcheck, into weights and coefficients."""
    flow = randomised(ReactionDiffusionAdvection(torch.Size(shape), sharing)).double()
    w0 = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda w, *_: flow.evolve(w, 0.0, 0.4, 3, 10), (w0, *flow.parameters()), fast_mode=True
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_time_steps_converge_to_the_exact_flow(shape):
    """The nonlinear path with σ the identity: classic Runge–Kutta, an error of fourth order."""
    flow = randomised(ReactionDiffusionAdvection(torch.Size(shape), "kernel"), 0.2).double()
    w0 = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    truth = flow.evolve(w0, 1.0, 0.0, 1, 1)[0]
    flow.activation = lambda rate: rate
    coarse, fine = ((flow.evolve(w0, 1.0, 0.0, 1, n)[0] - truth).norm() for n in (8, 16))
    assert fine < 1e-3 * truth.norm() and 10 < coarse / fine < 26


@pytest.mark.parametrize("activation", EVOLUTION_ACTIVATIONS)
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_no_coefficients_are_constant_weights_to_the_last_bit(activation, coupling):
    f = MODELS["squeezenext"](10, make_ode_block())[4].f
    evolution = Evolution(f, coupling, "layer", activation)
    theta = tuple(f.parameters())
    for before, after in zip(theta, evolution(theta, 3), strict=True):
        assert torch.equal(after, before) or all(torch.equal(row, before) for row in after)


@pytest.mark.parametrize(
    ("name", "coupling", "sharing", "activation"),
    [*itertools.product(sorted({*IMAGE_MODELS} - {"resnet4", "resnet18"}), COUPLINGS, ["channel"], ["none"]),
     *itertools.product(["resnet4"], COUPLINGS, SHARINGS, EVOLUTION_ACTIVATIONS)],
)  # fmt: skip
def test_every_coefficient_has_a_gradient_at_the_start(name, coupling, sharing, activation):
    settings = [f"model={name}", "model.evolution=reaction_diffusion_advection",
                f"model.evolution_coupling={coupling}", f"model.evolution_sharing={sharing}",
                f"model.evolution_activation={activation}"]  # fmt: skip
    config = composed(settings)
    torch.manual_seed(0)
    # After a norm, only its eps contributes to a shared ρ's gradient: rounding in single precision.
    network = build_model(config.model, config.solver, config.gradient, 10).double()
    network(torch.randn(2, 3, 32, 32, dtype=torch.float64)).square().sum().backward()
    coefficients = [p for b in ode_blocks(network) for p in b.evolution.parameters()]
    assert coefficients
    for p in coefficients:  # some single channels may be dead behind their ReLU
        assert not p.any() and (p.grad != 0).float().mean() >= (1.0 if sharing == "layer" else 0.75)


@pytest.mark.parametrize("activation", EVOLUTION_ACTIVATIONS)
def test_diffusion_never_turns_negative_and_comes_back(activation):
    flow = ReactionDiffusionAdvection(torch.Size((4, 4, 3, 3)), activation=activation)
    flow.tau.data.fill_(-1.0)
    flow.evolve(torch.randn(4, 4, 3, 3), 1.0, 0.0, 1, 4).square().sum().backward()
    assert flow.tau.item() == 0.0 != flow.tau.grad.item()


class Small(nn.Module):
    """f with a convolution of each kind, smooth, and a bias that does not evolve."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.a, self.b = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 2, (1, 3), padding=(0, 1))
        self.c = nn.Conv2d(2, 2, 1, bias=False)
        for p in self.parameters():
            p.data = 0.4 * torch.randn(p.shape, generator=generator, dtype=torch.float64)

    def forward(self, t, y):
        return torch.tanh(self.c(torch.tanh(self.b(torch.tanh(self.a(y))))))


def block(mode, coupling="joint", activation="none", n_steps=3, tableau="rk2"):
    f = Small()
    evolution = randomised(Evolution(f, coupling, "kernel", activation, n_steps=6)).double()
    return OdeBlock(f, ExplicitRungeKutta(TABLEAUX[tableau]), TimeGrid(n_steps), mode, evolution)


def gradients(made: OdeBlock) -> list[torch.Tensor]:
    y = torch.randn(2, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    made(y).sin().sum().backward()
    return [y.grad, *(p.grad for p in made.parameters())]


@pytest.mark.parametrize("mode", EXACT, ids=lambda m: f"{m.unit}-{m.states}")
@pytest.mark.parametrize(("coupling", "activation"), [*itertools.product(COUPLINGS, EVOLUTION_ACTIVATIONS)])
def test_exact_gradients_into_initial_weights_and_coefficients(mode, coupling, activation):
    """Against full backpropagation through the coupled system."""
    ours, truth = (gradients(block(m, coupling, activation)) for m in (mode, FullBackprop()))
    for a, b in zip(ours, truth, strict=True):
        assert (a - b).norm() <= 1e-13 * max(b.norm(), 1)


@pytest.mark.parametrize("mode", EXACT[:1] + EXACT[3:4], ids=lambda m: f"{m.unit}-{m.states}")
@pytest.mark.parametrize(("coupling", "activation"), [*itertools.product(COUPLINGS, ("none", "tanh"))])
def test_gradients_against_finite_differences(mode, coupling, activation):
    made = block(mode, coupling, activation, n_steps=2)
    y = torch.randn(1, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    analytic = torch.autograd.grad(made(y).sin().sum(), list(made.parameters()))
    for k, (p, grad) in enumerate(zip(made.parameters(), analytic, strict=True)):
        direction = torch.randn(p.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
        original, values = p.data.clone(), []
        for step in (1e-5, -1e-5):
            p.data = original + step * direction
            values.append(made(y).sin().sum().item())
        p.data = original
        assert (values[0] - values[1]) / 2e-5 == pytest.approx((grad * direction).sum().item(), rel=1e-6, abs=1e-9)


def test_the_reverse_adjoint_takes_the_weights_of_the_step_it_reverses():
    """With more steps its gradient tends to the exact one, at the order of weights that are constant in a step."""

    def error(n_steps):
        ours = gradients(block(GRADIENT_MODES["reverse_adjoint"](), n_steps=n_steps, tableau="rk4"))
        truth = gradients(block(FullBackprop(), n_steps=n_steps, tableau="rk4"))
        return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, truth, strict=True))

    errors = [error(n) for n in (2, 4, 8)]
    assert errors[0] < 1e-2 and errors[2] < errors[1] / 8 < errors[0] / 64


def test_steps_of_a_joint_solve_have_weights_of_their_own():
    """By hand, with Euler: step n has the weights at t_n; with ``first``, every step has those at t = 1."""
    y0 = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    for coupling in COUPLINGS:
        made = block(FullBackprop(), coupling, n_steps=2, tableau="euler")
        flows, y = dict(zip(made.evolution.places, made.evolution.flows, strict=True)), y0
        for n in range(2):
            at = n / 2 if coupling == "joint" else 1.0
            theta = tuple(
                flows[i].evolve(p, at, 0.0, 1, 1)[0] if i in flows else p for i, p in enumerate(made.f.parameters())
            )
            y = y + 0.5 * made.field(n / 2, y, theta)
        torch.testing.assert_close(made(y0), y)


def test_parameters_beside_the_recalled_totals():
    """Published: 7.96K and 8.23K for ResNet-4, from an unknown parametrisation; ours adds less."""

    def total(*settings):
        config = composed(["model=resnet4", "model.evolution=reaction_diffusion_advection", *settings])
        return count_parameters(build_model(config.model, config.solver, config.gradient, 10))["total"]

    assert total() == 7_706 + 2 * 4
    assert total("model.evolution_sharing=channel") == 7_706 + 2 * 4 * 16
    assert total("model.evolution_sharing=kernel") == 7_706 + 2 * 4 * 256


def test_coefficients_are_exempt_from_decay_and_have_a_rate_of_their_own():
    config = composed(
        ["model=resnet4", "model.evolution=reaction_diffusion_advection", "recipe.evolution_lr=0.1", "recipe.lr=0.5"]
    )
    network = build_model(config.model, config.solver, config.gradient, 10)
    weights, coefficients = build_optimizer(network, config.recipe).param_groups
    assert coefficients["weight_decay"] == 0 and weights["weight_decay"] == 5e-4
    assert sum(p.numel() for p in coefficients["params"]) == 8
    optimizer = build_optimizer(network, config.recipe)
    set_learning_rate(optimizer, 0.2)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.2, 0.02])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["solver.n_steps=1"], "evolution_coupling=joint"),
        (["solver=dopri5", "solver.adaptive=true"], "evolution_coupling=first"),
        (["model.block=residual"], "set model.block=ode"),
        (["model.evolution_sharing=pixel"], "choose one of layer, channel, kernel"),
    ],
)
def test_combinations_without_a_meaning(settings, says):
    with pytest.raises(UserError, match=says):
        composed(["model.evolution=reaction_diffusion_advection", *settings])
    if "solver.adaptive=true" in settings:
        with pytest.raises(ValueError, match="fixed steps"):
            OdeBlock(
                Small(),
                ExplicitRungeKutta(TABLEAUX["dopri5"]),
                Tolerance(1e-3, 1e-3),
                FullBackprop(),
                Evolution(Small()),
            )
