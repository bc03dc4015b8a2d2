"""The one training loop."""

import logging
import math
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from typing import Any, Self

import torch
from torch import Tensor
from tqdm import tqdm

from anode_exp.build import Assembly, build_schedule, dtype_of, evaluation_batch_size
from anode_exp.config.schema import RecipeConfig
from anode_exp.errors import UserError
from anode_exp.models import take_evaluations
from anode_exp.ode import SolveFailed
from anode_exp.records.checkpoints import Checkpoints
from anode_exp.records.run_record import NoRecord
from anode_exp.tasks.task import Batch, Sums
from anode_exp.training.graphed_step import GraphedStep, sync_debug, training_step
from anode_exp.training.peak_memory import PeakMemory
from anode_exp.training.progress import bar
from anode_exp.training.signals import StopRequest
from anode_exp.training.step import MovingAverage, evaluate, restart_momentum, set_learning_rate
from anode_exp.training.streams import wait
from anode_exp.training.world import ALONE, World

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a run is; times in seconds, scores as the task defines them, None where nothing was measured."""

    epochs: int = 0
    steps: int = 0
    samples: int = 0
    train_loss: float | None = None
    test_score: float | None = None
    best_test_score: float | None = None
    validation_score: float | None = None
    best_epoch: int | None = None
    best_score: float | None = None
    lr_drops: int = 0  # of recipe.schedule=plateau
    nfe: dict[str, Any] = field(default_factory=dict)  # per step: forward, backward, and both for each block
    train_time_s: float = 0.0
    evaluation_time_s: float = 0.0
    first_step_s: float | None = None
    settling_time_s: float = 0.0  # the part of train_time_s and samples in each process's first SETTLING_STEPS
    settling_samples: int = 0
    peak_memory_bytes: int = 0
    measured: str = ""  # what the peak is of: gradient mode and precision, which may change on resume

    @classmethod
    def of(cls, saved: dict[str, Any]) -> Self:
        """From a checkpoint, including older ones, in which all runs were classifications."""
        return cls(**{_renamed(name): value for name, value in saved.items()})

    @property
    def stale(self) -> int:
        """Epochs since the best score."""
        return 0 if self.best_epoch is None else self.epochs - self.best_epoch

    def at_end_of(self, recipe: RecipeConfig, samples: int) -> bool:
        """Whether the recipe has no step left, for this number of training samples."""
        gave_up = recipe.stop_after is not None and self.stale >= recipe.stop_after
        return gave_up or self.steps >= total_steps(recipe, samples)


def _renamed(name: str) -> str:
    return name.replace("_accuracy", "_score").replace("images", "samples")


SETTLING_STEPS = 2
"""Steps that take longer than later ones: warm-up, recording a graph on CUDA, counting bytes elsewhere."""


@dataclass
class EpochPart:
    """The steps of an epoch taken so far: their losses [k], the task's sums, and seconds, as in ``Progress``."""

    losses: Tensor
    sums: Sums
    train_time_s: float = 0.0
    settling_time_s: float = 0.0
    settling_samples: int = 0

    @classmethod
    def of(cls, saved: dict[str, Any]) -> Self:
        """From a checkpoint, including older ones, in which all runs were classifications."""
        if "correct" in saved:
            saved = {**saved, "sums": {"correct": saved["correct"]}}
        return cls(**{_renamed(name): value for name, value in saved.items() if name != "correct"})


