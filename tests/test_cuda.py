"""What only a CUDA device can show; skipped without one."""

import json

import pytest
import torch
from conftest import make_ode_block

from anode_exp.composition import jobs
from anode_exp.data import Augmentation, EpochBatches, Normalisation, Split
from anode_exp.gradient import GRADIENT_MODES
from anode_exp.models import MODELS
from anode_exp.train import train
from anode_exp.training.train_step import autocast_for, train_step

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("mode", GRADIENT_MODES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_never_waits_for_the_device(mode, precision):
    device = torch.device("cuda")
    network = MODELS["squeezenext"](10, make_ode_block(mode)).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    images = torch.randint(0, 256, (64, 32, 32, 3), dtype=torch.uint8, device=device)
    split = Split(images, torch.arange(64, device=device) % 10)
    normalise = Normalisation([0.5] * 3, [0.25] * 3, device)
    batches = iter(EpochBatches(split, 16, Augmentation(4, True), normalise, 0, 1))
    train_step(network, optimizer, autocast_for(precision, device), *next(batches))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            train_step(network, optimizer, autocast_for(precision, device), *batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mode", sorted(set(GRADIENT_MODES) - {"reverse_adjoint", "stored_adjoint"}))
def test_exact_modes_agree_in_float64(mode):
    def gradient(mode):
        torch.manual_seed(0)
        network = MODELS["squeezenext"](10, make_ode_block(mode, "rk4", 3)).double().cuda()
        network(images).square().sum().backward()
        return torch.cat([p.grad.flatten() for p in network.parameters()])

    images = torch.randn(4, 3, 32, 32, dtype=torch.float64, device="cuda")
    ours, exact = gradient(mode), gradient("full_backprop")
    assert (ours - exact).norm() <= 1e-12 * exact.norm()


def test_a_run_measures_the_allocators_peak(tmp_path):
    settings = ["dataset=digits", "model=squeezenext", "recipe.epochs=1", "runtime.device=cuda"]
    results = train(jobs(settings, multirun=False).configs[0], tmp_path)
    assert results["status"] == "completed" and results["peak_memory_kind"] == "cuda_max_allocated"
    assert results["reserved_memory_bytes"] >= results["peak_memory_bytes"] > results["dataset_bytes"]


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_run_stays_within_its_budget(tmp_path, share):
    """The allocator's peak, data set included, within 10 % of the predicted one."""
    settings = ["dataset=digits", "model=squeezenext", "solver=rk2", "solver.n_steps=8", "recipe.max_steps=6",
                "recipe.batch_size=128", "runtime.device=cuda"]  # fmt: skip

    def peak(name, *overrides):
        return train(jobs([*settings, *overrides], multirun=False).configs[0], tmp_path / name)["peak_memory_bytes"]

    most, least = peak("most", "gradient=full_backprop"), peak("least", "gradient=revolve", "gradient.unit=stage")
    budget = int(least + share * (most - least))
    used = peak("budget", "gradient=budget", f"gradient.memory={budget}")
    plan = json.loads((tmp_path / "budget" / "plan.json").read_text())
    assert used <= budget and used == pytest.approx(plan["predicted_bytes"], rel=0.1)


def test_adaptive_steps(tmp_path):
    settings = ["dataset=digits", "model=squeezenext", "solver=dopri5", "solver.adaptive=true", "recipe.max_steps=3",
                "gradient=reverse_adjoint", "runtime.device=cuda"]  # fmt: skip
    results = train(jobs(settings, multirun=False).configs[0], tmp_path / "run")
    assert results["nfe"]["accepted"] > 0 and results["nfe"]["backward_accepted"] > 0
