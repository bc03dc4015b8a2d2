"""The one training loop."""

from __future__ import annotations

import logging
import math
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from anode_exp.config.schema import RecipeConfig, RuntimeConfig
from anode_exp.data import Augmentation, EpochBatches, ImageData, Normalisation, Split, evaluation_batches
from anode_exp.errors import UserError
from anode_exp.models import take_evaluations
from anode_exp.ode import SolveFailed
from anode_exp.records.checkpoints import Checkpoints
from anode_exp.records.run_record import RunRecord
from anode_exp.training.averaging import MovingAverage
from anode_exp.training.graphed_step import GraphedStep, restart_momentum, set_learning_rate, training_step
from anode_exp.training.peak_memory import PeakMemory
from anode_exp.training.progress import bar
from anode_exp.training.signals import StopRequest
from anode_exp.training.step import autocast_for, evaluate

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a run is; times in seconds, accuracies in [0, 1], None where nothing was measured."""

    epochs: int = 0
    steps: int = 0
    images: int = 0
    train_loss: float | None = None
    test_accuracy: float | None = None
    best_test_accuracy: float | None = None
    validation_accuracy: float | None = None
    best_epoch: int | None = None
    best_score: float = -1.0
    nfe: dict[str, Any] = field(default_factory=dict)  # a step: forward, backward, and both for each block
    train_time_s: float = 0.0
    evaluation_time_s: float = 0.0
    first_step_s: float | None = None
    settling_time_s: float = 0.0  # of train_time_s and images, those of the first SETTLING_STEPS of every process
    settling_images: int = 0
    peak_memory_bytes: int = 0


SETTLING_STEPS = 2
"""Steps that pay for more than themselves: warm-up, recording a graph on CUDA, counting bytes elsewhere."""


@dataclass
class EpochPart:
    """The steps of the epoch in progress: their losses [k], correct predictions, and seconds, as in ``Progress``."""

    losses: Tensor
    correct: Tensor
    train_time_s: float = 0.0
    settling_time_s: float = 0.0
    settling_images: int = 0


def total_steps(recipe: RecipeConfig, images: int) -> int:
    """Training steps of the whole recipe on that many images."""
    steps = recipe.epochs * -(-images // recipe.batch_size)
    return steps if recipe.max_steps is None else min(steps, recipe.max_steps)


@contextmanager
def memory_for(what: str, remedy: str) -> Iterator[None]:
    """Running out of a device's memory in here is a UserError that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        traceback.clear_frames(error.__traceback__)  # they hold activations, and runs at its side go on
        raise UserError(f"{what}: out of memory ({str(error).splitlines()[0]}); {remedy}") from error


REHEARSED_STEPS = 3
"""One eager, one that records and replays a graph, and one more where an epoch's smaller batch comes between."""


SMALLER_STEP = (
    "give a smaller recipe.batch_size, a gradient mode that keeps less (gradient=step_checkpoint, gradient=revolve), "
    "or a budget (gradient=budget gradient.memory=…)"
)


