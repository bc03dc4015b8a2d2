"""Peak bytes and time of a training step of each gradient mode."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anode_exp.build import autocast_for
from anode_exp.config.schema import StudyConfig, TrainConfig
from anode_exp.models import take_evaluations
from anode_exp.studies.networks import placed, varied
from anode_exp.tasks.classification import Classification
from anode_exp.tasks.task import Batch
from anode_exp.training.graphed_step import Capture, GraphedStep, capture_of
from anode_exp.training.peak_memory import LiveTensorBytes, allocator_of
from anode_exp.training.progress import bar
from anode_exp.training.step import state_tensors, train_step

LEARNING_RATE = 1e-4  # weights must stay finite, and not matter


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peaks_and_times(
    networks: dict[str, nn.Module],
    batch: Batch,
    precision: str,
    repeats: int,
    tick: Callable[[], object],
    new_capture: Callable[[], Capture] | None = None,
) -> Iterator[dict[str, Any]]:
    """A row for each network: peak bytes, median seconds a step, and the median of its ratios to the first's.

    The networks take their timed steps in turn, so that a machine whose speed drifts slows all of them.

    ``counted_bytes`` are live tensor bytes, on any device; ``cuda_bytes`` the allocator's largest figure above what was
    allocated before, None without CUDA. Both count weights, gradients and momentum of the one network, and the batch.

    Args:
        new_capture: makes recordings, whose replays are timed: so do runs on CUDA. None times eager steps.
    """
    device = batch[0].device
    task = Classification()
    autocast = autocast_for(precision, device)
    optimizers = {k: torch.optim.SGD(n.parameters(), lr=LEARNING_RATE, momentum=0.9) for k, n in networks.items()}

    def step(label: str) -> None:
        train_step(networks[label], optimizers[label], autocast, task, batch)

    allocator = allocator_of(device)
    peaks: dict[str, dict[str, Any]] = {}
    for label, network in networks.items():
        step(label)  # makes the optimiser's state
        take_evaluations(network)
        gc.collect()
        own = [*state_tensors(network, optimizers[label]), *batch]
        with LiveTensorBytes(own) as live:
            step(label)
        evaluations = take_evaluations(network)
        cuda_bytes = None
        if allocator is not None:
            optimizers[label].zero_grad()
            allocator.empty_cache()
            allocator.reset_peaks()
            others = allocator.allocated() - sum(x.nbytes for x in own)
            step(label)
            cuda_bytes = allocator.most_allocated() - others
        peaks[label] = {
            "counted_bytes": live.peak,
            "cuda_bytes": cuda_bytes,
            "nfe_forward": sum(e.forward for e in evaluations),
            "nfe_backward": sum(e.backward for e in evaluations),
        }
        optimizers[label].zero_grad()
        tick()

    recorded = {}
    if new_capture is not None:
        for label, network in networks.items():
            recorded[label] = GraphedStep(network, optimizers[label], autocast, task, new_capture)
            for _ in range(2):
                recorded[label](batch)

    seconds: dict[str, list[float]] = {label: [] for label in networks}
    for _ in range(repeats):
        for label in networks:
            _wait(device)
            started = time.perf_counter()
            if label in recorded:
                recorded[label](batch)
            else:
                step(label)
            _wait(device)
            seconds[label].append(time.perf_counter() - started)
            optimizers[label].zero_grad()
            tick()
    first = next(iter(networks))
    for label in networks:
        yield {
            "gradient": label,
            **peaks[label],
            "step_time_s": statistics.median(seconds[label]),
            "time_ratio": statistics.median(a / b for a, b in zip(seconds[label], seconds[first], strict=True)),
        }


def rows(
    config: TrainConfig, study: StudyConfig, num_classes: int, batch: tuple[Tensor, Tensor], directory: Path
) -> Iterator[dict[str, Any]]:
    images, labels = batch
    grids = [("n_steps", n) for n in study.n_steps] + [("blocks_per_stage", n) for n in study.blocks_per_stage]
    with bar(len(grids) * len(study.gradients) * (1 + study.repeats), study.name) as progress:
        for axis, value in grids:
            networks: dict[str, nn.Module] = {}
            for label, gradient in study.gradients.items():
                network = varied(config, gradient, num_classes, **{axis: value})
                networks[label], layout = placed(network, config, images.device)
            laid_out = images.contiguous(memory_format=layout)
            for row in peaks_and_times(
                networks, (laid_out, labels), config.runtime.precision, study.repeats, progress.update,
                capture_of(config, images.device),
            ):  # fmt: skip
                yield {
                    "varied": axis,
                    "n_steps": config.solver.n_steps,
                    "blocks_per_stage": config.model.blocks_per_stage,
                    axis: value,
                    **row,
                }
