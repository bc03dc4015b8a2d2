"""Training one run, or several runs at once on one device."""

import json
import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from anode_exp.budget.measure import SMALL_BATCHES, Planner
from anode_exp.budget.plan import plan_table, policies
from anode_exp.build import assemble, build_data, build_device, build_optimizer, set_backends
from anode_exp.config.check import parse_bytes
from anode_exp.config.schema import TrainConfig
from anode_exp.data import DataSet, Part, TrajectoryData
from anode_exp.errors import Ended, InUse, UserError
from anode_exp.models import count_parameters, ode_blocks, synchronise_norms
from anode_exp.records.checkpoints import Checkpoints
from anode_exp.records.environment import device_name, environment
from anode_exp.records.reading import read_results, write_json
from anode_exp.records.run_record import NoRecord, RunRecord
from anode_exp.training.graphed_step import GraphedStep
from anode_exp.training.peak_memory import PeakMemory
from anode_exp.training.progress import bar, log_to, logging_for
from anode_exp.training.signals import StopRequest, stop_requests
from anode_exp.training.streams import clear_workspaces, run_streams
from anode_exp.training.trainer import Progress, Trainer, memory_for, total_steps
from anode_exp.training.world import ALONE, World

log = logging.getLogger(__name__)

ALONE_STEPS = 3
"""Steps that each of several runs takes before the next begins: one eager, one that records a graph, one replayed."""


def train(config: TrainConfig, directory: Path, resume: bool = False) -> dict[str, Any]:
    """Train a configuration in its own directory, or continue the run that is there.

    Returns:
        The content of ``results.json``, and ``signal``: the number of the signal that interrupted the run, or None.

    Raises:
        UserError: if the data or the device are missing, or the directory already holds a run (when resuming: no run,
            or one that has ended).
    """
    return train_together([(config, directory)], resume)[0]


def train_together(
    runs: list[tuple[TrainConfig, Path]],
    resume: bool = False,
    tick: Callable[[], object] = lambda: None,
    stop: StopRequest | None = None,
    world: World = ALONE,
) -> list[dict[str, Any]]:
    """Train several runs that share a data set, one step of each in turn; on CUDA every run has its own stream.

    One small network leaves most of a GPU idle. Every run computes the same numbers as on its own. Its peak memory is
    that of its first steps, which it takes alone; its times are those of a shared device.

    Args:
        tick: called after every epoch of every run.
        stop: the request to stop; by default SIGINT and SIGTERM make it.
        world: the processes that share every batch of a single run.

    Returns:
        As ``train``, for each run. A run that has ended or that another process is writing stays unchanged. If no run
        can continue, or one fails, the error is raised after the others have ended.

    Raises:
        UserError: as ``train``, and on CUDA for more runs than ``MOST_STREAMS``.
    """
    started = time.perf_counter()
    log_to(*(directory for _, directory in runs))
    first = runs[0][0]
    device = build_device(first.runtime)
    set_backends(first.runtime)
    clear_workspaces(device)  # so that memory of an earlier job of this process does not count
    data = build_data(first.dataset, device)
    streams = run_streams(device, len(runs))
    alone = len(runs) == 1
    with ExitStack() as closing:
        asked = closing.enter_context(stop_requests()) if stop is None else stop
        todo = [
            Run(config, directory, data, stream, asked, resume, len(runs), started, world)
            for (config, directory), stream in zip(runs, streams, strict=True)
        ]
        for run in todo:
            closing.callback(run.close)
            run.go_on(run.begin)
            if world.size > 1:  # an error in one process ends all of them
                world.settle(run.error)
            # It takes its first steps alone: warm-up, capture and peak memory are then those of a single run.
            for _ in range(0 if alone else ALONE_STEPS):
                if run.go_on(run.advance):
                    tick()
            run.pause(alone)
        for run in todo:
            run.wake()
        while active := [run for run in todo if run.active]:
            for run in active:
                if run.go_on(run.advance):
                    tick()
    errors = [run.error for run in todo if run.error is not None]
    grave = [error for error in errors if not isinstance(error, Ended | InUse)]
    for error in grave or (errors if len(errors) == len(todo) else []):
        raise error
    for run in todo:
        if run.error is not None:
            log.info(str(run.error))
            run.results = {**(read_results(run.directory) or {}), "signal": None}
    return [run.results for run in todo]


