"""Tests that need a CUDA device; skipped without one."""

import json
from functools import partial

import pytest
import torch
from conftest import IMAGE_MODES, make_ode_block

from anode_exp.build import autocast_for, build_data
from anode_exp.commands.bench import bench_entries
from anode_exp.commands.together import train, train_together
from anode_exp.config.compose import jobs
from anode_exp.config.studies import study
from anode_exp.data import Augmentation, EpochBatches, Normalisation, Split
from anode_exp.errors import UserError
from anode_exp.models import MODELS
from anode_exp.studies.bench import _contestant
from anode_exp.studies.study import run_study
from anode_exp.studies.throughput import time_in_turn
from anode_exp.tasks.classification import Classification
from anode_exp.training.graphed_step import GraphedStep
from anode_exp.training.step import set_learning_rate, train_step
from anode_exp.training.streams import MOST_STREAMS, run_streams

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("mode", IMAGE_MODES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_never_waits_for_the_device(mode, precision):
    device = torch.device("cuda")
    network = MODELS["squeezenext"](10, make_ode_block(mode)).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    images = torch.randint(0, 256, (64, 32, 32, 3), dtype=torch.uint8, device=device)
    split = Split(images, torch.arange(64, device=device) % 10)
    normalise = Normalisation([0.5] * 3, [0.25] * 3, device)
    batches = iter(EpochBatches(split, 16, Augmentation(4, True), normalise, 0, 1))
    train_step(network, optimizer, autocast_for(precision, device), Classification(), next(batches))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            train_step(network, optimizer, autocast_for(precision, device), Classification(), batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mode", sorted(set(IMAGE_MODES) - {"reverse_adjoint", "stored_adjoint"}))
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


def test_the_least_budget_that_a_run_is_told_is_enough(tmp_path):
    """Measured with the run's own captured steps: it includes workspaces, copies and rounding."""
    settings = ["dataset=digits", "model=squeezenext", "solver=rk2", "solver.n_steps=2", "recipe.max_steps=12",
                "recipe.batch_size=128", "runtime.device=cuda", "gradient=budget"]  # fmt: skip
    with pytest.raises(UserError, match=r"give \d+MiB or more") as error:
        train(jobs([*settings, "gradient.memory=1MiB"], multirun=False).configs[0], tmp_path / "short")
    offered = str(error.value).partition("give ")[2].partition(" ")[0]
    results = train(jobs([*settings, f"gradient.memory={offered}"], multirun=False).configs[0], tmp_path / "run")
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert results["peak_memory_bytes"] <= plan["budget_bytes"]
    assert results["peak_memory_bytes"] == pytest.approx(plan["measured_bytes"], rel=0.001)


def test_every_default_budget_of_the_study_fits(tmp_path):
    run_study(*study("budget", ["solver.n_steps=2", "study.repeats=1", "runtime.device=cuda"]), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "study.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    for row in rows:
        assert row["dry_step_bytes"] <= row["budget_bytes"]
        assert row["cuda_bytes"] == pytest.approx(row["dry_step_bytes"], rel=0.05)


def test_bench_counts_gradients_and_kernels():
    """Weights, momentum and gradients are the least that a step holds; several seeds, each on its own stream."""
    device = torch.device("cuda")
    entries, _ = bench_entries(["dataset=digits", "model=resnet18", "recipe.batch_size=8", "compare=[seeds=1,seeds=2]"])
    images = build_data(entries[0][1].dataset, device)
    contestants = [_contestant(label, config, baseline, images, device) for label, config, baseline in entries]
    rows, *_ = time_in_turn(contestants, device, 2, lambda: None)
    weights = sum(x.nbytes for x in contestants[0].own()) // 3  # except buffers, a thousandth of that
    assert rows[0]["peak_bytes"] > 2.99 * weights
    assert 0 < rows[0]["kernels_per_step"] < rows[1]["kernels_per_step"]


def test_adaptive_steps(tmp_path):
    settings = ["dataset=digits", "model=squeezenext", "solver=dopri5", "solver.adaptive=true", "recipe.max_steps=3",
                "gradient=reverse_adjoint", "runtime.device=cuda"]  # fmt: skip
    results = train(jobs(settings, multirun=False).configs[0], tmp_path / "run")
    assert results["nfe"]["accepted"] > 0 and results["nfe"]["backward_accepted"] > 0


@pytest.mark.parametrize("mode", IMAGE_MODES)
def test_the_captured_step_trains_as_the_eager_one(mode):
    """Bit for bit over 50 steps with deterministic cuDNN, through a smaller batch and a change of learning rate."""
    device = torch.device("cuda")
    torch.backends.cudnn.deterministic, before = True, torch.backends.cudnn.deterministic

    def trained(graphed):
        torch.manual_seed(0)
        network = MODELS["squeezenext"](10, make_ode_block(mode)).to(device, memory_format=torch.channels_last)
        lr = torch.tensor(0.05, device=device)
        optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, fused=True)
        autocast = autocast_for("fp32", device)
        step = (
            GraphedStep(network, optimizer, autocast, Classification())
            if graphed
            else partial(train_step, network, optimizer, autocast, Classification())
        )
        generator, losses = torch.Generator().manual_seed(1), []
        for i in range(50):
            set_learning_rate(optimizer, 0.05 if i < 25 else 0.005)
            size = 12 if i % 10 == 9 else 32
            images = torch.randn(size, 3, 32, 32, generator=generator).to(device, memory_format=torch.channels_last)
            losses.append(step((images, torch.arange(size, device=device) % 10))[0].clone())
        return [*losses, *network.parameters(), *network.buffers()]

    try:
        pairs = list(zip(trained(True), trained(False), strict=True))
    finally:
        torch.backends.cudnn.deterministic = before
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_a_capture_that_fails_leaves_an_eager_run(caplog):
    """A network that reads a tensor on the host while it is captured: CUDA invalidates the capture."""
    device = torch.device("cuda")

    def read(module, inputs):
        if torch.cuda.is_current_stream_capturing():
            float(inputs[0].sum())

    def trained(graphed):
        torch.manual_seed(0)
        network = MODELS["resnet4"](10, make_ode_block("dto_checkpoint")).to(device)
        network.register_forward_pre_hook(read)
        lr = torch.tensor(0.05, device=device)
        optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9, fused=True)
        autocast = autocast_for("fp32", device)
        step = (
            GraphedStep(network, optimizer, autocast, Classification())
            if graphed
            else partial(train_step, network, optimizer, autocast, Classification())
        )
        generator = torch.Generator().manual_seed(1)
        for _ in range(4):
            step((torch.randn(16, 3, 32, 32, generator=generator).to(device), torch.arange(16, device=device) % 10))
        state = [s["momentum_buffer"] for s in optimizer.state.values()]
        return [x.cpu() for x in (*network.parameters(), *network.buffers(), *state)]

    torch.backends.cudnn.deterministic, before = True, torch.backends.cudnn.deterministic
    stream = torch.cuda.current_stream()
    try:
        with caplog.at_level("WARNING"):
            ours = trained(True)
        assert torch.cuda.current_stream() == stream
        torch.cuda.empty_cache()  # an internal error, if the allocator still expected a capture
        truth = trained(False)
    finally:
        torch.backends.cudnn.deterministic = before
    assert all(torch.equal(a, b) for a, b in zip(ours, truth, strict=True))
    assert "could not be captured" in caplog.text and "runtime.cuda_graph=false" in caplog.text


def test_a_captured_run_needs_the_eager_ones_memory_and_never_waits(tmp_path):
    settings = ["dataset=digits", "model=squeezenext", "solver=rk2", "recipe.epochs=1", "recipe.batch_size=128",
                "runtime.device=cuda"]  # fmt: skip

    def run(name, *overrides):
        return train(jobs([*settings, *overrides], multirun=False).configs[0], tmp_path / name)

    eager = run("eager", "runtime.cuda_graph=false", "runtime.sync_debug=true")
    graphed = run("graphed", "runtime.sync_debug=true")
    assert graphed["peak_memory_bytes"] == pytest.approx(eager["peak_memory_bytes"], rel=0.05)
    assert graphed["nfe"] == eager["nfe"]


def test_a_captured_run_goes_on_after_an_interruption(tmp_path):
    settings = ["dataset=digits", "model=squeezenext", "recipe.epochs=1", "recipe.batch_size=128",
                "runtime.device=cuda"]  # fmt: skip
    train(jobs(settings, multirun=False).configs[0], tmp_path / "run")
    (config,) = jobs([*settings[:2], "recipe.epochs=2", *settings[3:]], multirun=False).configs
    assert train(config, tmp_path / "run", resume=True)["epochs"] == 2


def test_a_later_run_of_the_process_has_the_memory_of_the_first(tmp_path):
    """The second run's peak has no workspaces of the first one's stream; no peak includes evaluations."""
    settings = ["dataset=digits", "model=squeezenext", "recipe.epochs=2", "recipe.batch_size=128",
                "runtime.device=cuda"]  # fmt: skip
    config = jobs(settings, multirun=False).configs[0]
    first, second = (train(config, tmp_path / name) for name in ("first", "second"))
    assert second["peak_memory_bytes"] == pytest.approx(first["peak_memory_bytes"], rel=0.005)
    (large,) = jobs([*settings, "recipe.test_batch_size=100000"], multirun=False).configs
    assert train(large, tmp_path / "large")["peak_memory_bytes"] == pytest.approx(first["peak_memory_bytes"], rel=0.005)
    assert first["reserved_memory_bytes"] < 1.6 * first["peak_memory_bytes"], "cached once: also the capture's blocks"


def test_every_run_has_a_stream_of_its_own_and_there_are_as_many_as_in_torchs_pool():
    device = torch.device("cuda")
    assert len({stream.stream_id for stream in run_streams(device, MOST_STREAMS)}) == MOST_STREAMS
    with pytest.raises(UserError, match="33 runs at once"):
        run_streams(device, MOST_STREAMS + 1)


def test_cudnn_times_its_algorithms_before_the_recording(tmp_path, caplog):
    settings = ["dataset=digits", "model=resnet10", "recipe.epochs=1", "runtime.device=cuda"]
    before = torch.backends.cudnn.benchmark
    try:
        with caplog.at_level("WARNING"):
            results = train(jobs([*settings, "runtime.cudnn_benchmark=true"], multirun=False).configs[0], tmp_path)
        assert torch.backends.cudnn.benchmark
    finally:
        torch.backends.cudnn.benchmark = before
    assert results["status"] == "completed" and "could not be captured" not in caplog.text


def test_compiled_steps_are_captured_and_the_smaller_last_batch_compiles_nothing(tmp_path, caplog):
    """With 1,280 images an epoch has whole batches only; with 1,300 it compiles the same number of graphs."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = [0]
    for size in (1280, 1300):
        settings = ["dataset=digits", f"dataset.train_size={size}", "model=resnet4", "recipe.epochs=1",
                    "runtime.device=cuda", "runtime.compile=true"]  # fmt: skip
        with caplog.at_level("WARNING"):
            results = train(jobs(settings, multirun=False).configs[0], tmp_path / str(size))
        assert results["status"] == "completed"
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert "could not be captured" not in caplog.text
    assert graphs[2] - graphs[1] == graphs[1] > 0


def test_the_speed_leaves_out_warm_up_and_recording(tmp_path):
    settings = ["dataset=digits", "model=squeezenext", "recipe.epochs=1", "recipe.batch_size=64", "runtime.device=cuda"]
    results = train(jobs(settings, multirun=False).configs[0], tmp_path)
    assert results["images_per_s"] > 1437 / results["wall_time_s"]["train"]


def test_seeds_at_once_train_as_alone(tmp_path):
    """Streams of one device: each run's losses and peak memory are the same as alone."""
    settings = ["dataset=digits", "model=squeezenext", "recipe.epochs=1", "recipe.batch_size=128",
                "runtime.device=cuda"]  # fmt: skip
    torch.backends.cudnn.deterministic, before = True, torch.backends.cudnn.deterministic
    try:
        configs = [jobs([*settings, f"seed={seed}"], multirun=False).configs[0] for seed in (0, 1)]
        alone = [train(config, tmp_path / f"alone-{config.seed}") for config in configs]
        together = train_together([(config, tmp_path / f"together-{config.seed}") for config in configs])
    finally:
        torch.backends.cudnn.deterministic = before
    for ours, truth in zip(together, alone, strict=True):
        assert ours["train_loss"] == truth["train_loss"] and ours["test_accuracy"] == truth["test_accuracy"]
        assert ours["peak_memory_bytes"] == pytest.approx(truth["peak_memory_bytes"], rel=0.1)
