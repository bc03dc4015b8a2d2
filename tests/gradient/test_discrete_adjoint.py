"""Modes that promise the exact gradient of the discrete solve, against full backpropagation and finite differences."""

import math
import weakref

import pytest
import torch
from conftest import Field, make_ode_block, solver
from torch import nn

from anode_exp.build import autocast_for
from anode_exp.data import Augmentation, EpochBatches, Normalisation, Split
from anode_exp.gradient import (
    GRADIENT_MODES,
    DiscreteAdjoint,
    DtoCheckpoint,
    Equispaced,
    FullBackprop,
    Revolve,
    StageCheckpoint,
    StepCheckpoint,
)
from anode_exp.gradient.schedules import reversed_steps
from anode_exp.models import MODELS, NORMS, ode_blocks, take_evaluations
from anode_exp.ode import TABLEAUX, TimeGrid, VectorField
from anode_exp.tasks.classification import Classification
from anode_exp.training.step import train_step

POLICIES = {
    "full_backprop": FullBackprop(),
    "block": DtoCheckpoint(),
    "step, keep": StepCheckpoint(),
    "step, rebuild": StepCheckpoint(states="rebuild"),
    "step, revolve 1": Revolve(slots=1),
    "step, revolve 2": Revolve(slots=2),
    "step, equispaced 2": Equispaced(slots=2),
    "stage, keep": StageCheckpoint(),
    "stage, rebuild": StageCheckpoint(states="rebuild"),
    "stage, revolve 2": Revolve(unit="stage", slots=2),
    "stage, equispaced 2": Equispaced(unit="stage", slots=2),
}
BIT_EQUAL = ["block"]  # the others sum the same terms in another order


