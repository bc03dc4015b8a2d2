"""BatchNorm along a solve: statistics, weight and bias by time."""

import re
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from anode_exp.build import autocast_for, build_model, build_optimizer
from anode_exp.config.compose import composed
from anode_exp.errors import UserError
from anode_exp.gradient import GRADIENT_MODES
from anode_exp.models import Autonomous, TimedBatchNorm, count_parameters, ode_blocks
from anode_exp.models.calibrate import calibrate_norms
from anode_exp.models.layers import BatchNorm, interpolation
from anode_exp.ode import TABLEAUX, ExplicitRungeKutta, TimeGrid, Tolerance, VectorField, integrate_adaptive
from anode_exp.ode.controller import NewtonFailed
from anode_exp.ode.implicit import DiagonallyImplicitRungeKutta
from anode_exp.ode.newton_krylov import NewtonKrylov
from anode_exp.ode.tableau import IMPLICIT_TABLEAUX
from anode_exp.tasks.classification import Classification
from anode_exp.training.step import MovingAverage, evaluate, train_step

CPU = torch.device("cpu")
ADAPTIVE = ["solver=dopri5", "solver.adaptive=true", "solver.rtol=0.01", "solver.atol=0.01"]


def network_of(*overrides, **changes):
    torch.manual_seed(0)
    config = composed(["model=resnet4", "recipe.lr=0.05", *overrides])
    return build_model(replace(config.model, **changes), config.solver, config.gradient, 10), config


def norms(network) -> list[TimedBatchNorm]:
    return [m for m in network.modules() if isinstance(m, TimedBatchNorm)]


def field(norm) -> Autonomous:
    return Autonomous(norm)


def batch(size=64):
    return torch.randn(size, 3, 32, 32, generator=torch.Generator().manual_seed(7))


def test_interpolation_is_piecewise_linear_and_constant_outside():
    times, values = [0.0, 0.1, 0.25, 0.8], [3.0, -1.0, 4.0, 1.0]
    for t in np.linspace(-0.2, 1.2, 57):
        found = interpolation(times, float(t))
        assert sum(w for _, w in found) == pytest.approx(1.0)
        assert sum(w * values[i] for i, w in found) == pytest.approx(np.interp(t, times, values))
    assert interpolation(times, 0.1 + 1e-12) == interpolation(times, 0.1 - 1e-12) == [(1, 1.0)]
    assert interpolation([0.3], 0.9) == [(0, 1.0)]


def test_every_time_of_a_fixed_solve_is_one_of_the_grid():
    """For any rounding of n h + c h: a row is then updated as in BatchNorm, without interpolation."""
    _, config = network_of()
    for name, tableau in TABLEAUX.items():
        for n_steps in (1, 3, 7, 10):
            solver = replace(config.solver, name=name, n_steps=n_steps)
            times = norms(build_model(config.model, solver, config.gradient, 10))[0].times
            c = tableau.without_unused_stages().c
            for t in (n * (1.0 / n_steps) + x * (1.0 / n_steps) for n in range(n_steps) for x in c):
                assert len(interpolation(times, t)) == 1, (name, n_steps, t)


@pytest.mark.parametrize(
    "overrides",
    [
        ["solver.n_steps=2"],
        ["solver=rk4", "gradient=stage_checkpoint"],
        ["model.evolution=reaction_diffusion_advection", "model.evolution_sharing=kernel"],
        ["runtime.precision=bf16", "gradient=full_backprop"],
        ADAPTIVE,
    ],
)
def test_training_is_bit_for_bit_that_with_one_set(overrides):
    runs = []
    for statistics in ("by_time", "forward"):
        network, config = network_of(*overrides, statistics=statistics)
        optimizer = build_optimizer(network, config.recipe)
        average = MovingAverage(network, 0.9)
        generator = torch.Generator().manual_seed(1)
        losses = []
        for _ in range(3):
            images = torch.randn(4, 3, 32, 32, generator=generator)
            autocast = autocast_for(config.runtime.precision, CPU)
            losses.append(train_step(network, optimizer, autocast, Classification(), (images, torch.arange(4)))[0])
            average.update(network)
        runs.append([torch.stack(losses), *network.parameters(), *average.network.parameters()])
        assert len(norms(network)) == (2 if statistics == "by_time" else 0)
        for norm, averaged in zip(norms(network), norms(average.network), strict=True):
            assert torch.equal(norm.row_times, averaged.row_times)
            assert averaged.running_mean.any(), "statistics are averaged too"
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


