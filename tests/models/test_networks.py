import math
from dataclasses import replace

import pytest
import torch
from conftest import IMAGE_MODELS, make_ode_block
from torch import nn

from anode_exp.build import build_model
from anode_exp.config.compose import composed
from anode_exp.models import ACTIVATIONS, MODELS, NORMS, OdeBlock, TimedBatchNorm, count_parameters, ode_blocks


@pytest.mark.parametrize(
    ("name", "total", "in_blocks", "blocks"),
    [
        ("squeezenext", 461_466, 199_800, 4),
        ("resnet18", 11_173_962, 6_270_720, 4),
        ("resnet10", 44_186, 2 * 16 * (9 * 16 + 2) + 2 * 32 * (9 * 32 + 2), 2),
        ("resnet4", 7_706, 2 * 16 * (9 * 16 + 2), 1),
        ("alexnet", 1_756_682, 64 * (25 * 64 + 1 + 2), 1),
    ],
)
def test_parameter_counts_of_the_published_code(name, total, in_blocks, blocks):
    network = MODELS[name](10, make_ode_block())
    assert count_parameters(network) == {"total": total, "ode_blocks": in_blocks}
    assert len(list(ode_blocks(network))) == blocks


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_output_shape(name):
    network = MODELS[name](100, make_ode_block())
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 100)