def total_steps(recipe: RecipeConfig, samples: int) -> int:
    """Training steps of the whole recipe, for this number of training samples."""
    steps = recipe.epochs * (recipe.steps_per_epoch or -(-samples // recipe.batch_size))
    return steps if recipe.max_steps is None else min(steps, recipe.max_steps)


@contextmanager
def memory_for(what: str, remedy: str) -> Iterator[None]:
    """Running out of device memory in this context is a UserError that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        traceback.clear_frames(error.__traceback__)  # they hold activations, and other runs continue
        raise UserError(f"{what}: out of memory ({str(error).splitlines()[0]}); {remedy}") from error


MOST_DROPS = 2
"""Most drops of the learning rate with recipe.schedule=plateau (FFJORD's and PNODE's code); more have no effect."""

REHEARSED_STEPS = 3
"""One eager, one that records and replays a graph, and one more in case an epoch's smaller batch comes between them."""

SMALLER_STEP = (
    "give a smaller recipe.batch_size, a gradient mode that keeps less (gradient=step_checkpoint, gradient=revolve), "
    "or a budget (gradient=budget gradient.memory=…)"
)


@dataclass
class _Epoch:
    """The epoch in progress: its ``EpochPart``, and what its next step needs. ``end`` steps have been taken.

    Attributes:
        first: number of steps that an earlier process took.
        started, since: when this process began the epoch, and when it began the step that is timed while it settles.
    """

    part: EpochPart
    source: Iterator[Batch]
    sizes: list[int]
    lr: float
    first: int
    end: int
    started: float
    since: float
    shown: "tqdm[Any]"

    @property
    def done(self) -> bool:
        return self.end == len(self.sizes)

    def count(self, start: int = 0) -> int:
        """Samples of the steps taken from ``start`` on."""
        return sum(self.sizes[start : self.end])


class Trainer:
    """Trains until the recipe ends, the loss is no longer finite, or a signal asks to stop.

    After every epoch: evaluate, append the epoch to the record, save the ``last`` checkpoint, and ``best`` when the
    score of the validation split (of the test split where there is none) is the best so far.

    Attributes:
        status: completed, diverged or interrupted.
        reason: why it diverged, if that is known.
        progress: how far the run is.
        waited_s: seconds in which it waited for others, not part of its times.
    """

    def __init__(
        self,
        assembly: Assembly,
        memory: PeakMemory,
        record: NoRecord,
        checkpoints: Checkpoints,
        stop: StopRequest,
        world: World = ALONE,
    ) -> None:
        self.assembly, self.network, self.optimizer = assembly, assembly.network, assembly.optimizer
        self.task, self.data, self.device = assembly.task, assembly.data, assembly.device
        self.recipe, self.runtime = assembly.config.recipe, assembly.config.runtime
        self.memory, self.record, self.checkpoints, self.stop = memory, record, checkpoints, stop
        self.world = world
        self.schedule = build_schedule(self.recipe)
        self.averaged = None
        if self.recipe.moving_average:  # a copy, made before anything is compiled
            self.averaged = MovingAverage(self.network, self.recipe.moving_average)
        self.step = training_step(assembly, world)
        self.waited_s = 0.0
        self.status = "completed"
        self.reason: str | None = None
        self.progress = Progress()
        self.total_steps = total_steps(self.recipe, self.data.size("train"))
        self._settling = SETTLING_STEPS
        self._epoch: _Epoch | None = None
        self._part: EpochPart | None = None  # of an epoch that an earlier process began, or that was interrupted

    def state(self) -> dict[str, Any]:
        """All that a later process needs to continue as if the run had not stopped."""
        return {
            "progress": asdict(self.progress),
            "epoch_part": None if self._part is None else vars(self._part),
            "network": self.network.state_dict(),
            "averaged": None if self.averaged is None else self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random_state": torch.get_rng_state(),
            "cuda_random_state": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "device_type": self.device.type,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.progress = Progress.of(state["progress"])
        self._part = None if state["epoch_part"] is None else EpochPart.of(state["epoch_part"])
        if self._part is not None and self.world.rank:  # the saved sums are those of all processes
            self._part.sums = {name: torch.zeros_like(x) for name, x in self._part.sums.items()}
        self.network.load_state_dict(state["network"])
        if self.averaged is not None:
            self.averaged.load_state_dict(state["averaged"])
        learning_rates = [group["lr"] for group in self.optimizer.param_groups]  # on the device, where there is one
        self.optimizer.load_state_dict(state["optimizer"])
        for group, lr in zip(self.optimizer.param_groups, learning_rates, strict=True):
            group["lr"] = lr
        torch.set_rng_state(state["random_state"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_random_state"], self.device)

    def advance(self) -> bool:
        """Take one training step, or end the epoch after its last step; False when there is nothing left to do.

        A caller that drives several runs advances the others in between.
        """
        if self._epoch is None:
            if self.status != "completed" or (self._part is None and self._finished):
                return False
            self._epoch = self._begin_epoch()
        epoch = self._epoch
        if not epoch.done:
            self._take_step(epoch)
            if self.status == "completed":
                return True
        self._epoch = None
        self._end_epoch(epoch)
        return True

    @property
    def _finished(self) -> bool:
        return self.progress.at_end_of(self.recipe, self.data.size("train"))

    def close(self) -> None:
        """Remove the progress bar of an epoch in progress from the terminal."""
        if self._epoch is not None:
            self._epoch.shown.close()

    def _begin_epoch(self) -> _Epoch:
        progress = self.progress
        self.network.train()
        take_evaluations(self.network)
        lr = self.schedule(progress.epochs) * self.recipe.gamma**progress.lr_drops
        set_learning_rate(self.optimizer, lr)
        if self.recipe.restart_momentum and self._part is None:
            restart_momentum(self.optimizer)
        batches = self.data.epoch(progress.epochs + 1)
        before, self._part = self._part, None
        taken = 0 if before is None else len(before.losses)
        n_steps = min(len(batches), taken + self.total_steps - progress.steps)
        dtype = dtype_of(self.runtime.precision)
        losses = torch.full((n_steps,), math.nan, dtype=dtype, device=self.device)
        part = EpochPart(losses, self.task.zeros(self.device))
        if before is not None:
            part.losses[:taken] = before.losses.to(self.device)
            sums = {name: x.to(self.device) for name, x in before.sums.items()}
            part = replace(before, losses=part.losses, sums=sums)
        now = self._clock()
        shown = bar(n_steps, f"epoch {progress.epochs + 1}/{self.recipe.epochs}", taken)
        size, n = self.recipe.batch_size, self.data.size("train")
        per_pass = -(-n // size)  # steps that see every sample once
        sizes = [min(size, n - i % per_pass * size) for i in range(n_steps)]
        return _Epoch(part, batches.starting_at(taken), sizes, lr, taken, taken, now, now, shown)

    def _take_step(self, epoch: _Epoch) -> None:
        """One step of the epoch; sets ``status`` if the run ends or stops with it."""
        progress, part, i = self.progress, epoch.part, epoch.end
        epoch.end += 1
        progress.steps += 1
        try:
            sums = self._step_on(epoch.source, part.losses, i, epoch.sizes[i])
        except SolveFailed as error:
            self.status, self.reason = "diverged", str(error)
            return
        for name, value in sums.items():
            part.sums[name] += value
        if self._settling:
            self._settle(epoch, i)
        epoch.shown.update()
        if self.world.any(self.stop.signal is not None):
            self.status = "interrupted"
            return
        check = epoch.end % self.runtime.check_every == 0
        if check and self.world.any(not bool(part.losses[: epoch.end].isfinite().all())):
            self.status = "diverged"
            return
        if check or self.device.type == "cpu":  # a read makes the host wait for a GPU, so it is rare there
            mine = max(1, epoch.count() // self.world.size)  # approximate: this process has a part of them
            metrics = self.task.metrics({name: float(x) for name, x in part.sums.items()}, mine)
            rate = epoch.count(epoch.first) / (self._clock() - epoch.started)
            shown = {"loss": f"{float(part.losses[i]):.3f}", **{name: f"{x:.3g}" for name, x in metrics.items()}}
            epoch.shown.set_postfix({**shown, f"{self.task.unit}_per_s": f"{rate:.0f}"}, refresh=False)

    def _settle(self, epoch: _Epoch, i: int) -> None:
        """Time one of the first steps, which take longer than later ones."""
        wait(self.device)
        now = self._clock()
        if self.progress.first_step_s is None:
            self.progress.first_step_s = now - epoch.since
        self._settling -= 1
        epoch.part.settling_time_s += now - epoch.since
        epoch.part.settling_samples += epoch.sizes[i]
        epoch.since = now

    def _end_epoch(self, epoch: _Epoch) -> None:
        """Record the epoch, or keep its part for later if a request to stop interrupted it."""
        progress, part = self.progress, epoch.part
        epoch.shown.close()
        if epoch.end > epoch.first:
            progress.nfe = self._evaluations_per_step(epoch.end - epoch.first)
        part.losses = part.losses[: epoch.end].cpu()  # waits for the device: the time is that of finished steps
        self.world.mean_([part.losses])
        self.world.sum_(part.sums.values())
        # Without model.norm_sync each process has the running statistics of its own parts: all get their mean.
        networks = [self.network] if self.averaged is None else [self.network, self.averaged.network]
        self.world.mean_(x for network in networks for x in network.buffers() if x.is_floating_point())
        part.sums = {name: x.cpu() for name, x in part.sums.items()}
        part.train_time_s += self._clock() - epoch.started
        if self.status == "interrupted":
            self._part = part
            self.checkpoints.save(self.state())
            return
        step_losses: list[float] = part.losses.tolist()
        samples = epoch.count()
        progress.epochs += 1
        progress.train_loss = sum(n * x for n, x in zip(epoch.sizes, step_losses, strict=False)) / samples
        if not math.isfinite(progress.train_loss):
            self.status = "diverged"
        progress.train_time_s += part.train_time_s
        progress.samples += samples
        progress.settling_time_s += part.settling_time_s
        progress.settling_samples += part.settling_samples
        config = self.assembly.config
        measured = f"{config.gradient}, {config.runtime.precision}"
        earlier = progress.peak_memory_bytes if progress.measured in ("", measured) else 0
        progress.peak_memory_bytes, progress.measured = max(earlier, self.memory.peak_bytes), measured
        metrics = self.task.metrics({name: float(x) for name, x in part.sums.items()}, samples)
        line: dict[str, Any] = {"epoch": progress.epochs, "steps": progress.steps, "lr": epoch.lr}
        line |= {"train_loss": progress.train_loss, **{f"train_{name}": x for name, x in metrics.items()}}
        line |= {"train_time_s": part.train_time_s, f"{self.task.unit}_per_s": samples / part.train_time_s}
        line |= {"peak_memory_bytes": progress.peak_memory_bytes}
        line |= {f"nfe_{k}": n for k, n in progress.nfe.items() if k != "blocks"}
        line |= {"gradient": config.gradient.name, "precision": config.runtime.precision}  # may change on resume
        if self.status == "completed":
            try:
                with self.memory.paused():
                    line |= self._evaluate()
            except SolveFailed as error:
                self.status, self.reason = "diverged", f"evaluation: {error}"
        self.record.epoch({**line, "step_losses": step_losses})
        log.info(self._describe(line))
        if self.status == "completed":
            self._save(line)
            if self.world.any(self.stop.signal is not None) and not self._finished:
                self.status = "interrupted"

    def _evaluations_per_step(self, steps: int) -> dict[str, Any]:
        blocks = [{k: n / steps for k, n in asdict(e).items()} for e in take_evaluations(self.network)]
        kept = {"forward", "backward"}
        if any(block["accepted"] for block in blocks):  # fixed grids have nothing to accept
            kept |= {"accepted", "rejected", "backward_accepted", "backward_rejected"}
        blocks = [{k: n for k, n in block.items() if n or k in kept} for block in blocks]
        names = dict.fromkeys(("forward", "backward", *(k for block in blocks for k in block)))
        total = {k: sum(block.get(k, 0.0) for block in blocks) for k in names}
        return {**total, "blocks": blocks}

    def _save(self, line: dict[str, Any]) -> None:
        """Save the epoch's checkpoints: ``last``, ``best`` if it is the best, and one by number if epochs are kept."""
        progress = self.progress
        score = line.get(f"validation_{self.task.score}", line[f"test_{self.task.score}"])
        best = self._better(score, progress.best_score) == score != progress.best_score
        if best:
            progress.best_score, progress.best_epoch = score, progress.epochs
        patience = self.recipe.patience
        if self.recipe.schedule == "plateau" and patience is not None and progress.lr_drops < MOST_DROPS:
            progress.lr_drops += progress.stale >= patience * (progress.lr_drops + 1)
        every = self.runtime.keep_every
        keep = progress.epochs if every is not None and progress.epochs % every == 0 else None
        self.checkpoints.save(self.state(), best, keep)

    def _better(self, score: float, other: float | None) -> float:
        if other is not None and math.isnan(score):
            return other
        return score if other is None else max(score, other) if self.task.higher_is_better else min(score, other)

    def _clock(self) -> float:
        return time.perf_counter() - self.waited_s

    def _step_on(self, source: Iterator[Batch], losses: Tensor, i: int, whole: int | None = None) -> Sums:
        """Step i on the next batch, of ``whole`` samples in all processes. Sets ``losses[i]``; returns task sums."""
        averaged = [] if self.averaged is None else self.averaged.tensors()
        with (
            memory_for("a training step", SMALLER_STEP),
            self.memory.step(self.network, self.optimizer, averaged),
            sync_debug("error") if self.runtime.sync_debug and self.device.type == "cuda" else nullcontext(),
        ):
            batch = next(source)
            losses[i], sums = self.step(batch, whole=whole)
            del batch
            if self.averaged is not None:
                self.averaged.update(self.network)
        return sums

    def rehearse(self) -> int:
        """Peak bytes of the run's first steps, taken as the run will take them: same batches, stream and recording.

        To be called before the run. The caller restores weights, buffers and counters; this method restores the rest.
        """
        self.memory.restart()
        batches = self.data.epoch(1)
        source = chain.from_iterable(batches.starting_at(0) for _ in range(1 + REHEARSED_STEPS))
        losses = torch.full((max(len(batches), REHEARSED_STEPS),), math.nan, device=self.device)
        if self.runtime.cudnn_benchmark:  # it tries algorithms in the first rehearsal only
            self._step_on(source, losses, 0)
            self.memory.restart()
        for i in range(REHEARSED_STEPS):
            self._step_on(source, losses, i)
        peak = self.memory.peak_bytes
        losses.cpu()  # waits for the device, which must not lose the graph that it replays
        if isinstance(self.step, GraphedStep):
            self.step.forget()
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.state.clear()
        if self.averaged is not None:
            self.averaged.steps = 0  # the next update counts as the first
        self.memory.restart()
        return peak

    def _evaluate(self) -> dict[str, float]:
        """The task's metrics on the validation split, if there is one, and on the test split."""
        line: dict[str, float] = {}
        started = time.perf_counter()
        for name in ("validation", "test"):
            if self.data.size(name):
                line |= {f"{name}_{metric}": x for metric, x in self.evaluate_split(name).items()}
        take_evaluations(self.network)  # those of an evaluation do not count
        line["evaluation_time_s"] = time.perf_counter() - started
        progress, score = self.progress, self.task.score
        progress.evaluation_time_s += line["evaluation_time_s"]
        progress.test_score = line[f"test_{score}"]
        progress.validation_score = line.get(f"validation_{score}")
        progress.best_test_score = self._better(progress.test_score, progress.best_test_score)
        return line

    def evaluate_split(self, name: str) -> dict[str, float]:
        size = evaluation_batch_size(self.assembly.config, self.device)
        mine = self.assembly.part.count(self.data.size(name))
        batches = bar(-(-mine // size), name, iterable=self.data.evaluation(name, size))
        network = self.network if self.averaged is None else self.averaged.network
        with memory_for("evaluation", "give a smaller recipe.test_batch_size"):
            return evaluate(network, self.assembly.autocast, self.task, batches, self.world)

    def _describe(self, line: dict[str, Any]) -> str:
        score, unit = self.task.score, self.task.unit
        parts = [f"epoch {line['epoch']}/{self.recipe.epochs}", f"loss {line['train_loss']:.4f}"]
        splits = [s for s in ("train", "validation", "test") if f"{s}_{score}" in line]
        parts += [f"{s} {line[f'{s}_{score}']:{self.task.form}}" for s in splits]
        parts += [f"lr {line['lr']:g}", f"{line[f'{unit}_per_s']:.0f} {unit}/s", f"{line['train_time_s']:.1f} s"]
        return "  ".join(parts + ([self.status] if self.status != "completed" else []))
