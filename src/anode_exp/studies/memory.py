"""Peak bytes and time of a training step of each gradient mode."""

import gc
import statistics
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from anode_exp.budget.measure import Planner
from anode_exp.build import autocast_for, build_optimizer, placed, varied
from anode_exp.config.check import parse_bytes
from anode_exp.config.schema import StudyConfig, TrainConfig
from anode_exp.models import ode_blocks, take_evaluations
from anode_exp.records.reading import Row
from anode_exp.studies.peers import PEERS
from anode_exp.tasks.classification import Classification
from anode_exp.tasks.task import Batch, Task
from anode_exp.training.graphed_step import CudaCapture, GraphedStep, capture_of
from anode_exp.training.peak_memory import allocator_of, peak_while
from anode_exp.training.progress import bar
from anode_exp.training.step import state_tensors, train_step
from anode_exp.training.streams import seconds_of

LEARNING_RATE = 1e-4  # small, so that weights stay finite

LEAST_REPEATS = 3
"""Least number of timed steps of each network, however long they take."""


def peaks_and_times(
    networks: dict[str, nn.Module],
    batch: Batch,
    precision: str,
    repeats: int,
    tick: Callable[[], object],
    new_capture: Callable[[], CudaCapture] | None = None,
    task: Task | None = None,
    eager: Collection[str] = (),
    longest: float | None = None,
) -> Iterator[Row]:
    """A row for each network: peak bytes, median seconds per step, and the median of its ratios to the first's.

    The networks take their timed steps in turn, so that a change of the machine's speed affects all of them.

    ``counted_bytes`` are live tensor bytes, on any device; ``cuda_bytes`` the allocator's largest figure above what was
    allocated before, None without CUDA. Both count weights, gradients and momentum of that network only, and the batch.
    ``device_bytes`` is all the memory in use on the device after the step, by any process, with CUDA's context and what
    the allocator has in reserve: the figure of NVML, which PNODE reports. None without CUDA.

    Args:
        new_capture: makes recordings, whose replays are timed, as in runs on CUDA. None times eager steps.
        eager: labels of networks whose steps cannot be recorded.
        longest: seconds after which the remaining turns are left out, once ``LEAST_REPEATS`` are taken.
        task: gives the loss of the steps; by default classification.
    """
    device, task = batch[0].device, task or Classification()
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
        counted = peak_while(partial(step, label), own.copy, None)
        evaluations = take_evaluations(network)
        cuda_bytes = device_bytes = None
        if allocator is not None:
            optimizers[label].zero_grad()
            allocator.empty_cache()
            cuda_bytes = peak_while(partial(step, label), own.copy, allocator)
            free, total = torch.cuda.mem_get_info(device)
            device_bytes = total - free
        nfe = {f"nfe_{way}": sum(getattr(e, way) for e in evaluations) for way in ("forward", "backward")}
        peaks[label] = {"counted_bytes": counted, "cuda_bytes": cuda_bytes, "device_bytes": device_bytes, **nfe}
        optimizers[label].zero_grad()
        tick()

    timed: dict[str, Callable[[], object]] = {label: partial(step, label) for label in networks}
    if new_capture is not None:
        for label, network in ((k, n) for k, n in networks.items() if k not in eager):
            graphed = GraphedStep(network, optimizers[label], autocast, task, new_capture)
            timed[label] = partial(graphed, batch)
            for _ in range(2):
                graphed(batch)

    seconds: dict[str, list[float]] = {label: [] for label in networks}
    for taken in range(repeats):
        spent = sum(map(sum, seconds.values()))
        if longest is not None and spent > longest and taken >= LEAST_REPEATS:
            break
        for label in networks:
            seconds[label].append(seconds_of(timed[label], device))
            optimizers[label].zero_grad()
            tick()
    first = next(iter(networks))
    for label in networks:
        ratios = [a / b for a, b in zip(seconds[label], seconds[first], strict=True)]
        times = {"step_time_s": statistics.median(seconds[label]), "time_ratio": statistics.median(ratios)}
        times["turns"] = len(seconds[label])
        yield {"gradient": label, **peaks[label], **times}


def rows(config: TrainConfig, study: StudyConfig, outputs: int, batch: Batch, directory: Path) -> Iterator[Row]:
    images, labels = batch
    precision, new_capture = config.runtime.precision, capture_of(config, images.device)
    peers = [label for label, gradient in study.gradients.items() if gradient.baseline is not None]
    grids = [("n_steps", n) for n in study.n_steps] + [("blocks_per_stage", n) for n in study.blocks_per_stage]
    with bar(len(grids) * len(study.gradients) * (1 + study.repeats), study.name) as progress:
        for axis, value in grids:
            networks: dict[str, nn.Module] = {}
            for label, gradient in study.gradients.items():
                network = varied(config, gradient, outputs, **{axis: value})
                networks[label], layout = placed(network, config, images.device)
                on_device = (images.contiguous(memory_format=layout), labels)
                if gradient.memory is not None:
                    _plan(networks[label], config, on_device, parse_bytes(gradient.memory), new_capture)
                if gradient.baseline is not None:
                    for block in ode_blocks(networks[label]):
                        block.gradient = PEERS[gradient.baseline]()
            of_blocks = {"blocks": sum(1 for _ in ode_blocks(networks[label])), "batch_size": len(labels)}
            fixed = {"n_steps": config.solver.n_steps, "blocks_per_stage": config.model.blocks_per_stage, **of_blocks}
            for row in peaks_and_times(
                networks,
                on_device,
                precision,
                study.repeats,
                progress.update,
                new_capture,
                None,
                peers,
                study.longest,
            ):
                solver = study.gradients[row["gradient"]].solver or config.solver.name
                yield {"varied": axis, "solver": solver, **fixed, axis: value, **row}


def _plan(
    network: nn.Module, config: TrainConfig, batch: Batch, budget: int, new_capture: Callable[[], CudaCapture] | None
) -> None:
    """Set every block's policy to the fastest plan within the budget; UserError if none fits."""
    autocast = autocast_for(config.runtime.precision, batch[0].device)
    planner = Planner(
        network.train(), lambda n: build_optimizer(n, config.recipe), autocast, Classification(), batch,
        new_capture=new_capture,
    )  # fmt: skip
    plan, _ = planner.fitted(budget)
    planner.use(plan.policies)