def gradients(network: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """Output, input gradient, parameter gradients, and buffers after one forward and backward pass."""
    images = images.clone().requires_grad_()
    out = network(images)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    (out * weights).sum().backward()
    assert images.grad is not None
    return [out.detach(), images.grad, *(p.grad for p in network.parameters()), *network.buffers()]


def assert_exact(network_of, images):
    """Every policy's gradients to rounding, the block's to the last bit; output and buffers to the last bit in all."""
    network = network_of(FullBackprop())
    truth = gradients(network, images)
    n_parameters = len(list(network.parameters()))
    for name, policy in POLICIES.items():
        if name == "full_backprop":
            continue
        found = gradients(network_of(policy), images)
        same = {0, *range(2 + n_parameters, len(truth))}
        for i, (ours, theirs) in enumerate(zip(found, truth, strict=True)):
            if name in BIT_EQUAL or i in same:
                assert torch.equal(ours, theirs), (name, i)
        ours, theirs = (torch.cat([x.flatten() for x in g[1 : 2 + n_parameters]]) for g in (found, truth))
        assert (ours - theirs).norm() <= 1e-14 * theirs.norm(), name


@pytest.mark.parametrize(
    ("mode", "tableau"),
    [*((m, "dopri5") for m in POLICIES), *(("full_backprop", t) for t in TABLEAUX if t != "dopri5")],
)
def test_gradcheck(mode, tableau):
    """Finite differences in y0 and in θ, which is not a leaf here. Policies are compared with full backprop below."""
    module = Field()
    field = VectorField(module)
    y0 = torch.tensor([[0.3, -0.2, 0.9], [1.0, 0.1, -0.5]], dtype=torch.float64, requires_grad=True)
    w, v = (p.detach().clone().requires_grad_() for p in module.parameters())

    def solve(y0, w, v):
        return POLICIES[mode].solve(field, y0, (2 * w, v.sin()), TimeGrid(2), solver(tableau))

    assert torch.autograd.gradcheck(solve, (y0, w, v))


@pytest.mark.parametrize(
    ("tableau", "n_steps", "norm"),
    [*((t, 2, "batch") for t in TABLEAUX), ("euler", 1, "batch"), ("rk2", 1, "batch"),
     *(("rk2", 2, norm) for norm in NORMS if norm != "batch")],
)  # fmt: skip
def test_squeezenext_exactly(tableau, n_steps, norm):
    def network_of(mode):
        torch.manual_seed(0)
        return MODELS["squeezenext"](
            10, make_ode_block(mode, tableau, n_steps), norm=norm, field_norm=norm, width=0.25
        ).double()

    assert_exact(network_of, torch.randn(2, 3, 32, 32, dtype=torch.float64))


@pytest.mark.parametrize(("tableau", "n_steps", "norm"), [("rk2", 2, "batch"), ("euler", 2, "group")])
def test_a_resnet_exactly(tableau, n_steps, norm):
    def network_of(mode):
        torch.manual_seed(0)
        return MODELS["resnet10"](10, make_ode_block(mode, tableau, n_steps), norm=norm, field_norm=norm).double()

    assert_exact(network_of, torch.randn(1, 3, 32, 32, dtype=torch.float64))


@pytest.mark.parametrize(("tableau", "n_steps", "intervals"), [("euler", 2, 2), ("rk4", 3, 4), ("bosh3", 2, 5)])
def test_weight_and_bias_by_time_exactly(tableau, n_steps, intervals):
    """Norms that interpolate their statistics, weight and bias at the time of each evaluation."""

    def network_of(mode):
        torch.manual_seed(0)
        times = [n / n_steps + c / n_steps for n in range(n_steps) for c in TABLEAUX[tableau].c]

        def make(f):
            f.time_norms(sorted(set(times)), affine_intervals=intervals)
            return make_ode_block(mode, tableau, n_steps)(f)

        network = MODELS["resnet4"](10, make).double()
        for name, p in network.named_parameters():
            if name.endswith("_offset"):
                torch.nn.init.normal_(p, std=0.5)
        return network

    assert_exact(network_of, torch.randn(2, 3, 32, 32, dtype=torch.float64))
    found = network_of(StageCheckpoint())
    gradients(found, torch.randn(2, 3, 32, 32, dtype=torch.float64))
    (block,) = ode_blocks(found)
    reached = [p.grad.any(dim=1) for name, p in block.named_parameters() if name.endswith("_offset")]
    assert len(reached) == 4 and all(r[:2].all() for r in reached)


@pytest.mark.parametrize(("mode", "tableau"), [("dto_checkpoint", "rk2")])
def test_fifty_training_steps_to_the_last_bit(mode, tableau):
    """Weights, momentum and buffers after 50 steps of the real training step on augmented images."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (200, 32, 32, 3), dtype=torch.uint8, generator=generator)
    split = Split(images, torch.arange(200) % 10)
    normalise = Normalisation([0.5] * 3, [0.25] * 3, torch.device("cpu"))

    def after_training(mode):
        torch.manual_seed(0)
        network = MODELS["resnet4"](10, make_ode_block(mode, tableau))
        network = network.to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        losses = []
        for batch in EpochBatches(split, 4, Augmentation(4, True), normalise, seed=0, epoch=1):
            losses.append(
                train_step(network, optimizer, autocast_for("fp32", torch.device("cpu")), Classification(), batch)[0]
            )
        momentum = [s["momentum_buffer"] for s in optimizer.state.values()]
        assert len(losses) == 50
        return [torch.stack(losses), *network.state_dict().values(), *momentum]

    for ours, theirs in zip(after_training(mode), after_training("full_backprop"), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("mode", POLICIES)
def test_autocast_reaches_the_re_evaluation(mode):
    """Equal bits under bfloat16 autocast, with the backward pass outside of it, as in training."""
    seen = []

    class Conv(nn.Conv2d):
        def forward(self, x):
            out = super().forward(x)
            seen.append(out.dtype)
            return out

    def run(mode):
        torch.manual_seed(0)
        network = make_ode_block(POLICIES[mode])(_Autonomous(Conv(3, 3, 3, padding=1), nn.GroupNorm(1, 3), nn.ReLU()))
        images = torch.randn(2, 3, 8, 8, requires_grad=True)
        with autocast_for("bf16", torch.device("cpu"))():
            out = network(images)
        out.float().sum().backward()
        return [out.detach(), images.grad, *(p.grad for p in network.parameters())]

    truth = run("full_backprop")
    seen.clear()
    for ours, theirs in zip(run(mode), truth, strict=True):
        if mode in ("full_backprop", *BIT_EQUAL):
            assert torch.equal(ours, theirs)
        else:  # the sum over stages is rounded to bfloat16 in another order
            assert (ours - theirs).norm() <= 0.02 * theirs.norm()
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
    y0 = torch.ones(1, 3, dtype=torch.float64, requires_grad=True)
    y0.register_hook(lambda grad: fired.append("y0"))
    y1 = GRADIENT_MODES[mode]().solve(VectorField(module), y0, theta, TimeGrid(3), solver("rk2", mode))
    y1.sum().backward()
    assert sorted(map(str, fired)) == ["0", "1", "2", "3", "y0"]


@pytest.mark.parametrize("mode", GRADIENT_MODES)
def test_frozen_and_unused_parameters(mode):
    """A frozen parameter gets no gradient, one that f does not use gets none or zero, the others get their own."""

    class Extra(Field):
        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))

    y0 = torch.tensor([[0.3, -0.2, 0.9]], dtype=torch.float64)  # needs no gradient itself
    whole, frozen = Extra(), Extra()
    frozen.v.requires_grad_(False)
    for module in (whole, frozen):
        field = VectorField(module)
        GRADIENT_MODES[mode]().solve(field, y0, field.theta, TimeGrid(2), solver("rk4", mode)).sum().backward()
    assert frozen.v.grad is None
    torch.testing.assert_close(frozen.w.grad, whole.w.grad, rtol=1e-14, atol=0)
    assert whole.unused.grad is None or not whole.unused.grad.any()
    assert whole.v.grad.abs().sum() > 0


@pytest.mark.parametrize("tableau", TABLEAUX)
@pytest.mark.parametrize("mode", POLICIES)
def test_theta_of_every_step_gets_its_own_gradient(mode, tableau):
    module = Field()
    field = VectorField(module)
    y0 = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64)
    w = torch.stack([module.w.detach() * s for s in (1.0, 0.5, -0.3)]).requires_grad_()

    def solve(w):
        return POLICIES[mode].solve(field, y0, (w, module.v), TimeGrid(3), solver(tableau))

    assert torch.autograd.gradcheck(solve, (w,))
    grad = torch.autograd.grad(solve(w).sum(), w)[0]
    assert all(g.abs().sum() > 0 for g in grad)


def binomial(n: int, c: int) -> int:
    """p(N, c) = (t−1)N − C(c+t, t−1) + 1 with C(c+t−1, t−1) < N ≤ C(c+t, t): steps taken more often than twice."""
    t = 1
    while math.comb(c + t, t) < n:
        t += 1
    return (t - 1) * n - math.comb(c + t, t - 1) + 1


def evaluations(policy, tableau: str, n_steps: int) -> tuple[int, int]:
    block = make_ode_block(policy, tableau, n_steps)(Field())
    block(torch.ones(3, dtype=torch.float64)).sum().backward()
    (counted,) = take_evaluations(block)
    assert take_evaluations(block)[0].forward == 0
    return counted.forward, counted.backward


@pytest.mark.parametrize(("tableau", "s"), [("euler", 1), ("rk2", 2), ("bosh3", 3), ("rk4", 4), ("dopri5", 6)])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 10, 16])
def test_evaluations_of_f(tableau, s, n):
    """The counts of the module's table, for every policy."""
    rebuild, stages = s * (n - 1), (s - 1) * n
    assert evaluations(FullBackprop(), tableau, n) == (s * n, 0)
    for keeping in (DtoCheckpoint(), StepCheckpoint(), StageCheckpoint(), GRADIENT_MODES["reverse_adjoint"]()):
        assert evaluations(keeping, tableau, n) == (s * n, s * n)
    assert evaluations(StepCheckpoint(states="rebuild"), tableau, n) == (s * n, s * n + rebuild)
    assert evaluations(StageCheckpoint(states="rebuild"), tableau, n) == (s * n, s * n + rebuild + stages)
    for c in (1, 2, 3, 5, n, n + 4):
        extra = s * binomial(n, min(c, n)) if n > 1 else 0
        assert evaluations(Revolve(slots=c), tableau, n) == (s * n, s * n + rebuild + extra), c
        assert evaluations(Revolve("stage", c), tableau, n) == (s * n, s * n + rebuild + extra + stages), c


@pytest.mark.parametrize("n", [1, 4, 10, 16])
@pytest.mark.parametrize("c", [1, 2, 3, 5, 20])
def test_equispaced_slots_never_beat_the_binomial_schedule(n, c):
    _, equispaced = evaluations(Equispaced(slots=c), "rk2", n)
    _, revolve = evaluations(Revolve(slots=c), "rk2", n)
    assert revolve <= equispaced
    if c >= n:
        assert revolve == equispaced == 2 * n + 2 * (n - 1)
    if c == 1:
        assert equispaced == 2 * n + 2 * n * (n - 1) // 2
    if (n, c) == (16, 3):
        assert revolve < equispaced


def test_no_more_states_are_held_than_slots():
    """The states alive inside the solve, counted where each unit begins."""
    most = []

    for make in (Revolve, Equispaced):
        for c in (1, 2, 3, 5):
            alive = weakref.WeakSet()

            class State(torch.Tensor):
                pass

            def advance(n, state, alive=alive, State=State):
                new = torch.full((1,), n + 1.0).as_subclass(State)
                alive.add(new)
                return (new,)

            first = torch.zeros(1).as_subclass(State)
            alive.add(first)
            order = []
            for n, (y,) in reversed_steps(make(slots=c).states, c, [(first,)], 16, advance):
                assert float(y) == n, "the state of its step"
                order.append(n)
                del y
                most.append(len(alive) - c)
            assert order == list(reversed(range(16)))
    assert max(most) <= 1, "the slots, and the state the unit begins from"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("block", "keep"), "unit block needs states input"),
        (("step", "input"), "unit block needs states input"),
        (("step", "revolve"), "need at least 1 slot"),
        (("step", "revolve", 0), "need at least 1 slot"),
        (("step", "keep", 3), "other states take none"),
        (("layer", "keep"), "choose unit of"),
    ],
)
def test_combinations_that_do_not_exist(settings, message):
    with pytest.raises(ValueError, match=message):
        DiscreteAdjoint(*settings)