class HostReads(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.reads = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads[func.__name__] += func.__name__.startswith(("_local_scalar_dense", "item", "nonzero"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("affine", ["shared", "by_time"])
def test_a_static_step_reads_nothing_on_the_host_and_adds_views_only(affine):
    """Two views for each evaluation of a norm in the forward pass: no work for a device."""
    counts = []
    for statistics in ("by_time", "forward"):
        network, config = network_of("solver=rk4", f"model.norm_affine={affine}", statistics=statistics)
        optimizer = build_optimizer(network, config.recipe)
        for _ in range(2):
            with HostReads() as mode:
                train_step(network, optimizer, autocast_for("fp32", CPU), Classification(), (batch(4), torch.arange(4)))
        assert not sum(mode.reads.values())
        counts.append(Counter(mode.reads.keys()))
    more = {name for name in counts[0] if name not in counts[1]}
    assert more <= {"select.int"}


def test_the_update_between_two_times_has_no_trace_of_the_initial_values():
    norm = TimedBatchNorm(3, [0.0, 0.5, 1.0], between=True)
    f, generator = field(norm), torch.Generator().manual_seed(0)
    seen: list[tuple[float, torch.Tensor]] = []
    for t in (0.1, 0.4, 0.1, 0.3, 0.5):
        y = torch.randn(8, 3, 4, 4, generator=generator) * (1 + t) + t
        out = f(t, y)
        torch.testing.assert_close(out, functional.batch_norm(y, None, None, training=True))
        seen.append((t, y.mean((0, 2, 3))))
    for row, at in enumerate((0.0, 0.5)):
        # The plain moving average from 0 over 1 minus what is left of its initial value.
        x, left = torch.zeros(3), 1.0
        for t, mean in seen:
            share = 0.1 * max(0.0, 1 - abs(t - at) / 0.5)
            x, left = (1 - share) * x + share * mean, left * (1 - share)
        torch.testing.assert_close(norm.running_mean[row], x / (1 - left))
        assert norm.row_weight[row].item() == pytest.approx(1 - left)
    assert norm.row_weight[2] == 0 and not norm.running_mean[2].any(), "never near t = 1"
    # So t = 1 is evaluated with t = 1/2, the last time that has statistics.
    norm.eval()
    y = torch.randn(8, 3, 4, 4, generator=generator)
    expected = functional.batch_norm(y, norm.running_mean[1], norm.running_var[1])
    torch.testing.assert_close(f(1.0, y), expected)
    mean, var = (0.6 * x[0] + 0.4 * x[1] for x in (norm.running_mean, norm.running_var))
    torch.testing.assert_close(f(0.2, y), functional.batch_norm(y, mean, var))
    with pytest.raises(RuntimeError, match="called without a time"):
        norm(y)


def test_a_rejected_step_and_a_failed_evaluation_leave_no_trace():
    norm = TimedBatchNorm(3, [0.0, 1.0], between=True)
    f = VectorField(Autonomous(norm))
    f(0.2, torch.randn(4, 3, 2, 2), f.theta)
    before = [b.clone() for b in norm.buffers()]
    with f.trial():
        f(0.7, torch.randn(4, 3, 2, 2), f.theta)
    with f.re_evaluation():
        f(0.7, torch.randn(4, 3, 2, 2), f.theta)
    with pytest.raises(RuntimeError):
        f(0.7, torch.randn(4, 5, 2, 2), f.theta)
    assert all(torch.equal(a, b) for a, b in zip(norm.buffers(), before, strict=True))


class ShortNearTheEnd(NewtonKrylov):
    def solve(self, field, theta, t, c, z, guess):
        if t > 0.75 and c > 0.2:
            raise NewtonFailed("too long")
        return super().solve(field, theta, t, c, z, guess)


def test_full_backprop_through_a_halved_step():
    """Its half begins between two times, whose rows are then updated in place after a graph has kept one of them."""
    found = []
    for mode in ("full_backprop", "step_checkpoint"):
        torch.manual_seed(0)
        norm = TimedBatchNorm(3, [0.0, 0.5, 1.0])
        field = VectorField(Autonomous(nn.Conv2d(3, 3, 1), norm, nn.Tanh()).double())
        y0 = torch.randn(4, 3, 4, 4, dtype=torch.float64)
        method = DiagonallyImplicitRungeKutta(IMPLICIT_TABLEAUX["crank_nicolson"], ShortNearTheEnd("gmres"))
        GRADIENT_MODES[mode]().solve(field, y0, field.theta, TimeGrid(2), method).square().sum().backward()
        assert field.evaluations.rejected == 1
        found.append([p.grad for p in field.theta])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("overrides", [ADAPTIVE, ["solver=rk2", "model.evolution=reaction_diffusion_advection"]])
def test_evaluation_is_the_trained_network(overrides):
    """Calibrated on a batch, the network evaluates that batch as in training; with a single set it does not."""
    gaps = []
    for statistics in ("by_time", "forward"):
        network, config = network_of(*overrides, statistics=statistics)
        optimizer = build_optimizer(network, config.recipe)
        for _ in range(3):  # away from the start, where all times are similar
            train_step(
                network, optimizer, autocast_for("fp32", CPU), Classification(), (batch(16), torch.arange(16) % 10)
            )
        calibrate_norms(network, autocast_for("fp32", CPU), [(batch(16), torch.zeros(16))])
        with torch.no_grad():
            evaluated, trained = network(batch(16)), network.train()(batch(16))
        gaps.append(float((evaluated - trained).norm() / trained.norm()))
    assert gaps[0] < 0.05 and gaps[0] < 0.3 * gaps[1]


@pytest.mark.parametrize("overrides", [ADAPTIVE, ["solver=sdirk2", "solver.linear=gmres"]])
def test_calibration_is_the_mean_over_evaluations_that_count(overrides, monkeypatch):
    """Without those in Newton's iterations, in the estimate of the first step, and in rejected steps."""
    network, _ = network_of(*overrides, statistics="forward")
    means = {m: [] for m in network.modules() if isinstance(m, BatchNorm)}
    for norm in means:
        norm.register_forward_pre_hook(
            lambda m, y: means[m].append(y[0].mean((0, 2, 3))) if m.track_running_stats else None
        )
    trial, undone = VectorField.trial, []

    @contextmanager
    def recorded(self):
        before = {m: len(x) for m, x in means.items()}
        with trial(self) as attempt:
            yield attempt
        if not attempt.keep:
            undone.append(attempt)
            for m, x in means.items():
                del x[before[m] :]

    monkeypatch.setattr(VectorField, "trial", recorded)
    calibrate_norms(network, autocast_for("fp32", CPU), [(x, torch.zeros(4)) for x in batch(8).split(4)])
    assert undone or overrides is not ADAPTIVE
    for norm, seen in means.items():
        torch.testing.assert_close(norm.running_mean, torch.stack(seen).mean(0), rtol=1e-4, atol=1e-5)
        assert norm.momentum == 0.1 and norm.num_batches_tracked is None


def test_steps_and_solvers_other_than_the_trained_ones():
    """By time under other steps, from one set, adaptive to fixed and back: interpolated, all rows known."""
    trained, _ = network_of("solver.n_steps=2")
    for norm in norms(trained):
        norm.running_mean[1], norm.running_var[1] = 8.0, 3.0  # t = 1/2
    state = trained.state_dict()
    for overrides in (["solver.n_steps=5"], ["solver=rk4"], ADAPTIVE):
        network, _ = network_of(*overrides)
        network.load_state_dict(state)
        for norm in norms(network):
            assert (norm.row_weight == 1).all()
            for t, mean, var in zip(norm.times, norm.running_mean[:, 0], norm.running_var[:, 0], strict=True):
                assert mean == pytest.approx(np.interp(t, [0, 0.5], [0, 8]))
                assert var == pytest.approx(np.interp(t, [0, 0.5], [1, 3]))
    one, _ = network_of(statistics="forward")
    one.load_state_dict(state)
    found = [m for b in ode_blocks(one) for m in b.modules() if isinstance(m, BatchNorm)]
    assert (found[0].running_mean == 4.0).all() and (found[0].running_var == 2.0).all()
    for overrides in (["solver.n_steps=1"], ["solver.n_steps=3"], ADAPTIVE):
        network, _ = network_of(*overrides)
        network.load_state_dict(one.state_dict())
        assert all((n.running_mean == 4.0).all() and (n.row_weight == 1).all() for n in norms(network))
    # A resumed adaptive run has the same rows, including those without statistics.
    adaptive, _ = network_of(*ADAPTIVE)
    norms(adaptive)[0].row_weight[3] = 0.5
    again, _ = network_of(*ADAPTIVE)
    again.load_state_dict(adaptive.state_dict())
    assert norms(again)[0].row_weight.tolist() == [0.0] * 3 + [0.5] + [0.0] * 7
    # Fixed steps to the same times evaluate all rows: those without statistics get the nearest ones.
    norms(adaptive)[0].running_mean[3] = 2.0
    fixed, _ = network_of("solver=heun", "solver.n_steps=10")
    fixed.load_state_dict(adaptive.state_dict())
    assert norms(fixed)[0].times == norms(adaptive)[0].times and (norms(fixed)[0].running_mean == 2.0).all()
    one.load_state_dict(adaptive.state_dict())
    assert (found[0].running_mean == 2.0).all(), "the mean of the times that have statistics"


def test_before_any_training_an_adaptive_network_can_be_evaluated():
    network, _ = network_of(*ADAPTIVE)
    loss, _ = evaluate(network, autocast_for("fp32", CPU), Classification(), [(batch(4), torch.arange(4))]).values()
    assert np.isfinite(loss)


@pytest.mark.parametrize("statistics", ["by_time", "forward"])
def test_weight_and_bias_by_time(statistics):
    """1 + offset and offset, interpolated; at the start equal to the network with shared ones, to which they decay."""
    network, config = network_of("model.norm_affine=by_time", "model.norm_intervals=4", "solver=rk2",
                                 "recipe.decay_all=false", statistics=statistics)  # fmt: skip
    plain, _ = network_of("solver=rk2", statistics=statistics)
    assert torch.equal(network(batch(4)), plain(batch(4)))
    assert count_parameters(network)["total"] == count_parameters(plain)["total"] + 2 * 2 * 16 * 4
    norm = norms(network)[0]
    assert norm.weight is None and norm.weight_offset.shape == norm.bias_offset.shape == (5, 16)
    nn.init.normal_(norm.weight_offset)
    nn.init.normal_(norm.bias_offset)
    y = torch.randn(4, 16, 8, 8)
    for t in (0.0, 0.3, 0.5, 1.0):
        weight, bias = (
            torch.tensor(np.array([np.interp(t, np.linspace(0, 1, 5), x) for x in p.detach().numpy().T])).float()
            for p in (norm.weight_offset, norm.bias_offset)
        )
        torch.testing.assert_close(
            Autonomous(norm)(t, y), functional.batch_norm(y, None, None, 1 + weight, bias, training=True)
        )
    optimizer = build_optimizer(network, config.recipe)
    (decayed,) = [g["params"] for g in optimizer.param_groups if g["weight_decay"] > 0]
    assert any(p is norm.weight_offset for p in decayed) and any(p is norm.bias_offset for p in decayed)
    gained, _ = network_of("model.norm_affine=by_time", "model.field_gain=0.25")
    assert (norms(gained)[-1].weight_offset == -0.75).all() and not norms(gained)[0].weight_offset.any()


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["model.field_norm=group"], "has one weight for all times; set model.field_norm=batch"),
        (["model.block=residual"], "a residual block has one time; set model.block=ode"),
        (["model.norm_intervals=0"], "at least 1"),
    ],
)
def test_what_weight_and_bias_by_time_are_not_for(overrides, says):
    with pytest.raises(UserError, match=re.escape(says)):
        composed(["model=resnet4", "model.norm_affine=by_time", *overrides])


def test_the_default_and_the_published_codes():
    assert composed([]).model.statistics == "by_time" and composed([]).model.norm_affine == "shared"
    assert composed(["compat=published_code"]).model.statistics == "every_evaluation"
    assert composed(["recipe=modern"]).model.statistics == "by_time"


def test_adaptive_times_reach_the_rows_around_them():
    norm = TimedBatchNorm(3, [m / 10 for m in range(11)], between=True)
    f = VectorField(Autonomous(nn.Conv2d(3, 3, 1), norm, nn.Tanh()))
    with torch.no_grad():
        _, steps = integrate_adaptive(
            f, torch.randn(4, 3, 4, 4), f.theta, Tolerance(1e-2, 1e-2), ExplicitRungeKutta(TABLEAUX["bosh3"])
        )
    table = TABLEAUX["bosh3"]
    times = [t + c * h for t, h in zip(steps.times, steps.sizes, strict=False) for c in table.c]
    expected = {i for t in times for i, _ in interpolation(norm.times, t)}
    assert {i for i, s in enumerate(norm.row_weight.tolist()) if s > 0} == expected and len(expected) > 3