@dataclass(eq=False)
class Run:
    """One of the runs of a command: begun, then advanced one step at a time. An error in it does not stop the others.

    Attributes:
        active: whether it has not ended.
        results: the content of ``results.json``, and ``signal``, once it has ended.
        error: the exception that ended it, or None.
    """

    config: TrainConfig
    directory: Path
    data: DataSet
    stream: torch.cuda.Stream | None
    stop: StopRequest
    resume: bool
    together: int
    started: float
    world: World = ALONE
    active: bool = True
    results: dict[str, Any] = field(default_factory=dict)
    error: Exception | None = None
    _paused_at: float = 0.0
    _record: NoRecord | None = None
    _trainer: Trainer | None = None

    def go_on(self, part: Callable[[], bool]) -> bool:
        """Call ``part`` on the run's stream and with its log; return whether an epoch ended. An error ends the run."""
        if not self.active:
            return False
        with logging_for(self.directory), torch.cuda.stream(self.stream):
            try:
                return part()
            except Exception as error:  # a run that fails does not stop the others
                self.active, self.error = False, error
                if self.together > 1:
                    log.error(f"{self.directory}: {error}", exc_info=not isinstance(error, UserError))
                return False

    def begin(self) -> bool:
        """Build the run from its configuration, and load its checkpoint when resuming."""
        config, directory = self.config, self.directory
        self.memory = PeakMemory(self.data.device, self.data.nbytes)
        first = self.world.rank == 0
        assembly = assemble(config, self.data, Part(self.world.rank, self.world.size))
        if self.world.size > 1 and config.model.norm_sync:
            synchronise_norms(assembly.network)
        checkpoints = Checkpoints(directory / "checkpoints", read_only=not first)
        state = checkpoints.load() if self.resume else None
        done = Progress() if state is None else Progress.of(state["progress"])
        if self.world.size > 1:
            _check_parts(config, self.data, self.world.size)
        if self.resume:
            _check_can_go_on(directory, config, state, self.data)
        self._record = NoRecord()
        if first:
            self._record = RunRecord(directory, config, (done.epochs, done.steps) if self.resume else None)
        self._trainer = trainer = Trainer(assembly, self.memory, self._record, checkpoints, self.stop, self.world)
        self._earlier_s = done.train_time_s + done.evaluation_time_s
        if config.gradient.name == "budget":
            _plan(directory, trainer, self.resume)
        if state is not None:
            trainer.restore(state)
        log.info(
            f"{config.model.name} ({config.model.block} blocks), {config.solver.describe()}, "
            f"{config.gradient.name}, {config.dataset.name} ({len(self.data.train)} {assembly.task.unit}), "
            f"seed {config.seed}, {device_name(assembly.device)}{self._processes()}\n{directory}"
        )
        if self.resume:
            log.info(f"continuing after epoch {done.epochs}, step {done.steps}")
        return False

    def _processes(self) -> str:
        return "" if self.world.size == 1 else f", {self.world.size} processes"

    def advance(self) -> bool:
        """Take one step, and finish the run after the last one; return whether an epoch has ended."""
        assert self._trainer is not None
        epochs = self._trainer.progress.epochs
        if not self._trainer.advance():
            self._finish(self._trainer)
        return self._trainer.progress.epochs > epochs

    def pause(self, alone: bool) -> None:
        """Wait while the others take their first steps."""
        if self._trainer is not None and self.active and not alone:
            self.memory.alone()
        self._paused_at = time.perf_counter()

    def wake(self) -> None:
        """End the wait, which does not count in the run's times."""
        if self._trainer is not None:
            self._trainer.waited_s += time.perf_counter() - self._paused_at

    def close(self) -> None:
        if self._trainer is not None:
            self._trainer.close()
        if self._record is not None:
            self._record.close()

    def _finish(self, trainer: Trainer) -> None:
        assert self._record is not None
        memory = {"peak_memory_kind": self.memory.kind, "reserved_memory_bytes": self.memory.reserved_bytes}
        results = {"status": trainer.status, "reason": trainer.reason, **_summary(trainer), **memory}
        results |= {"dataset_bytes": self.data.nbytes, "parameters": count_parameters(trainer.network)}
        results |= {"runs_at_once": self.together, "seed": self.config.seed, "processes": self.world.size}
        if self.world.size > 1:
            results["peak_memory_bytes_by_process"] = self.world.gather(results["peak_memory_bytes"])
            speed, size = f"{trainer.task.unit}_per_s", self.world.size  # of all processes, by this one's clock
            results[f"{speed}_by_process"] = self.world.gather(results[speed] and results[speed] / size)
        results |= environment(trainer.device)
        results["wall_time_s"]["total"] = self._earlier_s + time.perf_counter() - self.started
        self._record.finish(results)
        log.info(_table(results, trainer))
        if trainer.status == "interrupted":
            log.info(f"continue with: python -m anode_exp train resume={self.directory}")
        self.active = False
        signals = [signal for signal in self.world.gather(self.stop.signal) if signal is not None]
        self.results = {**results, "signal": signals[0] if trainer.status == "interrupted" and signals else None}