@pytest.mark.parametrize("mode", POLICIES)
def test_a_gradient_survives_a_graph_that_is_not_freed(mode):
    """Two backward passes through the same graph give the same gradient twice."""
    module = Field()
    field = VectorField(module)
    y1 = POLICIES[mode].solve(field, torch.ones(3, dtype=torch.float64), field.theta, TimeGrid(2), solver("rk2"))
    y1.sum().backward(retain_graph=True)
    once = module.w.grad.clone()
    y1.sum().backward()
    torch.testing.assert_close(module.w.grad, 2 * once, rtol=1e-15, atol=0)


def test_two_passes_give_the_gradient_of_one():
    """ANODE's published code computes the input's gradient and the parameters' separately."""

    def gradients(passes):
        torch.manual_seed(0)
        network = MODELS["squeezenext"](10, make_ode_block(DtoCheckpoint(passes=passes), "rk4", 3), width=0.25)
        y = torch.randn(2, 3, 32, 32, requires_grad=True)
        network(y).square().sum().backward()
        return [y.grad, *(p.grad for p in network.parameters())]

    assert all(torch.equal(a, b) for a, b in zip(gradients(2), gradients(1), strict=True))


def test_statistics_may_advance_in_every_evaluation():
    """ANODE's published code lets BatchNorm's running statistics advance twice per step in an ODE block."""

    def running_mean(leaves_trace):
        torch.manual_seed(0)
        network = MODELS["resnet4"](10, make_ode_block("dto_checkpoint", "euler", 1))
        (block,) = ode_blocks(network)
        block.field.leaves_trace = leaves_trace
        network(torch.randn(4, 3, 32, 32)).square().sum().backward()
        return next(m for m in block.modules() if isinstance(m, nn.BatchNorm2d)).running_mean

    once, twice = running_mean(False), running_mean(True)
    torch.testing.assert_close(twice, once * (1 + 0.9))
