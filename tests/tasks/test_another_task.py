"""A task and data that are not images: the trainer uses only what their protocols define."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import interrupted_and_resumed, trained_to_the_end
from torch import nn

from anode_exp.build import Assembly, autocast_for, build_optimizer
from anode_exp.config.compose import composed
from anode_exp.gradient import DtoCheckpoint
from anode_exp.models import OdeBlock
from anode_exp.ode import SOLVERS, TimeGrid
from anode_exp.records.checkpoints import Checkpoints
from anode_exp.records.run_record import RunRecord
from anode_exp.training.peak_memory import PeakMemory
from anode_exp.training.signals import StopRequest
from anode_exp.training.trainer import Trainer

CPU = torch.device("cpu")


class Regression:
    """Mean squared error and mean absolute error; the lower the better."""

    score, higher_is_better, form, unit = "mse", False, ".3g", "points"

    def loss(self, network, batch):
        output = network(batch[0])
        return F.mse_loss(output, batch[1]), output

    def sums(self, output, batch):
        error = output - batch[1]
        return {"mse": error.square().mean(1).sum(), "mae": error.abs().mean(1).sum()}

    def zeros(self, device):
        return {"mse": torch.zeros((), device=device), "mae": torch.zeros((), device=device)}

    def evaluation_sums(self, network, batch):
        sums = self.sums(network(batch[0]), batch)
        return {"loss": sums["mse"], **sums}

    def metrics(self, sums, count):
        return {name: value / count for name, value in sums.items()}


class Epoch:
    def __init__(self, x, y, batch_size, number):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(number))
        self.batches = list(zip(x[order].split(batch_size), y[order].split(batch_size), strict=True))

    def __len__(self):
        return len(self.batches)

    def starting_at(self, step):
        return iter(self.batches[step:])


class Points:
    """100 points in the plane for training and 30 for testing; the target is the point turned by a right angle."""

    device = CPU
    nbytes = 130 * 2 * 2 * 4

    def __init__(self, batch_size):
        self.batch_size = batch_size
        x = torch.randn(130, 2, generator=torch.Generator().manual_seed(5))
        y = torch.stack([-x[:, 1], x[:, 0]], 1)
        self.splits = {"train": (x[:100], y[:100]), "validation": (x[:0], y[:0]), "test": (x[100:], y[100:])}

    def size(self, split):
        return len(self.splits[split][0])

    def epoch(self, number):
        return Epoch(*self.splits["train"], self.batch_size, number)

    def evaluation(self, split, batch_size):
        return iter(zip(*(part.split(batch_size) for part in self.splits[split]), strict=True))


class Linear(nn.Linear):
    def forward(self, t, y):
        return super().forward(y)


def trainer_in(directory, *overrides, resume_after=None):
    config = composed(
        [
            "recipe.batch_size=32",
            "recipe.lr=0.3",
            "recipe.momentum=0.5",
            "recipe.weight_decay=0",
            "recipe.test_batch_size=16",
            *overrides,
        ]
    )
    torch.manual_seed(0)
    network = OdeBlock(Linear(2, 2), SOLVERS["rk4"](), TimeGrid(4), DtoCheckpoint())
    assembly = Assembly(
        config, CPU, torch.contiguous_format, Regression(), Points(32), network,
        build_optimizer(network, config.recipe), autocast_for("fp32", CPU),
    )  # fmt: skip
    return Trainer(
        assembly,
        PeakMemory(CPU, assembly.data.nbytes),
        RunRecord(directory, config, resume_after),
        Checkpoints(directory / "checkpoints"),
        StopRequest(),
    )


def test_a_run_of_another_task_and_its_records(tmp_path):
    """In the end the learning rate is far too large, so that the best epoch is not the last."""
    trainer = trainer_in(tmp_path, "recipe.epochs=13", "recipe.milestones=[12]", "recipe.gamma=20")
    while trainer.advance():
        pass
    assert trainer.status == "completed"
    epochs = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    errors = [epoch["test_mse"] for epoch in epochs]
    assert min(errors) < 1e-3 < errors[0] and errors[-1] > min(errors)
    for epoch in epochs:
        assert epoch["train_mse"] == pytest.approx(epoch["train_loss"], rel=1e-5)
        assert epoch["test_mse"] == pytest.approx(epoch["test_loss"])
        assert epoch["test_mse"] >= epoch["test_mae"] ** 2 and epoch["points_per_s"] > 0
    progress = trainer.progress
    assert progress.best_score == progress.best_test_score == min(errors)
    assert progress.best_epoch == errors.index(min(errors)) + 1 < len(errors)
    best = torch.load(tmp_path / "checkpoints" / "best.pt", weights_only=True)
    assert best["progress"]["test_score"] == min(errors)


def test_interrupted_within_an_epoch_it_continues_to_the_same_weights(tmp_path):
    def make(directory, **keywords):
        return trainer_in(directory, "recipe.epochs=3", **keywords)

    whole = trained_to_the_end(make(tmp_path / "whole"))
    # 4 steps and the end of the first epoch, and a step
    begun, resumed = interrupted_and_resumed(make, tmp_path / "parts", 6)
    assert begun.status == "interrupted" and begun.progress.steps == 6
    for ours, theirs in zip(resumed.network.parameters(), whole.network.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    last = [json.loads((tmp_path / p / "metrics.jsonl").read_text().splitlines()[-1]) for p in ("parts", "whole")]
    assert len(last[0]["step_losses"]) == 4
    for key in ("epoch", "steps", "train_mse", "train_mae", "test_mse", "step_losses"):
        assert last[0][key] == last[1][key], key
