"""The verb ``train``: one composed configuration to one finished run."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch

from anode_exp.build import (
    build_augmentation,
    build_data,
    build_device,
    build_model,
    build_normalisation,
    build_optimizer,
    build_schedule,
)
from anode_exp.config import TrainConfig
from anode_exp.models import count_parameters
from anode_exp.training.fit import Outcome, fit
from anode_exp.training.peak_memory import PeakMemory
from anode_exp.training.records import RunRecord, commit, device_name, versions
from anode_exp.training.train_step import set_float32_precision

log = logging.getLogger(__name__)


def train(config: TrainConfig, directory: Path) -> dict[str, Any]:
    """Run a configuration in a directory of its own.

    Returns:
        What ``results.json`` holds.

    Raises:
        UserError: if the data are missing, the device is, or the directory holds a run already.
    """
    started = time.perf_counter()
    device = build_device(config.runtime)
    set_float32_precision(config.runtime.precision)
    images = build_data(config.dataset, device)
    memory = PeakMemory(device)
    torch.manual_seed(config.seed)
    memory_format = torch.channels_last if config.runtime.channels_last else torch.contiguous_format
    network = build_model(config.model, config.solver, config.gradient, images.num_classes)
    network = network.to(device, memory_format=memory_format)  # type: ignore[call-overload]
    optimizer = build_optimizer(network, config.recipe)
    record = RunRecord(directory, config)
    log.info(
        f"{config.model.name} ({config.model.block} blocks), {config.solver.name}, {config.solver.n_steps} steps, "
        f"{config.gradient.name}, {config.dataset.name} ({len(images.train)} images), seed {config.seed}, "
        f"{device_name(device)}\n{directory}"
    )
    try:
        outcome = fit(
            network,
            images,
            build_normalisation(config.dataset, device, memory_format),
            build_augmentation(config.dataset),
            optimizer,
            build_schedule(optimizer, config.recipe),
            config.recipe,
            config.runtime,
            config.seed,
            memory,
            record,
        )
        results = {
            **_summary(outcome),
            "peak_memory_bytes": memory.peak_bytes,
            "peak_memory_kind": memory.kind,
            "reserved_memory_bytes": memory.reserved_bytes,
            "dataset_bytes": images.nbytes,
            "parameters": count_parameters(network),
            "device": device_name(device),
            "versions": versions(),
            "commit": commit(),
            "seed": config.seed,
        }
        results["wall_time_s"]["total"] = time.perf_counter() - started
        record.finish(results)
    finally:
        record.close()
    log.info(_table(config, results))
    return {**results, "signal": outcome.signal}


def _summary(outcome: Outcome) -> dict[str, Any]:
    first = outcome.first_step_s or 0.0
    # The first step pays for warm-up and, on the CPU, for counting bytes: it has a figure of its own.
    batch = outcome.images / max(outcome.steps, 1)
    after_first = outcome.train_time_s - first
    rate = (outcome.images - batch) / after_first if outcome.steps > 1 else outcome.images / outcome.train_time_s
    return {
        "status": outcome.status,
        "test_accuracy": outcome.test_accuracy,
        "best_test_accuracy": outcome.best_test_accuracy,
        "validation_accuracy": outcome.validation_accuracy,
        "best_epoch": outcome.best_epoch,
        "train_loss": outcome.train_loss,
        "epochs": outcome.epochs,
        "steps": outcome.steps,
        "wall_time_s": {
            "train": outcome.train_time_s,
            "evaluation": outcome.evaluation_time_s,
            "first_step": first,
        },
        "images_per_s": rate,
        "nfe": outcome.nfe,
    }


def _table(config: TrainConfig, results: dict[str, Any]) -> str:
    def percent(x: float | None) -> str:
        return "–" if x is None else f"{x:.2%}"

    loss = results["train_loss"]
    seconds, nfe = results["wall_time_s"], results["nfe"]
    rows = [
        ("status", f"{results['status']} after {results['epochs']} epochs, {results['steps']} steps"),
        ("test accuracy", f"{percent(results['test_accuracy'])} (best {percent(results['best_test_accuracy'])})"),
        ("training loss", "–" if loss is None else f"{loss:.4f}"),
        ("peak memory", f"{results['peak_memory_bytes'] / 1e6:,.1f} MB ({results['peak_memory_kind']})"),
        ("time", f"{seconds['train']:.1f} s training, {seconds['evaluation']:.1f} s evaluation"),
        ("speed", f"{results['images_per_s']:,.0f} images/s"),
        ("evaluations of f", f"{nfe['forward']:g} forward, {nfe['backward']:g} backward a step"),
    ]
    return "\n".join(f"  {name:<18}{value}" for name, value in rows)
