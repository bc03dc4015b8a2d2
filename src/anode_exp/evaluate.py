"""The verb ``evaluate``: a trained network's accuracy, under its own or another solver, steps and data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from anode_exp.build import (
    build_augmentation,
    build_data,
    build_device,
    build_memory_format,
    build_normalisation,
    evaluation_batch_size,
)
from anode_exp.config import TrainConfig, read_config, typed
from anode_exp.data import DATASETS, EpochBatches, evaluation_batches
from anode_exp.errors import UserError
from anode_exp.json_lines import append_line
from anode_exp.models import TimedBatchNorm, take_evaluations
from anode_exp.ode import SolveFailed
from anode_exp.runs import load_run
from anode_exp.training.checkpoints import Checkpoints
from anode_exp.training.progress import bar
from anode_exp.training.records import read_metrics
from anode_exp.training.train_step import autocast_for, evaluate, set_backends


def evaluate_run(
    directory: Path, checkpoint: str, configs: list[TrainConfig], calibrate: int = 0
) -> list[dict[str, Any]]:
    """Loss and accuracy on the test images under every configuration; appended to ``evaluations.jsonl``.

    Args:
        calibrate: training batches from which to estimate the norms' running statistics anew; 0 takes the run's own.

    Raises:
        UserError: if the run has no such checkpoint, or its network does not fit the data set or solver.
    """
    rows = []
    for config in configs:
        rows.append(evaluated(directory, checkpoint, config, calibrate))
        append_line(directory / "evaluations.jsonl", rows[-1])
    return rows


def evaluated(
    directory: Path, checkpoint: str, config: TrainConfig, calibrate: int = 0, show: bool = True
) -> dict[str, Any]:
    """One row of ``evaluate_run``, recorded nowhere; ``show`` draws a progress bar."""
    trained = typed(read_config(directory))
    if trained.model.block == "residual" and (config.solver.name, config.solver.n_steps) != ("euler", 1):
        raise UserError(f"{directory}: has residual blocks, which are one Euler step; no other solver fits them")
    if trained.model.statistics == "by_time" and config.model.statistics != "by_time" and not calibrate:
        raise UserError(
            f"model.statistics={config.model.statistics}: this run has by_time, which is not a single set; "
            "estimate one from training batches with calibrate=50"
        )
    if DATASETS[config.dataset.name][1] != DATASETS[trained.dataset.name][1]:
        raise UserError(
            f"dataset={config.dataset.name}: has {DATASETS[config.dataset.name][1]} classes, this run's network "
            f"{DATASETS[trained.dataset.name][1]}; choose a data set of as many"
        )
    run = load_run(directory, checkpoint, config)
    device = build_device(config.runtime)
    set_backends(config.runtime)
    images = build_data(config.dataset, device)
    memory_format = build_memory_format(config.runtime, run.network, device)
    network = run.network.to(device, memory_format=memory_format)  # type: ignore[call-overload]
    size = evaluation_batch_size(config, device)
    normalise = build_normalisation(config.dataset, device, memory_format)
    autocast = autocast_for(config.runtime.precision, device)
    augmentation = build_augmentation(config.dataset)
    epoch = EpochBatches(images.train, config.recipe.batch_size, augmentation, normalise, config.seed, 1)
    batches: Iterable[tuple[Tensor, Tensor]] = evaluation_batches(images.test, size, normalise)
    total = -(-len(images.test) // size)
    name = config.solver.describe()
    try:
        if calibrate:
            calibrate_norms(network, autocast, islice(epoch, calibrate))
        loss, accuracy = evaluate(network, autocast, bar(total, name, iterable=batches) if show else batches)
    except SolveFailed as error:
        raise UserError(f"{directory}, {name}: {error}") from error
    return {
        "checkpoint": checkpoint,
        "epoch": run.epoch,
        "dataset": config.dataset.name,
        "images": len(images.test),
        "solver": config.solver.name,
        "n_steps": None if config.solver.adaptive else config.solver.n_steps,
        "statistics": config.model.statistics + (f", {calibrate} batches anew" if calibrate else ""),
        "nfe": sum(e.forward for e in take_evaluations(network)) // total,
        "test_loss": loss,
        "test_accuracy": accuracy,
    }


def kept_epochs(directory: Path) -> list[int]:
    """The epochs of a run whose networks were kept.

    Raises:
        UserError: if there are none, or the run's f has no BatchNorm of several times.
    """
    config = typed(read_config(directory))
    if config.model.block != "ode" or config.model.field_norm != "batch":
        raise UserError(
            f"{directory}: has no BatchNorm in ODE blocks; give a run with model.field_norm=batch, block=ode"
        )
    epochs = Checkpoints(directory / "checkpoints").epochs()
    if not epochs:
        raise UserError(f"{directory}: kept no epochs; train with runtime.keep_every=1")
    return epochs


def both_ways(directory: Path, epoch: int, calibrate: int, here: TrainConfig) -> dict[str, Any]:
    """Test accuracy of one kept epoch's network with statistics by time and with one set.

    Those that the run kept while it trained are as recorded; the others are estimated anew from training batches.

    Args:
        here: its device and its folder of data are used.

    Returns:
        Accuracies in [0, 1]: ``by_time``; ``one_set_kept``, None where the run kept statistics by time;
        ``one_set_anew``, from the same number of batches as those by time; ``train_accuracy``, of the epoch's batches
        by their own statistics.
    """
    config = typed(read_config(directory))
    config = replace(
        config,
        runtime=replace(config.runtime, device=here.runtime.device),
        dataset=replace(config.dataset, root=here.dataset.root, download=here.dataset.download),
    )
    (recorded,) = [line for line in read_metrics(directory) if line["epoch"] == epoch]
    by_time = config.model.statistics == "by_time"

    def anew(statistics: str) -> float:
        changed = replace(config, model=replace(config.model, statistics=statistics))
        return float(evaluated(directory, str(epoch), changed, calibrate, show=False)["test_accuracy"])

    return {
        "run": directory.name,
        "model": config.model.name,
        "solver": config.solver.describe(),
        "statistics": config.model.statistics,
        "epoch": epoch,
        "train_loss": recorded["train_loss"],
        "train_accuracy": recorded["train_accuracy"],
        "by_time": recorded["test_accuracy"] if by_time else anew("by_time"),
        "one_set_kept": None if by_time else recorded["test_accuracy"],
        "one_set_anew": anew("forward"),
    }


@torch.no_grad()
def calibrate_norms(
    network: nn.Module, autocast: Callable[[], torch.autocast], batches: Iterable[tuple[Tensor, Tensor]]
) -> None:
    """Set every BatchNorm's running statistics to the mean over its evaluations of those that training would use."""
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [m.momentum for m in norms]
    calls: Counter[nn.Module] = Counter()

    def weigh(norm: nn.Module, _: Any) -> None:
        calls[norm] += 1
        norm.momentum = 1 / calls[norm]  # type: ignore[assignment]

    hooks = [m.register_forward_pre_hook(weigh) for m in norms if not isinstance(m, TimedBatchNorm)]
    timed = [m for m in norms if isinstance(m, TimedBatchNorm)]
    for m in timed:
        m.momentum = None
        m.row_weight.zero_()
    network.train()
    for images, _ in batches:
        with autocast():
            network(images)
    network.eval()
    for hook in hooks:
        hook.remove()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    for m in timed:
        m.row_weight.clamp_(max=1.0)
    take_evaluations(network)


def table(rows: list[dict[str, Any]]) -> str:
    shown_rows = [{**row, "test_accuracy": f"{row['test_accuracy']:.2%}"} for row in rows]
    return tabulate(shown_rows, headers="keys", floatfmt=".4f")