class Trainer:
    """Trains until the recipe ends, the loss is no longer finite, or a signal asks to stop.

    After every epoch: evaluate, append the epoch to the record, save the ``last`` checkpoint, and ``best`` when the
    accuracy on held-out images (on test images where none are held out) is the highest so far.

    Attributes:
        status: completed, diverged or interrupted.
        reason: why it diverged, where that is known.
        progress: how far the run is.
        waited_s: seconds in which it stood still for others, no part of its times.
    """

    def __init__(
        self,
        network: nn.Module,
        images: ImageData,
        normalise: Normalisation,
        augmentation: Augmentation,
        optimizer: torch.optim.Optimizer,
        schedule: Callable[[int], float],
        recipe: RecipeConfig,
        runtime: RuntimeConfig,
        seed: int,
        memory: PeakMemory,
        record: RunRecord,
        checkpoints: Checkpoints,
        stop: StopRequest,
        evaluation_batch_size: int,
    ) -> None:
        self.network, self.images, self.normalise, self.augmentation = network, images, normalise, augmentation
        self.optimizer, self.schedule, self.recipe, self.runtime, self.seed = optimizer, schedule, recipe, runtime, seed
        self.memory, self.record, self.checkpoints, self.stop = memory, record, checkpoints, stop
        self.evaluation_batch_size = evaluation_batch_size
        self.device = images.train.labels.device
        self.autocast = autocast_for(runtime.precision, self.device)
        self.averaged = None
        if recipe.moving_average:  # a copy, made before anything is compiled
            self.averaged = MovingAverage(network, recipe.moving_average)
        size = min(recipe.batch_size, len(images.train))
        self.step = training_step(network, optimizer, self.autocast, runtime, self.device, size, recipe.label_smoothing)
        self.waited_s = 0.0
        self.status = "completed"
        self.reason: str | None = None
        self.progress = Progress()
        self._settling = SETTLING_STEPS
        self._part: EpochPart | None = None
        self.total_steps = total_steps(recipe, len(images.train))

    def state(self) -> dict[str, Any]:
        """All that a later process needs to go on as if nothing had happened."""
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
        self.progress = Progress(**state["progress"])
        self._part = None if state["epoch_part"] is None else EpochPart(**state["epoch_part"])
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

    def steps(self) -> Iterator[None]:
        """Train, pausing after every step and every epoch, for what drives this to do something else meanwhile."""
        self.network.train()
        take_evaluations(self.network)
        while self.status == "completed" and (self._part is not None or self.progress.steps < self.total_steps):
            yield from self._epoch()
            yield

    def _epoch(self) -> Iterator[None]:
        progress = self.progress
        lr = self.schedule(progress.epochs)
        set_learning_rate(self.optimizer, lr)
        if self.recipe.restart_momentum and self._part is None:
            restart_momentum(self.optimizer)
        part = yield from self._train_epoch(progress.epochs + 1)
        if self.status == "interrupted":
            self.checkpoints.save(self.state())
            return
        self._part = None
        step_losses: list[float] = part.losses.tolist()
        sizes = self._batch_sizes(len(step_losses))
        progress.epochs += 1
        progress.train_loss = sum(n * x for n, x in zip(sizes, step_losses, strict=True)) / sum(sizes)
        if not math.isfinite(progress.train_loss):
            self.status = "diverged"
        progress.train_time_s += part.train_time_s
        progress.images += sum(sizes)
        progress.settling_time_s += part.settling_time_s
        progress.settling_images += part.settling_images
        progress.peak_memory_bytes = max(progress.peak_memory_bytes, self.memory.peak_bytes)
        line: dict[str, Any] = {
            "epoch": progress.epochs,
            "steps": progress.steps,
            "lr": lr,
            "train_loss": progress.train_loss,
            "train_accuracy": int(part.correct) / sum(sizes),
            "train_time_s": part.train_time_s,
            "images_per_s": sum(sizes) / part.train_time_s,
            "peak_memory_bytes": progress.peak_memory_bytes,
            **{f"nfe_{k}": n for k, n in progress.nfe.items() if k != "blocks"},
        }
        if self.status == "completed":
            try:
                with self.memory.paused():
                    line |= self._evaluate()
            except SolveFailed as error:
                self.status, self.reason = "diverged", f"evaluation: {error}"
        self.record.epoch({**line, "step_losses": step_losses})
        log.info(_describe(line, self.recipe.epochs, self.status))
        if self.status == "completed":
            score = line.get("validation_accuracy", line["test_accuracy"])
            best = score > progress.best_score
            if best:
                progress.best_score, progress.best_epoch = score, progress.epochs
            every = self.runtime.keep_every
            keep = progress.epochs if every is not None and progress.epochs % every == 0 else None
            self.checkpoints.save(self.state(), best, keep)
            if self.stop.signal is not None and progress.steps < self.total_steps:
                self.status = "interrupted"

    @contextmanager
    def _sync_debug(self) -> Iterator[None]:
        if not self.runtime.sync_debug or self.device.type != "cuda":
            yield
            return
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def _clock(self) -> float:
        return time.perf_counter() - self.waited_s

    def _batch_sizes(self, n_steps: int) -> list[int]:
        size, n = self.recipe.batch_size, len(self.images.train)
        return [min(size, n - i * size) for i in range(n_steps)]

    def _batches(self, epoch: int) -> EpochBatches:
        return EpochBatches(
            self.images.train, self.recipe.batch_size, self.augmentation, self.normalise, self.seed, epoch
        )

    def _take(self, source: Iterator[tuple[Tensor, Tensor]], losses: Tensor, i: int) -> Tensor:
        """Step i on the next batch; its loss goes to its place, and correct predictions are returned."""
        averaged = [] if self.averaged is None else self.averaged.tensors()
        with (
            memory_for("a training step", SMALLER_STEP),
            self.memory.step(self.network, self.optimizer, averaged),
            self._sync_debug(),
        ):
            images, labels = next(source)
            losses[i], right = self.step(images, labels)
            del images
            if self.averaged is not None:
                self.averaged.update(self.network)
        return right

    def rehearse(self) -> int:
        """Peak bytes of the run's first steps, taken as it will take them: its batches, its stream, its recording.

        To be called before the run. Weights, buffers and counters are the caller's to put back; all else is.
        """
        self.memory.restart()
        batches = self._batches(1)
        source = chain.from_iterable(batches.starting_at(0) for _ in range(1 + REHEARSED_STEPS))
        losses = torch.full((max(len(batches), REHEARSED_STEPS),), math.nan, device=self.device)
        if self.runtime.cudnn_benchmark:  # the algorithms that it tries are those of the first rehearsal only
            self._take(source, losses, 0)
            self.memory.restart()
        for i in range(REHEARSED_STEPS):
            self._take(source, losses, i)
        peak = self.memory.peak_bytes
        losses.cpu()  # waits for the device: what it replays must not go before
        if isinstance(self.step, GraphedStep):
            self.step.forget()
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.state.clear()
        if self.averaged is not None:
            self.averaged.steps = 0  # the next update is a first one
        self.memory.restart()
        return peak

    def _train_epoch(self, number: int) -> Generator[None, None, EpochPart]:
        """The steps of one epoch that are still to take. ``self._part`` holds them if a request to stop interrupts."""
        progress, device = self.progress, self.device
        batches = self._batches(number)
        part, self._part = self._part, None
        taken = 0 if part is None else len(part.losses)
        n_steps = min(len(batches), taken + self.total_steps - progress.steps)
        losses = torch.full((n_steps,), math.nan, device=device)
        correct = torch.zeros((), dtype=torch.long, device=device)
        earlier, settling_time, settling_images = 0.0, 0.0, 0
        if part is not None:
            losses[:taken], correct, earlier = part.losses.to(device), part.correct.to(device), part.train_time_s
            settling_time, settling_images = part.settling_time_s, part.settling_images
        sizes = self._batch_sizes(n_steps)
        started = since = self._clock()
        end = taken
        source = batches.starting_at(taken)
        with bar(n_steps, f"epoch {number}/{self.recipe.epochs}", taken) as shown:
            for i in range(taken, n_steps):
                end = i + 1
                progress.steps += 1
                try:
                    right = self._take(source, losses, i)
                except SolveFailed as error:
                    self.status, self.reason = "diverged", str(error)
                    break
                correct += right
                if self._settling:
                    if device.type == "cuda":
                        torch.cuda.synchronize(device)
                    now = self._clock()
                    if progress.first_step_s is None:
                        progress.first_step_s = now - since
                    self._settling -= 1
                    settling_time, settling_images = settling_time + now - since, settling_images + sizes[i]
                    since = now
                shown.update()
                if self.stop.signal is not None:
                    self.status = "interrupted"
                    break
                check = end % self.runtime.check_every == 0
                if check and not bool(losses[:end].isfinite().all()):
                    self.status = "diverged"
                    break
                if check or device.type == "cpu":  # a read makes the host wait for a GPU, so seldom there
                    seen = sum(sizes[:end])
                    shown.set_postfix(
                        loss=f"{float(losses[i]):.3f}",
                        acc=f"{int(correct) / seen:.1%}",
                        images_per_s=f"{sum(sizes[taken:end]) / (self._clock() - started):.0f}",
                    )
                yield
        if end > taken:
            steps = end - taken
            blocks = [{k: n / steps for k, n in asdict(e).items()} for e in take_evaluations(self.network)]
            if not any(block["accepted"] for block in blocks):  # fixed grids have nothing to accept
                blocks = [{k: block[k] for k in ("forward", "backward")} for block in blocks]
            progress.nfe = {
                k: sum(block[k] for block in blocks) for k in (blocks[0] if blocks else ("forward", "backward"))
            }
            progress.nfe["blocks"] = blocks
        losses = losses[:end].cpu()  # waits for the device, so the time below is that of finished steps
        seconds = earlier + self._clock() - started
        done = EpochPart(losses, correct.cpu(), seconds, settling_time, settling_images)
        if self.status == "interrupted":
            self._part = done
        return done

    def _evaluate(self) -> dict[str, float]:
        """Loss and accuracy on validation images, where there are any, and on test images."""
        line: dict[str, float] = {}
        started = time.perf_counter()
        for name, split in (("validation", self.images.validation), ("test", self.images.test)):
            if len(split):
                line[f"{name}_loss"], line[f"{name}_accuracy"] = self.evaluate_split(split, name)
        take_evaluations(self.network)  # those of an evaluation are no training step's
        line["evaluation_time_s"] = time.perf_counter() - started
        progress = self.progress
        progress.evaluation_time_s += line["evaluation_time_s"]
        progress.test_accuracy = line["test_accuracy"]
        progress.validation_accuracy = line.get("validation_accuracy")
        progress.best_test_accuracy = max(progress.test_accuracy, progress.best_test_accuracy or 0.0)
        return line

    def evaluate_split(self, split: Split, name: str) -> tuple[float, float]:
        size = self.evaluation_batch_size
        batches = evaluation_batches(split, size, self.normalise)
        network = self.network if self.averaged is None else self.averaged.network
        with memory_for("evaluation", "give a smaller recipe.test_batch_size"):
            return evaluate(network, self.autocast, bar(-(-len(split) // size), name, iterable=batches))


def _describe(line: dict[str, Any], epochs: int, status: str) -> str:
    parts = [
        f"epoch {line['epoch']}/{epochs}",
        f"loss {line['train_loss']:.4f}",
        f"train {line['train_accuracy']:.2%}",
    ]
    parts += [f"{s} {line[f'{s}_accuracy']:.2%}" for s in ("validation", "test") if f"{s}_accuracy" in line]
    parts += [f"lr {line['lr']:g}", f"{line['images_per_s']:.0f} images/s", f"{line['train_time_s']:.1f} s"]
    return "  ".join(parts + ([status] if status != "completed" else []))
