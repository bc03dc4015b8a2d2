"""Modes that promise the exact gradient of the discrete solve, against full backpropagation and finite differences."""

import itertools

import pytest
import torch
from conftest import Field, make_ode_block, solver
from torch import nn

from anode_exp.data import Augmentation, EpochBatches, Normalisation, Split
from anode_exp.gradient import GRADIENT_MODES, DtoCheckpoint, FullBackprop
from anode_exp.models import MODELS, NORMS, take_evaluations
from anode_exp.ode import TABLEAUX, TimeGrid, VectorField
from anode_exp.training.train_step import autocast_for, train_step

EXACT = sorted(set(GRADIENT_MODES) - {"reverse_adjoint"})


def gradients(network: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """Output, input gradient, parameter gradients, and buffers after one forward and backward pass."""
    images = images.clone().requires_grad_()
    out = network(images)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    (out * weights).sum().backward()
    assert images.grad is not None
    return [out.detach(), images.grad, *(p.grad for p in network.parameters()), *network.buffers()]


def assert_same_bits(network_of, images):
    truth = gradients(network_of("full_backprop"), images)
    for mode in EXACT:
        for ours, theirs in zip(gradients(network_of(mode), images), truth, strict=True):
            assert torch.equal(ours, theirs), mode


@pytest.mark.parametrize("tableau", TABLEAUX)
@pytest.mark.parametrize("mode", EXACT)
def test_gradcheck(mode, tableau):
    """Finite differences in y0 and in θ, which here is no leaf."""
    module = Field()
    field = VectorField(module)
    y0 = torch.tensor([[0.3, -0.2, 0.9], [1.0, 0.1, -0.5]], dtype=torch.float64, requires_grad=True)
    w, v = (p.detach().clone().requires_grad_() for p in module.parameters())

    def solve(y0, w, v):
        return GRADIENT_MODES[mode]().solve(field, y0, (2 * w, v.sin()), TimeGrid(2), solver(tableau))

    assert torch.autograd.gradcheck(solve, (y0, w, v))


@pytest.mark.parametrize(("tableau", "n_steps", "norm"), [*itertools.product(TABLEAUX, (1, 3), NORMS)])
def test_squeezenext_to_the_last_bit(tableau, n_steps, norm):
    def network_of(mode):
        torch.manual_seed(0)
        return MODELS["squeezenext"](
            10, make_ode_block(mode, tableau, n_steps), norm=norm, field_norm=norm, width=0.25
        ).double()

    assert_same_bits(network_of, torch.randn(2, 3, 32, 32, dtype=torch.float64))


@pytest.mark.parametrize(
    ("tableau", "n_steps", "norm"),
    [*((t, 1, "batch") for t in TABLEAUX), *(("euler", 2, n) for n in NORMS), ("rk2", 3, "batch")],
)
def test_resnet18_to_the_last_bit(tableau, n_steps, norm):
    def network_of(mode):
        torch.manual_seed(0)
        return MODELS["resnet18"](10, make_ode_block(mode, tableau, n_steps), norm=norm, field_norm=norm).double()

    assert_same_bits(network_of, torch.randn(2, 3, 32, 32, dtype=torch.float64))


@pytest.mark.parametrize(("mode", "tableau"), [(m, t) for m in EXACT for t in ("rk2", "bosh3") if m != "full_backprop"])
def test_fifty_training_steps_to_the_last_bit(mode, tableau):
    """Weights, momentum and buffers after 50 steps of the real training step on augmented images."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (400, 32, 32, 3), dtype=torch.uint8, generator=generator)
    split = Split(images, torch.arange(400) % 10)
    normalise = Normalisation([0.5] * 3, [0.25] * 3, torch.device("cpu"))

    def after_training(mode):
        torch.manual_seed(0)
        network = MODELS["squeezenext"](10, make_ode_block(mode, tableau), width=0.5)
        network = network.to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        losses = []
        for batch in EpochBatches(split, 8, Augmentation(4, True), normalise, seed=0, epoch=1):
            losses.append(train_step(network, optimizer, autocast_for("fp32", torch.device("cpu")), *batch)[0])
        momentum = [s["momentum_buffer"] for s in optimizer.state.values()]
        assert len(losses) == 50
        return [torch.stack(losses), *network.state_dict().values(), *momentum]

    for ours, theirs in zip(after_training(mode), after_training("full_backprop"), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("mode", EXACT)
def test_autocast_reaches_the_re_evaluation(mode):
    """Equal bits under bfloat16 autocast, with the backward pass outside of it as training has it."""
    seen = []

    class Conv(nn.Conv2d):
        def forward(self, x):
            out = super().forward(x)
            seen.append(out.dtype)
            return out

    def run(mode):
        torch.manual_seed(0)
        network = make_ode_block(mode)(_Autonomous(Conv(3, 3, 3, padding=1), nn.GroupNorm(1, 3), nn.ReLU()))
        images = torch.randn(2, 3, 8, 8, requires_grad=True)
        with autocast_for("bf16", torch.device("cpu"))():
            out = network(images)
        out.float().sum().backward()
        return [out.detach(), images.grad, *(p.grad for p in network.parameters())]

    truth = run("full_backprop")
    seen.clear()
    for ours, theirs in zip(run(mode), truth, strict=True):
        assert torch.equal(ours, theirs)
    assert set(seen) == {torch.bfloat16}
    if mode != "full_backprop":
        assert len(seen) > 4  # the re-evaluation was seen too


class _Autonomous(nn.Sequential):
    def forward(self, t, y):
        return super().forward(y)


@pytest.mark.parametrize("mode", GRADIENT_MODES)
def test_hooks_of_a_theta_that_is_no_leaf_fire_once(mode):
    module = Field()
    leaves = [p.detach().clone().requires_grad_() for p in module.parameters()]
    theta = tuple(2 * leaf for leaf in leaves)
    fired = []
    for i, entry in enumerate((*theta, *leaves)):
        entry.register_hook(lambda grad, i=i: fired.append(i))
    y0 = torch.ones(3, dtype=torch.float64, requires_grad=True)
    y0.register_hook(lambda grad: fired.append("y0"))
    y1 = GRADIENT_MODES[mode]().solve(VectorField(module), y0, theta, TimeGrid(3), solver("rk2"))
    y1.sum().backward()
    assert sorted(map(str, fired)) == ["0", "1", "2", "3", "y0"]


@pytest.mark.parametrize("mode", GRADIENT_MODES)
def test_frozen_and_unused_parameters(mode):
    """A frozen parameter gets no gradient, one that f does not use gets none or zero, the others what is theirs."""

    class Extra(Field):
        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))

    y0 = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64)  # needs no gradient itself
    whole, frozen = Extra(), Extra()
    frozen.v.requires_grad_(False)
    for module in (whole, frozen):
        field = VectorField(module)
        GRADIENT_MODES[mode]().solve(field, y0, field.theta, TimeGrid(2), solver("rk4")).sum().backward()
    assert frozen.v.grad is None
    torch.testing.assert_close(frozen.w.grad, whole.w.grad, rtol=1e-14, atol=0)
    assert whole.unused.grad is None or not whole.unused.grad.any()
    assert whole.v.grad.abs().sum() > 0


@pytest.mark.parametrize("tableau", TABLEAUX)
@pytest.mark.parametrize("mode", EXACT)
def test_theta_of_every_step_gets_its_own_gradient(mode, tableau):
    module = Field()
    field = VectorField(module)
    y0 = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64)
    w = torch.stack([module.w.detach() * s for s in (1.0, 0.5, -0.3)]).requires_grad_()

    def solve(w):
        return GRADIENT_MODES[mode]().solve(field, y0, (w, module.v), TimeGrid(3), solver(tableau))

    assert torch.autograd.gradcheck(solve, (w,))
    grad = torch.autograd.grad(solve(w).sum(), w)[0]
    assert all(g.abs().sum() > 0 for g in grad)


@pytest.mark.parametrize(("tableau", "stages"), [("euler", 1), ("rk2", 2), ("bosh3", 3), ("rk4", 4), ("dopri5", 6)])
@pytest.mark.parametrize(("mode", "factor"), [("full_backprop", 0), ("dto_checkpoint", 1), ("reverse_adjoint", 1)])
@pytest.mark.parametrize("n_steps", [1, 4])
def test_evaluations_of_f(mode, factor, tableau, stages, n_steps):
    block = make_ode_block(mode, tableau, n_steps)(Field())
    block(torch.ones(3, dtype=torch.float64)).sum().backward()
    evaluations = take_evaluations(block)
    assert evaluations.forward == stages * n_steps
    assert evaluations.backward == factor * stages * n_steps
    assert take_evaluations(block).forward == 0


def test_modes_are_what_they_say():
    assert isinstance(GRADIENT_MODES["full_backprop"](), FullBackprop)
    assert isinstance(GRADIENT_MODES["dto_checkpoint"](), DtoCheckpoint)


@pytest.mark.parametrize("mode", EXACT)
def test_a_gradient_survives_a_graph_that_is_not_freed(mode):
    """Two backward passes through the same graph give the same gradient twice."""
    module = Field()
    field = VectorField(module)
    y1 = GRADIENT_MODES[mode]().solve(
        field, torch.ones(3, dtype=torch.float64), field.theta, TimeGrid(2), solver("rk2")
    )
    y1.sum().backward(retain_graph=True)
    once = module.w.grad.clone()
    y1.sum().backward()
    torch.testing.assert_close(module.w.grad, 2 * once, rtol=1e-15, atol=0)
