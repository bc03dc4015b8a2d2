"""The verb ``study``: a measurement, its JSON lines, its table and its plot."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from anode_exp.build import build_data, build_device, build_memory_format, build_model, build_normalisation
from anode_exp.config import GradientConfig, StudyConfig, TrainConfig
from anode_exp.data import evaluation_batches
from anode_exp.report.study import REPORTS
from anode_exp.runs import load_run
from anode_exp.studies.gradient_error import relative_error
from anode_exp.studies.memory import measure
from anode_exp.training.progress import bar
from anode_exp.training.records import commit, device_name, versions
from anode_exp.training.train_step import set_float32_precision


def run_study(config: TrainConfig, study: StudyConfig) -> Path:
    """Measure, print the table, and leave everything in a folder under ``outputs/``, which is returned."""
    device = build_device(config.runtime)
    set_float32_precision(config.runtime.precision)
    images = build_data(config.dataset, device)
    normalise = build_normalisation(config.dataset, device, torch.contiguous_format)
    batch = next(evaluation_batches(images.train, study.batch_size, normalise))
    directory = Path("outputs") / f"{datetime.now():%Y-%m-%d/%H-%M-%S-%f}-{study.name}"
    directory.mkdir(parents=True)
    setting = {"train": config, "study": study}
    text = "".join(OmegaConf.to_yaml({k: OmegaConf.structured(v)}) for k, v in setting.items())
    (directory / "config.yaml").write_text(text)
    facts = {"device": device_name(device), "versions": versions(), "commit": commit()}
    (directory / "environment.json").write_text(json.dumps(facts, indent=2) + "\n")
    rows = {"memory": _memory, "gradient_error": _gradient_error}[study.name]
    with (directory / "study.jsonl").open("w") as file:
        for row in rows(config, study, images.num_classes, batch):
            file.write(json.dumps(row) + "\n")
            file.flush()
    table = REPORTS[study.name](directory)
    (directory / "table.txt").write_text(table + "\n")
    print(
        f"{config.model.name}, {config.dataset.name}, batch {len(batch[1])}, {facts['device']}\n\n"
        f"{table}\n\n{directory}"
    )
    return directory


def _network(config: TrainConfig, gradient: GradientConfig, num_classes: int, **changes: Any) -> nn.Module:
    """The network of a seed under a gradient mode; ``changes`` are n_steps, solver name or blocks_per_stage."""
    torch.manual_seed(config.seed)
    model = dataclasses.replace(
        config.model, blocks_per_stage=changes.get("blocks_per_stage", config.model.blocks_per_stage)
    )
    solver = dataclasses.replace(
        config.solver,
        n_steps=changes.get("n_steps", config.solver.n_steps),
        name=changes.get("solver", config.solver.name),
    )
    return build_model(model, solver, gradient, num_classes)


def _memory(
    config: TrainConfig, study: StudyConfig, num_classes: int, batch: tuple[Tensor, Tensor]
) -> Iterator[dict[str, Any]]:
    images, labels = batch
    grids = [("n_steps", n) for n in study.n_steps] + [("blocks_per_stage", n) for n in study.blocks_per_stage]
    with bar(len(grids) * len(study.gradients) * (1 + study.repeats), study.name) as progress:
        for varied, value in grids:
            networks: dict[str, nn.Module] = {}
            for label, gradient in study.gradients.items():
                network = _network(config, gradient, num_classes, **{varied: value})
                layout = build_memory_format(config.runtime, network, images.device)
                networks[label] = network.to(images.device, memory_format=layout)  # type: ignore[call-overload]
            laid_out = images.contiguous(memory_format=layout)
            for row in measure(networks, laid_out, labels, config.runtime.precision, study.repeats, progress.update):
                yield {
                    "varied": varied,
                    "n_steps": config.solver.n_steps,
                    "blocks_per_stage": config.model.blocks_per_stage,
                    varied: value,
                    **row,
                }


def _gradient_error(
    config: TrainConfig, study: StudyConfig, num_classes: int, batch: tuple[Tensor, Tensor]
) -> Iterator[dict[str, Any]]:
    images, labels = batch[0].double(), batch[1]
    weights = None if study.run is None else load_run(study.run, study.checkpoint).network.state_dict()

    def network(gradient: GradientConfig, **changes: Any) -> nn.Module:
        made = _network(config, gradient, num_classes, **changes)
        if weights is not None:
            made.load_state_dict(weights)
        return made.to(images.device).double()

    exact = GradientConfig(name="full_backprop")
    with bar(len(study.solvers) * len(study.n_steps) * len(study.gradients), study.name) as progress:
        for solver in study.solvers:
            for n in study.n_steps:
                for label, gradient in study.gradients.items():
                    ours, truth = (network(g, solver=solver, n_steps=n) for g in (gradient, exact))
                    error = relative_error(ours, truth, images, labels)
                    yield {"solver": solver, "n_steps": n, "gradient": label, "relative_error": error}
                    progress.update()