def _plan(directory: Path, trainer: Trainer, resume: bool) -> None:
    """Choose every block's policy for the byte budget, and record the plan; a resumed run keeps its plan.

    Raises UserError if no plan fits.
    """
    path, network, config = directory / "plan.json", trainer.network, trainer.assembly.config
    solver = next(ode_blocks(network)).solver
    modes = policies(config.solver.n_steps, solver)
    if resume and path.exists():
        plan = json.loads(path.read_text())
    else:
        budget = parse_bytes(str(config.gradient.memory))
        with (
            bar(Planner.dry_runs(config.solver.n_steps, solver), "planning") as progress,
            memory_for("planning", "give a gradient.memory that the device has, or a smaller recipe.batch_size"),
        ):
            # As training gives it: a density's has noise, which is part of the state. Copies, not views of all of it.
            batch = tuple(x[: max(SMALL_BATCHES)].clone() for x in next(trainer.data.epoch(1).starting_at(0)))
            new_capture = trainer.step.new_capture if isinstance(trainer.step, GraphedStep) else None
            planner = Planner(
                network.train(), lambda n: build_optimizer(n, config.recipe), trainer.assembly.autocast, trainer.task,
                batch, progress.update, trainer.assembly.batch_size, trainer.rehearse, new_capture,
            )  # fmt: skip
            chosen, measured = planner.fitted(budget)
        plan = planner.describe(chosen, budget, measured)
        write_json(path, plan)
    for block, entry in zip(ode_blocks(network), plan["blocks"], strict=True):
        block.gradient = modes[entry["policy"]]
    trainer.memory.restart()
    log.info(plan_table(plan))


def _check_parts(config: TrainConfig, data: DataSet, processes: int) -> None:
    """UserError if a process would have no sample of a batch or of a split: neither has a mean."""
    assert not isinstance(data, TrajectoryData)  # check_shared refuses it
    counts = {"the last batch of an epoch": len(data.train) % config.recipe.batch_size or processes,
              "the validation split": len(data.validation) or processes, "the test split": len(data.test)}  # fmt: skip
    for what, count in counts.items():
        if count < processes:
            remedy = "change recipe.batch_size or the sizes of dataset, or start fewer processes"
            raise UserError(f"{processes} processes need as many samples, and {what} has {count}; {remedy}")


