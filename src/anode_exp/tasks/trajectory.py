"""Fitting a trajectory: states at given times, one solve through all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from anode_exp.data import TrajectoryData
from anode_exp.tasks.task import Batch, Sums


class TrajectoryFit:
    """Batches are initial states [B, d], later states [B, T, d], and times [B, T + 1], beginning with the initial one.

    Errors are those of scaled states, means over times and components: of |ŷ − y| (``mae``) or (ŷ − y)² (``mse``).
    Times stay on the CPU, where steps are chosen.

    Args:
        kind: the loss, mae or mse.
    """

    score, higher_is_better, form, unit = "mae", False, ".3e", "trajectories"

    def __init__(self, kind: str = "mae") -> None:
        self.kind = kind

    def loss(self, network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        states = network(batch[0], batch[2][0])
        error = states - batch[1]
        return (error.abs() if self.kind == "mae" else error.square()).mean(), states

    def sums(self, output: Tensor, batch: Batch) -> Sums:
        error = (output - batch[1]).flatten(1)
        return {"mae": error.abs().mean(1).sum(), "mse": error.square().mean(1).sum()}

    def zeros(self, device: torch.device) -> Sums:
        return {name: torch.zeros((), dtype=torch.float64, device=device) for name in ("mae", "mse")}

    def evaluation_sums(self, network: nn.Module, batch: Batch) -> Sums:
        sums = self.sums(network(batch[0], batch[2][0]), batch)
        return {"loss": sums[self.kind], **sums}

    def metrics(self, sums: Mapping[str, float], count: int) -> dict[str, float]:
        return {name: value / count for name, value in sums.items()}


class TrajectoryBatches:
    """All trajectories in every step.

    Args:
        steps_per_epoch: training steps in an epoch of the record.
    """

    def __init__(self, trajectories: TrajectoryData, steps_per_epoch: int) -> None:
        self.trajectories, self.steps_per_epoch = trajectories, steps_per_epoch
        self.device, self.nbytes = trajectories.device, trajectories.nbytes
        self._train = self._batch(trajectories.train, trajectories.times)

    def _batch(self, states: Tensor, times: Tensor) -> Batch:
        return states[:, 0].contiguous(), states[:, 1:].contiguous(), times.expand(len(states), -1)

    def size(self, split: str) -> int:
        return 0 if split == "validation" else len(getattr(self.trajectories, split))

    def epoch(self, number: int) -> TrajectoryBatches:
        return self

    def __len__(self) -> int:
        return self.steps_per_epoch

    def starting_at(self, step: int) -> Iterator[Batch]:
        return (self._train for _ in range(step, self.steps_per_epoch))

    def evaluation(self, split: str, batch_size: int) -> Iterator[Batch]:
        if split == "train":
            yield self._train
        else:
            yield self._batch(self.trajectories.test, self.trajectories.test_times)
