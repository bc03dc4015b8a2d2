"""Learning a density from its samples, by maximum likelihood."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from anode_exp.data.densities import DensityData
from anode_exp.data.part import WHOLE, Part
from anode_exp.tasks.task import Batch, Sums

log = logging.getLogger(__name__)

ALLOWED_STEP_ERROR = 0.05
"""Nats by which −log p with a run's own steps may differ from the accurate value before the run warns."""


class Density:
    """Batches are samples [B, d], in training with noise [B, d] if the trace is estimated.

    The loss is the mean of −log p with the run's own solver and steps, in nats. The score ``nll`` is that of adaptive
    Dormand–Prince steps at 1e-5: a flow can learn to exploit the errors of coarse steps, until its likelihood is too
    high and its density integrates to more than 1. ``step_error`` is the loss minus the score.

    Args:
        offset: nats to add, see ``DensityData``.
    """

    score, higher_is_better, form, unit = "nll", False, ".4f", "samples"

    def __init__(self, offset: float = 0.0) -> None:
        self.offset = offset

    def loss(self, network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        log_p = network(*batch)
        return self.offset - log_p.mean(), log_p

    def sums(self, output: Tensor, batch: Batch) -> Sums:
        return {}  # the loss is the only metric of training steps

    def zeros(self, device: torch.device) -> Sums:
        return {}

    def evaluation_sums(self, network: nn.Module, batch: Batch) -> Sums:
        """``loss`` and ``nll``, both with the exact trace."""
        by_steps, accurate = network(batch[0]), cast(Any, network).log_prob(batch[0])
        return {name: (self.offset - x.double()).sum() for name, x in (("loss", by_steps), ("nll", accurate))}

    def metrics(self, sums: Mapping[str, float], count: int) -> dict[str, float]:
        metrics = {name: value / count for name, value in sums.items()}
        if metrics:
            metrics["step_error"] = metrics["loss"] - metrics["nll"]
            if abs(metrics["step_error"]) > ALLOWED_STEP_ERROR:
                log.warning(
                    f"−log p is {metrics['loss']:.3f} by the run's own steps, {metrics['nll']:.3f} by accurate ones: "
                    "the flow has learned the errors of its steps; train with more steps, such as twice solver.n_steps"
                )
        return metrics


NOISE: dict[str, Callable[[torch.Size, torch.Generator, Tensor], Tensor] | None] = {
    "exact": None,
    "gaussian": lambda shape, generator, like: torch.randn(
        shape, generator=generator, dtype=like.dtype, device=like.device
    ),
    "rademacher": lambda shape, generator, like: (
        torch.randint(0, 2, shape, generator=generator, dtype=like.dtype, device=like.device) * 2 - 1
    ),
}
"""Name of a trace in training → its noise: normal, or ±1 with equal probability."""


def _generator(device: torch.device, *what: int) -> torch.Generator:
    """A separate generator for each tuple of numbers."""
    return torch.Generator(device).manual_seed(int(np.random.SeedSequence(what).generate_state(1)[0]))


class DensityEpoch:
    """Training batches of an epoch: all samples, in an order that depends only on (seed, epoch, pass).

    A step's noise, for the trace and for the samples, depends only on (seed, epoch, step), so a run that is resumed
    within the epoch has the same noise.
    """

    def __init__(
        self, data: DensityData, batch_size: int, steps: int, trace: str, seed: int, number: int, part: Part = WHOLE
    ) -> None:
        self.part = part
        self.data, self.batch_size, self.steps, self.noise = data, batch_size, steps, NOISE[trace]
        self.seed, self.number = seed, number

    def __len__(self) -> int:
        return self.steps

    def starting_at(self, step: int) -> Iterator[Batch]:
        n, device = len(self.data.train), self.data.device
        per_pass = -(-n // self.batch_size)
        order, of_pass = None, -1
        for i in range(step, self.steps):
            if i // per_pass != of_pass:
                of_pass = i // per_pass
                order = torch.randperm(
                    n, generator=_generator(device, self.seed, self.number, 0, of_pass), device=device
                )
            assert order is not None
            start = i % per_pass * self.batch_size
            yield self._batch(order[start : start + self.batch_size], i)

    def _batch(self, chosen: Tensor, step: int) -> Batch:
        """A method, not part of the generator, which would hold its tensors while the network trains."""
        if self.data.quantised is None:
            x = self.data.train[chosen]
        else:
            without, of_noise = self.data.quantised
            generator = _generator(without.device, self.seed, self.number, 2, step)
            noise = torch.rand(
                len(chosen), len(of_noise), generator=generator, dtype=without.dtype, device=without.device
            )
            x = without[chosen] + noise @ of_noise
        mine = self.part.of(len(x))  # noise is drawn for the whole batch, so that each process has its part of it
        if self.noise is None:
            return (x[mine],)
        return x[mine], self.noise(x.shape, _generator(x.device, self.seed, self.number, 1, step), x)[mine]


class DensityBatches:
    """Shuffled training batches of a density's samples, and its other splits as they are.

    Args:
        trace: exact, gaussian or rademacher, in training; evaluations are exact.
        seed: of orders and noise.
        steps_per_epoch: training steps in an epoch of the record; by default one pass over the samples.
        part: this process's part of every batch and of the evaluated splits.
    """

    def __init__(
        self,
        data: DensityData,
        batch_size: int,
        trace: str,
        seed: int,
        steps_per_epoch: int | None = None,
        part: Part = WHOLE,
    ) -> None:
        self.part = part
        self.data, self.batch_size, self.trace, self.seed = data, batch_size, trace, seed
        self.steps_per_epoch = steps_per_epoch or -(-len(data.train) // batch_size)
        self.device, self.nbytes = data.device, data.nbytes

    def size(self, split: str) -> int:
        return len(getattr(self.data, split))

    def epoch(self, number: int) -> DensityEpoch:
        settings = (self.batch_size, self.steps_per_epoch, self.trace, self.seed, number, self.part)
        return DensityEpoch(self.data, *settings)

    def evaluation(self, split: str, batch_size: int) -> Iterator[Batch]:
        samples: Tensor = getattr(self.data, split)
        return ((x,) for x in samples[self.part.of(len(samples))].split(batch_size))