@pytest.mark.parametrize("name", [m for m in IMAGE_MODELS if m != "resnet18"])  # as resnet10
@pytest.mark.parametrize("blocks", [0, 2])
def test_blocks_per_stage(name, blocks):
    network = MODELS[name](10, make_ode_block(), blocks_per_stage=blocks)
    single = MODELS[name](10, make_ode_block())
    assert len(list(ode_blocks(network))) == blocks * len(list(ode_blocks(single)))
    one = count_parameters(single)["ode_blocks"]
    assert count_parameters(network)["ode_blocks"] == blocks * one
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("name", IMAGE_MODELS)
@pytest.mark.parametrize(
    ("norm", "activation"), [*((n, "relu") for n in NORMS), *(("batch", a) for a in ACTIVATIONS if a != "relu")]
)
def test_norms_and_activations_train(name, norm, activation):
    network = MODELS[name](
        10, make_ode_block(tableau="euler", n_steps=1), norm=norm, field_norm=norm, activation=activation
    )
    network(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    kinds = {"batch": nn.BatchNorm2d, "group": nn.GroupNorm, "layer": nn.GroupNorm, "none": nn.Identity}
    assert any(isinstance(m, kinds[norm]) for m in network.modules())


def test_the_norm_of_f_may_differ_from_the_networks():
    network = MODELS["resnet10"](10, make_ode_block(), norm="batch", field_norm="none")
    inside = [m for b in ode_blocks(network) for m in b.modules()]
    assert not any(isinstance(m, nn.BatchNorm2d) for m in inside)
    assert any(isinstance(m, nn.BatchNorm2d) for m in network.modules())


@pytest.mark.parametrize("channels", [2, 8, 16, 24, 34, 64, 512])
def test_layer_norm_is_over_the_whole_image_and_groups_divide(channels):
    y = torch.randn(2, channels, 4, 4)
    torch.testing.assert_close(NORMS["layer"](channels)(y), nn.functional.layer_norm(y, y.shape[1:]))
    group = NORMS["group"](channels)
    assert channels % group.num_groups == 0 and channels // group.num_groups >= min(8, channels)
    assert NORMS["group"](512).num_groups == 32


@pytest.mark.parametrize(("width", "factor"), [(0.5, 0.25), (2.0, 4.0)])
def test_width_scales_the_channels(width, factor):
    network = MODELS["squeezenext"](10, make_ode_block(), width=width)
    assert count_parameters(network)["ode_blocks"] / 199_800 == pytest.approx(factor, rel=0.05)
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("width", [0.0, -1.0, 0.3])
def test_a_width_without_whole_channels_is_refused(width):
    with pytest.raises(ValueError, match="width is"):
        MODELS["squeezenext"](10, make_ode_block(), width=width)


def test_one_euler_step_is_the_residual_block():
    torch.manual_seed(0)
    f = nn.Conv2d(4, 4, 3, padding=1)

    class Autonomous(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = f

        def forward(self, t, y):
            return self.conv(y)

    y = torch.randn(2, 4, 8, 8)
    assert torch.equal(make_ode_block("full_backprop", "euler", 1)(Autonomous())(y), y + f(y))


def test_initialisation_of_the_published_code():
    """Xavier uniform of gain √2 for convolutions with a bias: a bound of √2·√(6/(fan_in + fan_out))."""
    torch.manual_seed(0)
    network = MODELS["squeezenext"](10, make_ode_block())
    for conv in (m for m in network.modules() if isinstance(m, nn.Conv2d)):
        fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(conv.weight)
        bound = math.sqrt(2) * math.sqrt(6 / (fan_in + fan_out))
        assert not conv.bias.any()
        assert conv.weight.abs().max() <= bound
        assert conv.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.2)
    for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
        assert (norm.weight == 1).all() and not norm.bias.any()


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_f_has_the_layers_of_the_reference(name):
    network = MODELS[name](10, make_ode_block())
    block = next(ode_blocks(network))
    assert isinstance(block, OdeBlock)
    kernels = [tuple(m.kernel_size) for m in block.modules() if isinstance(m, nn.Conv2d)]
    expected = {"squeezenext": [(1, 1), (1, 1), (1, 3), (3, 1), (1, 1)], "alexnet": [(5, 5)]}
    assert kernels == expected.get(name, [(3, 3), (3, 3)])
    assert isinstance(list(block.f)[-1], nn.ReLU), "f ends in its ReLU"


@pytest.mark.parametrize("tableau", ["euler", "rk2", "rk4"])
def test_statistics_by_time(tableau):
    """Each time's running statistics are those of its activations: the network evaluates as it was trained."""
    torch.manual_seed(0)
    config = composed([f"solver={tableau}", "model=resnet10", "model.statistics=by_time", "solver.n_steps=3"])
    network = build_model(config.model, config.solver, config.gradient, 10)
    plain = build_model(replace(config.model, statistics="forward"), config.solver, config.gradient, 10)
    for ours, theirs in zip(plain.parameters(), network.parameters(), strict=True):
        ours.data.copy_(theirs)
    norms = [m for m in network.modules() if isinstance(m, TimedBatchNorm)]
    assert len(norms) == 4 and len(norms[0].times) == {"euler": 3, "rk2": 6, "rk4": 7}[tableau]
    images = torch.randn(16, 3, 32, 32)
    outputs, gradients, gaps = [], [], []
    for made in (network, plain):
        for m in made.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.momentum = 1.0  # running statistics are the last batch's
        logits = made(images)
        logits.square().sum().backward()
        outputs.append(logits.detach())
        gradients.append([p.grad for p in made.parameters()])
        with torch.no_grad():
            gaps.append(float((made.eval()(images) - logits).norm() / logits.norm()))
    assert torch.equal(*outputs) and all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(norm.running_mean.any(dim=1).all() for norm in norms), "every time was reached"
    # The rest comes from variances with n or n − 1, and from the two half stages of rk4, which share a time.
    assert gaps[0] < (0.05 if tableau == "rk4" else 0.01) and gaps[1] > 3 * gaps[0]


def network_of(*overrides):
    config = composed(["model=resnet4", "model.statistics=by_time", *overrides])
    return build_model(config.model, config.solver, config.gradient, 10)


def test_statistics_by_time_under_other_steps_are_interpolated():
    trained, finer = network_of("solver.n_steps=2"), network_of("solver.n_steps=4")
    norm = next(m for m in trained.modules() if isinstance(m, TimedBatchNorm))
    norm.running_mean[1] = 7.0  # t = 1/2
    finer.load_state_dict(trained.state_dict())
    found = next(m for m in finer.modules() if isinstance(m, TimedBatchNorm))
    assert found.running_mean[:, 0].tolist() == [0.0, 3.5, 7.0, 7.0]
    assert found.row_times.tolist() == [0.0, 0.25, 0.5, 0.75]
