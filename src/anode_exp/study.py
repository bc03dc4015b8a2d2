"""The verb ``study``: a measurement, its JSON lines, its table and its plot."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from anode_exp.budget import RESERVE, Planner
from anode_exp.build import (
    build_data,
    build_device,
    build_memory_format,
    build_model,
    build_normalisation,
    build_optimizer,
)
from anode_exp.config import GradientConfig, StudyConfig, TrainConfig, parse_bytes
from anode_exp.data import DATASETS, Normalisation, evaluation_batches
from anode_exp.evaluate import both_ways, kept_epochs
from anode_exp.models import ode_blocks
from anode_exp.ode import SolveFailed, TimeGrid, Tolerance
from anode_exp.report.study import REPORTS
from anode_exp.runs import load_run
from anode_exp.studies.evolution import kernels_over_time
from anode_exp.studies.gradient_error import flat_gradient, relative_error, split_error
from anode_exp.studies.memory import measure
from anode_exp.studies.reversibility import CASE_ROWS, cases, images_there_and_back
from anode_exp.training.checkpoints import Checkpoints
from anode_exp.training.graphed_step import Capture, CudaCapture
from anode_exp.training.progress import bar
from anode_exp.training.records import commit, device_name, versions
from anode_exp.training.streams import run_streams
from anode_exp.training.train_step import autocast_for, set_backends


def run_study(config: TrainConfig, study: StudyConfig, directory: Path) -> Path:
    """Measure, print the table, and leave everything in the folder, which is made if it is not there and returned."""
    device = build_device(config.runtime)
    set_backends(config.runtime)
    num_classes = DATASETS[config.dataset.name][1]
    of = config.model.name
    batch = None
    if study.batch_size is not None:
        normalise = build_normalisation(config.dataset, device, torch.contiguous_format)
        if study.name == "reversibility":  # pictures, to be looked at
            normalise = Normalisation([0.0] * 3, [1.0] * 3, device)
        batch = next(evaluation_batches(build_data(config.dataset, device).train, study.batch_size, normalise))
        of = f"{of}, {config.dataset.name}, batch {len(batch[1])}"
    directory.mkdir(parents=True, exist_ok=True)
    setting = {"train": config, "study": study}
    text = "".join(OmegaConf.to_yaml({k: OmegaConf.structured(v)}) for k, v in setting.items())
    (directory / "config.yaml").write_text(text)
    facts = {"device": device_name(device), "versions": versions(), "commit": commit()}
    (directory / "environment.json").write_text(json.dumps(facts, indent=2) + "\n")
    rows = {
        "batchnorm": _batchnorm,
        "budget": _budget,
        "evolution": _evolution,
        "gradient_error": _gradient_error,
        "memory": _memory,
        "reversibility": _reversibility,
    }[study.name]
    (stream,) = run_streams(device, 1)
    with torch.cuda.stream(stream), (directory / "study.jsonl").open("w") as file:
        for row in rows(config, study, num_classes, batch, directory):  # type: ignore[operator]
            file.write(json.dumps(row) + "\n")
            file.flush()
    table = REPORTS[study.name](directory)
    (directory / "table.txt").write_text(table + "\n")
    print(f"{of}, {facts['device']}\n\n{table}\n\n{directory}")
    return directory


def _network(config: TrainConfig, gradient: GradientConfig, num_classes: int, **changes: Any) -> nn.Module:
    """The network of a seed under a gradient mode; ``changes``: solver (a name), its settings, blocks_per_stage."""
    torch.manual_seed(config.seed)
    blocks = changes.pop("blocks_per_stage", config.model.blocks_per_stage)
    model = dataclasses.replace(config.model, blocks_per_stage=blocks)
    name = changes.pop("solver", config.solver.name)
    solver = dataclasses.replace(config.solver, name=name, **{"adaptive": False, **changes})
    return build_model(model, solver, gradient, num_classes)


def capture_of(config: TrainConfig, device: torch.device) -> Callable[[], Capture] | None:
    """What records the steps to be timed where runs replay them."""
    return CudaCapture if device.type == "cuda" and config.runtime.cuda_graph else None


def _memory(
    config: TrainConfig, study: StudyConfig, num_classes: int, batch: tuple[Tensor, Tensor], directory: Path
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
            for row in measure(
                networks, laid_out, labels, config.runtime.precision, study.repeats, progress.update,
                capture_of(config, images.device),
            ):  # fmt: skip
                yield {
                    "varied": varied,
                    "n_steps": config.solver.n_steps,
                    "blocks_per_stage": config.model.blocks_per_stage,
                    varied: value,
                    **row,
                }


def _budget(
    config: TrainConfig, study: StudyConfig, num_classes: int, batch: tuple[Tensor, Tensor], directory: Path
) -> Iterator[dict[str, Any]]:
    n_steps, precision = config.solver.n_steps, config.runtime.precision

    def network() -> nn.Module:
        made = _network(config, GradientConfig(name="dto_checkpoint"), num_classes)
        layout = build_memory_format(config.runtime, made, batch[0].device)
        return made.to(batch[0].device, memory_format=layout)  # type: ignore[call-overload]

    measured_network = network()
    layout = build_memory_format(config.runtime, measured_network, batch[0].device)
    images, labels = batch[0].contiguous(memory_format=layout), batch[1].clone()
    count = len(study.budgets) or 8
    with bar(Planner.dry_runs(n_steps) + count * (1 + study.repeats), study.name) as progress:
        planner = Planner(
            measured_network.train(),
            lambda n: build_optimizer(n, config.recipe),
            autocast_for(precision, batch[0].device),
            (images, labels),
            progress.update,
            new_capture=capture_of(config, images.device),
        )
        most = planner.predict(["full_backprop"] * len(planner.blocks)) + RESERVE
        least = planner.least() + RESERVE
        budgets = [parse_bytes(b) for b in study.budgets]
        budgets = budgets or [int(least * (most / least) ** (i / 7)) + (i == 7) for i in range(8)]
        planner.seconds(max(budgets))
        planner.tick = lambda: None
        plans = [(budget, *planner.fitted(budget)) for budget in budgets]
        networks: dict[str, nn.Module] = {}
        for i, (_, plan, _) in enumerate(plans):
            networks[str(i)] = network()
            for block, name in zip(ode_blocks(networks[str(i)]), plan.policies, strict=True):
                block.gradient = planner.choices[name]
        new_capture = capture_of(config, images.device)
        for row in measure(networks, images, labels, precision, study.repeats, progress.update, new_capture):
            budget, plan, dry = plans[int(row.pop("gradient"))]
            facts = {"budget_bytes": budget, "predicted_bytes": plan.predicted_bytes, "dry_step_bytes": dry}
            yield {**facts, **row, "policies": plan.policies}


def _gradient_error(
    config: TrainConfig, study: StudyConfig, num_classes: int, batch: tuple[Tensor, Tensor], directory: Path
) -> Iterator[dict[str, Any]]:
    images, labels = batch[0].double(), batch[1]
    settings: list[dict[str, Any]] = [{"solver": s, "n_steps": n} for s in study.solvers for n in study.n_steps]
    each_its_own = config.model.evolution != "none" and config.model.evolution_coupling == "joint"
    settings += [
        {"solver": s, "adaptive": True, "rtol": tolerance, "atol": tolerance}
        for s in (() if each_its_own else study.adaptive_solvers)  # weights that change with the step: fixed steps
        for tolerance in study.tolerances
    ]
    states: dict[int | None, dict[str, Tensor] | None] = {None: None}
    if study.run is not None:
        names = [study.checkpoint]
        if study.checkpoint == "every":
            names = ["0", *map(str, Checkpoints(Path(study.run) / "checkpoints").epochs())]
            own = config.solver
            settings = [{"solver": own.name, "n_steps": own.n_steps}]
            if own.adaptive:
                settings = [{"solver": own.name, "adaptive": True, "rtol": own.rtol, "atol": own.atol}]
        runs = [load_run(study.run, name) for name in names]
        states = {run.epoch: run.network.state_dict() for run in runs}
    modes = {
        "full_backprop": GradientConfig(name="full_backprop"),
        "stored_adjoint": GradientConfig(name="stored_adjoint"),
    }
    with bar(len(states) * len(settings) * len(study.gradients), study.name) as progress:
        for epoch, weights in states.items():
            for setting in settings:

                def gradient(mode: GradientConfig, setting: dict[str, Any] = setting, weights: Any = weights) -> Tensor:
                    network = _network(config, mode, num_classes, **setting)
                    if weights is not None:
                        network.load_state_dict(weights)
                    return flat_gradient(network.to(images.device).double(), images, labels)

                row = {
                    "epoch": epoch,
                    "solver": setting["solver"],
                    "n_steps": setting.get("n_steps"),
                    "tolerance": setting.get("rtol"),
                }
                try:
                    exact, stored = (gradient(modes[name]) for name in modes)
                except SolveFailed as error:
                    yield {**row, "gradient": "full_backprop", "relative_error": None, "reason": str(error)}
                    progress.update(len(study.gradients))
                    continue
                for label, mode in study.gradients.items():
                    mine: dict[str, Any] = {**row, "gradient": label}
                    try:
                        g = stored if mode == modes["stored_adjoint"] else gradient(mode)
                    except SolveFailed as error:
                        yield {**mine, "relative_error": None, "reason": str(error)}
                    else:
                        if mode.name == "reverse_adjoint":
                            mine |= split_error(g, stored, exact)
                        yield {**mine, "relative_error": relative_error(g, exact)}
                    progress.update()


def _batchnorm(
    config: TrainConfig, study: StudyConfig, num_classes: int, batch: None, directory: Path
) -> Iterator[dict[str, Any]]:
    runs = [(folder, kept_epochs(folder)) for folder in map(Path, (study.run or "").split(","))]
    with bar(sum(len(epochs) for _, epochs in runs), study.name) as progress:
        for folder, epochs in runs:
            for epoch in epochs:
                yield both_ways(folder, epoch, study.calibrate, config)
                progress.update()


def _evolution(
    config: TrainConfig, study: StudyConfig, num_classes: int, batch: None, directory: Path
) -> Iterator[dict[str, Any]]:
    assert study.run is not None
    kernels = {}
    for row, kernel in kernels_over_time(load_run(study.run, study.checkpoint).network):
        kernels[f"{row['block']}.{row['convolution']}"] = kernel.numpy()
        yield row
    np.savez_compressed(directory / "kernels.npz", **kernels)  # type: ignore[arg-type]


def _reversibility(
    config: TrainConfig, study: StudyConfig, num_classes: int, batch: tuple[Tensor, Tensor], directory: Path
) -> Iterator[dict[str, Any]]:
    images = batch[0]
    n = config.solver.n_steps
    grids: dict[str, tuple[str, TimeGrid | Tolerance, TimeGrid | Tolerance]] = {
        f"{config.solver.name}, {n} steps": (config.solver.name, TimeGrid(n), TimeGrid(n, 1.0, 0.0))
    }
    limits = {"max_evaluations": 100_000, "min_step": 1e-9}
    for solver in study.adaptive_solvers:
        for tol in study.tolerances:
            there, back = (Tolerance(tol, tol, t0, 1.0 - t0, **limits) for t0 in (0.0, 1.0))  # type: ignore[arg-type]
            grids[f"{solver}, adaptive {tol:g}"] = (solver, there, back)
    pictures = {"input": images}
    with bar(CASE_ROWS * study.cases + 4 * len(grids), study.name) as progress:
        for row, found in images_there_and_back(images, study.weight_std, config.seed, grids):
            for name, tensor in found.items():
                pictures[f"{row['activation']}|{row['solver']}|{name}"] = tensor
            yield row
            progress.update()
        np.savez_compressed(directory / "images.npz", **{k: v.cpu().numpy() for k, v in pictures.items()})  # type: ignore[arg-type]
        if study.cases:
            yield from cases(progress.update)
