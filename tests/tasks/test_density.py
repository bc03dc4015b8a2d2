"""The density task: its batches, its metrics, and a run of it."""

import json
import logging
import math

import pytest
import torch
from conftest import interrupted_and_resumed, trained_to_the_end

from anode_exp.build import Assembly, autocast_for
from anode_exp.config.compose import composed
from anode_exp.data.densities import DensityData, load_density
from anode_exp.gradient import StageCheckpoint
from anode_exp.models import OdeBlock
from anode_exp.models.normalizing_flow import FlowField, NormalizingFlow
from anode_exp.ode import SOLVERS, TimeGrid
from anode_exp.records.checkpoints import Checkpoints
from anode_exp.records.run_record import RunRecord
from anode_exp.tasks.density import NOISE, Density, DensityBatches
from anode_exp.training.peak_memory import PeakMemory
from anode_exp.training.signals import StopRequest
from anode_exp.training.step import evaluate
from anode_exp.training.trainer import Trainer

CPU = torch.device("cpu")


def data(train=50):
    return load_density("eight_gaussians", train_size=train, validation_size=20, test_size=30).to(CPU, torch.float64)


def flow(n_steps=2, hidden=(8, 8)):
    torch.manual_seed(0)
    field = FlowField(2, hidden).double()
    return NormalizingFlow([OdeBlock(field, SOLVERS["rk4"](), TimeGrid(n_steps), StageCheckpoint())])


def test_every_pass_has_all_samples_once_and_epochs_differ():
    batches = DensityBatches(data(), 16, "exact", seed=3, steps_per_epoch=8)
    first, again, second = (list(batches.epoch(n).starting_at(0)) for n in (1, 1, 2))
    assert len(batches.epoch(1)) == len(first) == 8
    assert [len(x) for (x,) in first] == [16, 16, 16, 2] * 2
    passes = [torch.cat([x for (x,) in first[i : i + 4]]) for i in (0, 4)]
    for samples in passes:
        assert torch.equal(samples.sort(0).values, data().train.sort(0).values)
    assert not torch.equal(*passes)
    assert all(torch.equal(a, b) for (a,), (b,) in zip(first, again, strict=True))
    assert not torch.equal(first[0][0], second[0][0])
    assert len(DensityBatches(data(), 16, "exact", seed=3).epoch(1)) == 4


@pytest.mark.parametrize("trace", ["gaussian", "rademacher"])
def test_noise_belongs_to_a_step_and_is_the_same_after_a_resume(trace):
    epoch = DensityBatches(data(), 16, trace, seed=3, steps_per_epoch=8).epoch(1)
    whole = list(epoch.starting_at(0))
    for (x, noise), (y, other) in zip(whole[5:], epoch.starting_at(5), strict=True):
        assert torch.equal(x, y) and torch.equal(noise, other)
    assert len({float(noise[0, 0]) for _, noise in whole}) > (1 if trace == "rademacher" else 7)
    assert all(x.shape == noise.shape and x.dtype == noise.dtype for x, noise in whole)


def test_noise_has_mean_0_and_variance_1():
    draw = torch.Generator().manual_seed(0)
    for make in (NOISE["gaussian"], NOISE["rademacher"]):
        noise = make(torch.Size([20_000, 2]), draw, torch.zeros(1))
        assert noise.mean().abs() < 0.03 and abs(float(noise.var()) - 1) < 0.03


def test_metrics_of_a_whole_split_do_not_depend_on_the_batches(caplog):
    network, autocast = flow(n_steps=8), autocast_for("fp32", CPU)
    batches = DensityBatches(data(), 16, "gaussian", seed=3)
    task = Density(offset=2.0)
    found = evaluate(network, autocast, task, batches.evaluation("test", 30))
    parts = evaluate(network, autocast, task, batches.evaluation("test", 7))
    truth = 2.0 - float(network.log_prob(data().test).mean())
    assert found["nll"] == pytest.approx(truth, rel=1e-12)
    assert found["loss"] == pytest.approx(2.0 - float(network(data().test).detach().mean()), rel=1e-12)
    assert found["step_error"] == pytest.approx(found["loss"] - found["nll"], abs=1e-12)
    assert parts["nll"] == pytest.approx(found["nll"], abs=1e-4)  # adaptive steps depend on the batch
    assert parts["loss"] == pytest.approx(found["loss"], rel=1e-12)
    loss, _ = task.loss(network, (data().test,))
    assert loss.item() == pytest.approx(found["loss"], rel=1e-12)
    assert not caplog.records


def test_steps_whose_errors_matter_are_warned_of(caplog):
    network = flow(n_steps=1)
    network.blocks[0].solver = SOLVERS["euler"]()
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(4.0)
    with caplog.at_level(logging.WARNING):
        metrics = evaluate(
            network, autocast_for("fp32", CPU), Density(), DensityBatches(data(), 16, "exact", 0).evaluation("test", 30)
        )
    assert abs(metrics["step_error"]) > 0.05
    (record,) = caplog.records
    assert "by accurate ones" in record.message and "solver.n_steps" in record.message


def trainer_in(directory, *overrides, resume_after=None):
    config = composed(
        [
            "recipe.batch_size=16",
            "recipe.lr=0.03",
            "recipe.milestones=[]",
            "recipe.test_batch_size=30",
            *overrides,
        ]
    )
    network = flow()
    assembly = Assembly(
        config, CPU, torch.contiguous_format, Density(), DensityBatches(data(), 16, "gaussian", config.seed), network,
        torch.optim.Adam(network.parameters()), autocast_for("fp32", CPU),
    )  # fmt: skip
    return Trainer(
        assembly,
        PeakMemory(CPU, assembly.data.nbytes),
        RunRecord(directory, config, resume_after),
        Checkpoints(directory / "checkpoints"),
        StopRequest(),
    )


def test_a_run_learns_and_continues_to_the_same_bits(tmp_path):
    def make(directory, **keywords):
        return trainer_in(directory, "recipe.epochs=4", **keywords)

    whole = trained_to_the_end(make(tmp_path / "whole"))
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["test_nll"] < lines[0]["test_nll"] - 0.1
    assert lines[-1]["validation_loss"] - lines[-1]["validation_nll"] == lines[-1]["validation_step_error"]
    assert whole.progress.best_score == min(line["validation_nll"] for line in lines)
    # 4 steps and the end of the first epoch, and 2 steps
    begun, resumed = interrupted_and_resumed(make, tmp_path / "parts", 7)
    assert begun.status == "interrupted"
    for ours, theirs in zip(resumed.network.parameters(), whole.network.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_step_that_overflows_is_a_diverged_run(tmp_path):
    trainer = trainer_in(tmp_path, "recipe.epochs=2")
    with torch.no_grad():
        for p in trainer.network.parameters():
            p.fill_(math.inf)
    while trainer.advance():
        pass
    assert trainer.status == "diverged"


def test_an_offset_moves_loss_and_score_alike():
    x = torch.zeros(3, 2, dtype=torch.float64)
    plain, moved = (Density(offset).loss(flow(), (x,))[0] for offset in (0.0, 5.0))
    assert (moved - plain).item() == pytest.approx(5.0)
    assert DensityData(x, x, x, 5.0).to(CPU, torch.float32).offset == 5.0
