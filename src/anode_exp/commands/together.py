"""The verb ``train``: one composed configuration to one finished run."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from anode_exp.budget.measure import SMALL_BATCHES, Planner
from anode_exp.budget.plan import plan_table, policies
from anode_exp.build import (
    build_augmentation,
    build_data,
    build_device,
    build_memory_format,
    build_model,
    build_normalisation,
    build_optimizer,
    build_schedule,
    evaluation_batch_size,
)
from anode_exp.config.check import parse_bytes
from anode_exp.config.schema import TrainConfig
from anode_exp.data import ImageData, evaluation_batches
from anode_exp.errors import Ended, InUse, UserError
from anode_exp.models import count_parameters, ode_blocks
from anode_exp.records.checkpoints import Checkpoints
from anode_exp.records.environment import commit, device_name, versions
from anode_exp.records.reading import read_results, write_atomically
from anode_exp.records.run_record import RunRecord
from anode_exp.training.graphed_step import GraphedStep
from anode_exp.training.peak_memory import PeakMemory
from anode_exp.training.progress import bar, log_to, logging_for
from anode_exp.training.signals import StopRequest, stop_requests
from anode_exp.training.step import set_backends
from anode_exp.training.streams import clear_workspaces, run_streams
from anode_exp.training.trainer import Progress, Trainer, memory_for, total_steps

log = logging.getLogger(__name__)


ALONE_STEPS = 3
"""Steps that each of several runs takes before the next begins: one eager, one that records a graph, one replayed."""


def train(config: TrainConfig, directory: Path, resume: bool = False) -> dict[str, Any]:
    """Run a configuration in a directory of its own, or go on with the run that is there.

    Returns:
        What ``results.json`` holds, and ``signal``: the number of the one that interrupted, or None.

    Raises:
        UserError: if the data are missing, the device is, or the directory holds a run already (to resume: none, or
            one that has ended).
    """
    return train_together([(config, directory)], resume)[0]


def train_together(
    runs: list[tuple[TrainConfig, Path]],
    resume: bool = False,
    tick: Callable[[], object] = lambda: None,
    stop: StopRequest | None = None,
) -> list[dict[str, Any]]:
    """Several runs that share a data set, a step of each in turn; on CUDA every run has a stream of its own.

    Networks this small leave most of a GPU idle. Every run computes what it would alone, and its peak memory is that of
    its first steps, which it takes alone; its times are those of a shared device.

    Args:
        tick: called after every epoch of every run.
        stop: what asks to stop; by default SIGINT and SIGTERM do.

    Returns:
        As ``train``, for each run. A run that has ended or that another process is writing stays as it is; if none can
        go on, or one fails, that is raised when the others are through.

    Raises:
        UserError: as ``train``, and on CUDA for more runs than ``MOST_STREAMS``.
    """
    started = time.perf_counter()
    log_to(*(directory for _, directory in runs))
    first = runs[0][0]
    device = build_device(first.runtime)
    set_backends(first.runtime)
    clear_workspaces(device)  # an earlier job of this process, failed perhaps, is no part of this one's memory
    images = build_data(first.dataset, device)
    streams = run_streams(device, len(runs))
    results: dict[Path, dict[str, Any]] = {}
    errors: dict[Path, Exception] = {}
    epochs: dict[Path, int] = {}
    active: list[tuple[Path, Generator[Trainer, None, dict[str, Any]], Any]] = []

    def advance(directory: Path, run: Generator[Trainer, None, dict[str, Any]], stream: Any) -> Trainer | None:
        with logging_for(directory), torch.cuda.stream(stream):
            try:
                before = epochs.get(directory)
                trainer = next(run)
                epochs[directory] = trainer.progress.epochs
                if before not in (None, epochs[directory]):
                    tick()
                return trainer
            except StopIteration as end:
                results[directory] = {
                    **end.value,
                    "signal": asked.signal if end.value["status"] == "interrupted" else None,
                }
            except Exception as error:  # a run that fails does not stop the others
                errors[directory] = error
                if len(runs) > 1:
                    log.error(f"{directory}: {error}", exc_info=not isinstance(error, UserError))
            return None

    with ExitStack() as closing:
        asked = closing.enter_context(stop_requests()) if stop is None else stop
        waiting = []
        for (config, directory), stream in zip(runs, streams, strict=True):
            memory = PeakMemory(device, images.nbytes)
            run = _run(config, directory, images, memory, asked, resume, len(runs), started)
            closing.callback(run.close)
            # Its first steps alone: warm-up, recording, and memory are then what they are without the others.
            trainer = advance(directory, run, stream)
            for _ in range(ALONE_STEPS - 1 if len(runs) > 1 else 0):
                trainer = trainer and advance(directory, run, stream)
            if trainer is not None:
                if len(runs) > 1:
                    trainer.memory.alone()
                waiting.append((trainer, time.perf_counter()))
                active.append((directory, run, stream))
        for trainer, since in waiting:
            trainer.waited_s += time.perf_counter() - since
        while active:
            active = [entry for entry in active if advance(*entry) is not None]
    grave = [e for e in errors.values() if not isinstance(e, Ended | InUse)]
    for error in grave or ([] if results else list(errors.values())):
        raise error
    for directory, error in errors.items():
        log.info(str(error))
        results[directory] = {**(read_results(directory) or {}), "signal": None}
    return [results[directory] for _, directory in runs]


def _run(
    config: TrainConfig,
    directory: Path,
    images: ImageData,
    memory: PeakMemory,
    stop: StopRequest,
    resume: bool,
    together: int,
    started: float,
) -> Generator[Trainer, None, dict[str, Any]]:
    """One run, a step at a time."""
    device = images.train.labels.device
    torch.manual_seed(config.seed)
    network = build_model(config.model, config.solver, config.gradient, images.num_classes)
    memory_format = build_memory_format(config.runtime, network, device)
    network = network.to(device, memory_format=memory_format)  # type: ignore[call-overload]
    optimizer = build_optimizer(network, config.recipe)

    checkpoints = Checkpoints(directory / "checkpoints")
    state = checkpoints.load() if resume else None
    done = Progress() if state is None else Progress(**state["progress"])
    if resume:
        _check_can_go_on(directory, config, state, images)
    record = RunRecord(directory, config, (done.epochs, done.steps) if resume else None)
    try:
        trainer = Trainer(
            network,
            images,
            build_normalisation(config.dataset, device, memory_format),
            build_augmentation(config.dataset),
            optimizer,
            build_schedule(config.recipe),
            config.recipe,
            config.runtime,
            config.seed,
            memory,
            record,
            checkpoints,
            stop,
            evaluation_batch_size(config, device),
        )
        if config.gradient.name == "budget":
            _plan(config, directory, trainer, resume)
        if state is not None:
            trainer.restore(state)
        log.info(
            f"{config.model.name} ({config.model.block} blocks), {config.solver.describe()}, "
            f"{config.gradient.name}, {config.dataset.name} ({len(images.train)} images), seed {config.seed}, "
            f"{device_name(device)}\n{directory}"
        )
        if resume:
            log.info(f"going on after epoch {done.epochs}, step {done.steps}")
        for _ in trainer.steps():
            yield trainer
        results = {
            "status": trainer.status,
            "reason": trainer.reason,
            **_summary(trainer.progress),
            "peak_memory_kind": memory.kind,
            "reserved_memory_bytes": memory.reserved_bytes,
            "dataset_bytes": images.nbytes,
            "parameters": count_parameters(network),
            "device": device_name(device),
            "runs_at_once": together,
            "versions": versions(),
            "commit": commit(),
            "seed": config.seed,
        }
        earlier = done.train_time_s + done.evaluation_time_s
        results["wall_time_s"]["total"] = earlier + time.perf_counter() - started
        record.finish(results)
    finally:
        record.close()
    log.info(_table(results))
    if trainer.status == "interrupted":
        log.info(f"go on with: python -m anode_exp train resume={directory}")
    return results


def _plan(config: TrainConfig, directory: Path, trainer: Trainer, resume: bool) -> None:
    """Choose every block's policy for the byte budget, and record it; a resumed run keeps the one it had.

    Raises:
        UserError: if nothing fits.
    """
    path, network = directory / "plan.json", trainer.network
    modes = policies(config.solver.n_steps)
    if resume and path.exists():
        plan = json.loads(path.read_text())
    else:
        size = min(config.recipe.batch_size, len(trainer.images.train))
        budget = parse_bytes(str(config.gradient.memory))
        with (
            bar(Planner.dry_runs(config.solver.n_steps), "planning") as progress,
            memory_for("planning", "give a smaller gradient.memory, which the device holds, or recipe.batch_size"),
        ):
            planner = Planner(
                network.train(),
                lambda n: build_optimizer(n, config.recipe),
                trainer.autocast,
                next(evaluation_batches(trainer.images.train, max(SMALL_BATCHES), trainer.normalise)),
                progress.update,
                size,
                trainer.rehearse,
                trainer.step.new_capture if isinstance(trainer.step, GraphedStep) else None,
            )
            chosen, measured = planner.fitted(budget)
        plan = planner.describe(chosen, budget, measured)
        write_atomically(path, lambda partial: partial.write_text(json.dumps(plan, indent=2) + "\n"))
    for block, entry in zip(ode_blocks(network), plan["blocks"], strict=True):
        block.gradient = modes[entry["policy"]]
    trainer.memory.restart()
    log.info(plan_table(plan))


def _check_can_go_on(directory: Path, config: TrainConfig, state: dict[str, Any] | None, images: ImageData) -> None:
    results, device = read_results(directory), images.train.labels.device
    if results is not None and results["status"] == "diverged":
        raise Ended(f"{directory}: diverged after {results['steps']} steps, and would again")
    if state is None:  # stopped before its first checkpoint: from the beginning, then
        return
    steps = state["progress"]["steps"]
    if results is not None and state["epoch_part"] is None and steps >= total_steps(config.recipe, len(images.train)):
        epochs = state["progress"]["epochs"]
        more = f"to go on, give recipe.epochs={2 * epochs} or so"
        if config.recipe.schedule == "cosine":
            more = "its schedule ends there, so nothing can be added"
        raise Ended(f"{directory}: has ended after {epochs} epochs; {more}")
    if state["device_type"] != device.type:
        raise UserError(
            f"{directory}: this run was on {state['device_type']}, here is {device.type}, where the same seed draws "
            "other images; resume it on a machine of its kind"
        )


def _summary(progress: Progress) -> dict[str, Any]:
    images = progress.images - progress.settling_images
    rate = images / (progress.train_time_s - progress.settling_time_s) if images > 0 else None
    return {
        "test_accuracy": progress.test_accuracy,
        "best_test_accuracy": progress.best_test_accuracy,
        "validation_accuracy": progress.validation_accuracy,
        "best_epoch": progress.best_epoch,
        "train_loss": progress.train_loss,
        "epochs": progress.epochs,
        "steps": progress.steps,
        "wall_time_s": {
            "train": progress.train_time_s,
            "evaluation": progress.evaluation_time_s,
            "first_step": progress.first_step_s or 0.0,
        },
        "images_per_s": rate,
        "nfe": progress.nfe,
        "peak_memory_bytes": progress.peak_memory_bytes,
    }


def _table(results: dict[str, Any]) -> str:
    def shown(x: float | None, form: str) -> str:
        return "–" if x is None else format(x, form)

    seconds, nfe = results["wall_time_s"], results["nfe"]
    accuracy, best = (shown(results[k], ".2%") for k in ("test_accuracy", "best_test_accuracy"))
    rows = [
        ("status", f"{results['status']} after {results['epochs']} epochs, {results['steps']} steps"),
        *([("reason", results["reason"])] if results["reason"] else []),
        ("test accuracy", f"{accuracy} (best {best})"),
        ("training loss", shown(results["train_loss"], ".4f")),
        ("peak memory", f"{results['peak_memory_bytes'] / 1e6:,.1f} MB ({results['peak_memory_kind']})"),
        ("time", f"{seconds['train']:.1f} s training, {seconds['evaluation']:.1f} s evaluation"),
        ("speed", f"{shown(results['images_per_s'], ',.0f')} images/s"),
    ]
    if nfe:
        rows.append(("evaluations of f", f"{nfe['forward']:g} forward, {nfe['backward']:g} backward a step"))
        if nfe.get("accepted"):
            solves = f"{nfe['accepted']:g} accepted and {nfe['rejected']:g} rejected forward"
            if nfe["backward_accepted"]:
                solves += f", {nfe['backward_accepted']:g} and {nfe['backward_rejected']:g} backward"
            rows.append(("adaptive steps", f"{solves}, a training step"))
    return "\n".join(f"  {name:<18}{value}" for name, value in rows)