def _check_can_go_on(directory: Path, config: TrainConfig, state: dict[str, Any] | None, data: DataSet) -> None:
    results, device = read_results(directory), data.device
    if results is not None and results["status"] == "diverged":
        raise Ended(f"{directory}: diverged after {results['steps']} steps, and would diverge again; start a new run")
    if state is None:  # stopped before its first checkpoint: it starts from the beginning
        return
    done = Progress.of(state["progress"])
    if results is not None and state["epoch_part"] is None and done.at_end_of(config.recipe, len(data.train)):
        epochs = done.epochs
        more = f"to continue, give more epochs, such as recipe.epochs={2 * epochs}"
        if done.steps < total_steps(config.recipe, len(data.train)):
            more = f"the last {done.stale} gave no better score, and recipe.stop_after={config.recipe.stop_after}"
        elif config.recipe.schedule == "cosine":
            more = "its cosine schedule ends there; start a new run for more epochs"
        raise Ended(f"{directory}: has ended after {epochs} epochs; {more}")
    if (asked := total_steps(config.recipe, len(data.train))) < done.steps:
        epochs = done.epochs + (state["epoch_part"] is not None)
        text = f"the recipe asks for {asked} steps, and this run has taken {done.steps}"
        raise UserError(f"{directory}: {text}; give at least recipe.epochs={epochs}")
    if state["device_type"] != device.type:
        why = f"this run was on {state['device_type']}; on {device.type} the same seed draws other numbers"
        raise UserError(f"{directory}: {why}; resume it on {state['device_type']}")


def _summary(trainer: Trainer) -> dict[str, Any]:
    progress = trainer.progress
    samples = progress.samples - progress.settling_samples
    rate = samples / (progress.train_time_s - progress.settling_time_s) if samples > 0 else None
    scores = {f"{k}_{trainer.task.score}": getattr(progress, f"{k}_score") for k in ("test", "best_test", "validation")}
    same = ("best_epoch", "train_loss", "epochs", "steps", "nfe", "peak_memory_bytes")
    seconds = {"train": progress.train_time_s, "evaluation": progress.evaluation_time_s}
    seconds |= {"first_step": progress.first_step_s or 0.0}
    counts = {name: getattr(progress, name) for name in same}
    return {**scores, **counts, "wall_time_s": seconds, f"{trainer.task.unit}_per_s": rate}


def _table(results: dict[str, Any], trainer: Trainer) -> str:
    def shown(x: float | None, form: str) -> str:
        return "–" if x is None else format(x, form)

    seconds, nfe, task = results["wall_time_s"], results["nfe"], trainer.task
    test, best = (shown(results[f"{which}_{task.score}"], task.form) for which in ("test", "best_test"))
    rows = [
        ("status", f"{results['status']} after {results['epochs']} epochs, {results['steps']} steps"),
        *([("reason", results["reason"])] if results["reason"] else []),
        (f"test {task.score}", f"{test} (best {best})"),
        ("training loss", shown(results["train_loss"], ".4f")),
        ("peak memory", f"{results['peak_memory_bytes'] / 1e6:,.1f} MB ({results['peak_memory_kind']})"),
        ("time", f"{seconds['train']:.1f} s training, {seconds['evaluation']:.1f} s evaluation"),
        ("speed", f"{shown(results[f'{task.unit}_per_s'], ',.0f')} {task.unit}/s"),
    ]
    if nfe:
        rows.append(("evaluations of f", f"{nfe['forward']:g} forward, {nfe['backward']:g} backward per step"))
        if nfe.get("accepted"):
            solves = f"{nfe['accepted']:g} accepted and {nfe['rejected']:g} rejected forward"
            if nfe["backward_accepted"]:
                solves += f", {nfe['backward_accepted']:g} and {nfe['backward_rejected']:g} backward"
            rows.append(("adaptive steps", f"{solves}, per training step"))
        if nfe.get("newton"):
            linear_solves = {"jacobians": "Jacobians", "linear": "products of GMRES"}
            linear = [f"{nfe[k]:g} {text}" for k, text in linear_solves.items() if nfe.get(k)]
            rows.append(("Newton iterations", ", ".join([f"{nfe['newton']:g}", *linear]) + " per step"))
    return "\n".join(f"  {name:<18}{value}" for name, value in rows)
