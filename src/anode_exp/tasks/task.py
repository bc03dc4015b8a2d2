"""The interface of tasks: the loss of a batch, the sums over batches, and the metrics of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, ...]
"""The tensors of one batch, each with a leading axis of the batch's size."""

Sums = dict[str, Tensor]
"""Scalars on the device, by name, that add up over batches."""


class Task(Protocol):
    """What is learned. It holds no data, and reads no tensor on the host.

    Attributes:
        score: the metric by which epochs are compared.
        higher_is_better: whether a higher score is better.
        form: how the score is written, as a format specification.
        unit: what a batch consists of, in the plural.
    """

    score: str
    higher_is_better: bool
    form: str
    unit: str

    def loss(self, network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The mean loss over the batch, to be differentiated, and the network's output."""
        ...

    def sums(self, output: Tensor, batch: Batch) -> Sums:
        """What a training step adds to its epoch's sums, from the output of ``loss``."""
        ...

    def zeros(self, device: torch.device) -> Sums:
        """The sums before the first step."""
        ...

    def evaluation_sums(self, network: nn.Module, batch: Batch) -> Sums:
        """The same for an evaluation, with the sum of the losses as ``loss``."""
        ...

    def metrics(self, sums: Mapping[str, float], count: int) -> dict[str, float]:
        """Metrics by name, from sums over ``count`` entries of batches."""
        ...


class EpochOfBatches(Protocol):
    """The training batches of one epoch, the same also in a resumed run."""

    def __len__(self) -> int: ...

    def starting_at(self, step: int) -> Iterator[Any]:
        """The batches from the given one on."""
        ...


class Data(Protocol):
    """What a task learns from, on the device: the splits ``train``, ``validation`` and ``test``; some may be empty."""

    nbytes: int
    device: torch.device

    def size(self, split: str) -> int: ...

    def epoch(self, number: int) -> EpochOfBatches:
        """The training batches of an epoch, counted from 1."""
        ...

    def evaluation(self, split: str, batch_size: int) -> Iterator[Any]:
        """A split's batches, in its order."""
        ...
