"""The one training loop."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from anode_exp.config import RecipeConfig, RuntimeConfig
from anode_exp.data import Augmentation, EpochBatches, ImageData, Normalisation, Split, evaluation_batches
from anode_exp.models import take_evaluations
from anode_exp.training.peak_memory import PeakMemory
from anode_exp.training.progress import bar
from anode_exp.training.records import RunRecord
from anode_exp.training.train_step import autocast_for, evaluate, train_step

log = logging.getLogger(__name__)


@dataclass
class Outcome:
    """What a run came to; times in seconds, accuracies in [0, 1], None where nothing was measured."""

    status: str = "completed"
    epochs: int = 0
    steps: int = 0
    images: int = 0
    train_loss: float | None = None
    test_accuracy: float | None = None
    best_test_accuracy: float | None = None
    validation_accuracy: float | None = None
    best_epoch: int | None = None
    nfe: dict[str, float] = field(default_factory=dict)
    train_time_s: float = 0.0
    evaluation_time_s: float = 0.0
    first_step_s: float | None = None
    signal: int | None = None


@contextmanager
def _stop_requests(outcome: Outcome) -> Iterator[None]:
    """SIGINT and SIGTERM set ``outcome.signal``, for the loop to end after its step; a second one ends at once."""

    def request(number: int, frame: FrameType | None) -> None:
        if outcome.signal is not None:
            raise SystemExit(128 + number)
        outcome.signal = number

    try:
        before = {s: signal.signal(s, request) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread, where the interpreter allows no handlers
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def fit(
    network: nn.Module,
    images: ImageData,
    normalise: Normalisation,
    augmentation: Augmentation,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    recipe: RecipeConfig,
    runtime: RuntimeConfig,
    seed: int,
    memory: PeakMemory,
    record: RunRecord,
) -> Outcome:
    """Train until the recipe ends, the loss is no longer finite, or a signal asks to stop.

    After every epoch: evaluate, append the epoch to the record, save the ``last`` checkpoint, and ``best`` when the
    accuracy on held-out images (on test images where none are held out) is the highest so far.
    """
    device = images.train.labels.device
    autocast = autocast_for(runtime.precision, device)
    outcome = Outcome()
    best = -1.0
    total_steps = recipe.epochs * -(-len(images.train) // recipe.batch_size)
    if recipe.max_steps is not None:
        total_steps = min(total_steps, recipe.max_steps)
    network.train()
    take_evaluations(network)

    with _stop_requests(outcome):
        while outcome.steps < total_steps and outcome.status == "completed":
            outcome.epochs += 1
            lr = float(optimizer.param_groups[0]["lr"])
            started = time.perf_counter()
            batches = EpochBatches(images.train, recipe.batch_size, augmentation, normalise, seed, epoch=outcome.epochs)
            n_steps = min(len(batches), total_steps - outcome.steps)
            losses = torch.full((n_steps,), math.nan, device=device)
            correct = torch.zeros((), dtype=torch.long, device=device)
            weights: list[int] = []  # images in each step
            source = iter(batches)
            with bar(n_steps, f"epoch {outcome.epochs}/{recipe.epochs}") as progress:
                for i in range(n_steps):
                    step_started = time.perf_counter()
                    with memory.step(network, optimizer):
                        batch, labels = next(source)
                        losses[i], right = train_step(network, optimizer, autocast, batch, labels)
                        del batch
                    correct += right
                    weights.append(len(labels))
                    outcome.steps += 1
                    if outcome.first_step_s is None:
                        if device.type == "cuda":
                            torch.cuda.synchronize(device)
                        outcome.first_step_s = time.perf_counter() - step_started
                    progress.update()
                    if outcome.signal is not None:
                        outcome.status = "interrupted"
                        break
                    check = (i + 1) % runtime.check_every == 0
                    if check and not bool(losses[: i + 1].isfinite().all()):
                        outcome.status = "diverged"
                        break
                    if check or device.type == "cpu":  # a read makes the host wait for a GPU, so seldom there
                        seen = sum(weights)
                        progress.set_postfix(
                            loss=f"{float(losses[i]):.3f}",
                            acc=f"{int(correct) / seen:.1%}",
                            images_per_s=f"{seen / (time.perf_counter() - started):.0f}",
                        )
            step_losses: list[float] = losses[: len(weights)].tolist()
            train_time = time.perf_counter() - started
            evaluations = take_evaluations(network)
            outcome.nfe = {
                "forward": evaluations.forward / len(weights),
                "backward": evaluations.backward / len(weights),
            }
            outcome.train_time_s += train_time
            outcome.images += sum(weights)
            outcome.train_loss = sum(w * x for w, x in zip(weights, step_losses, strict=True)) / sum(weights)
            if not math.isfinite(outcome.train_loss):
                outcome.status = "diverged"

            line: dict[str, Any] = {
                "epoch": outcome.epochs,
                "steps": outcome.steps,
                "lr": lr,
                "train_loss": outcome.train_loss,
                "train_accuracy": int(correct) / sum(weights),
                "train_time_s": train_time,
                "images_per_s": sum(weights) / train_time,
                "peak_memory_bytes": memory.peak_bytes,
                "nfe_forward": outcome.nfe["forward"],
                "nfe_backward": outcome.nfe["backward"],
            }
            if outcome.status == "completed":
                evaluation_started = time.perf_counter()
                for name, split in (("validation", images.validation), ("test", images.test)):
                    if len(split):
                        loss, accuracy = _evaluate(network, split, name, recipe.test_batch_size, normalise, autocast)
                        line[f"{name}_loss"], line[f"{name}_accuracy"] = loss, accuracy
                take_evaluations(network)  # those of the evaluation are no training step's
                line["evaluation_time_s"] = time.perf_counter() - evaluation_started
                outcome.evaluation_time_s += line["evaluation_time_s"]
                outcome.test_accuracy = line["test_accuracy"]
                outcome.validation_accuracy = line.get("validation_accuracy")
                outcome.best_test_accuracy = max(outcome.test_accuracy or 0.0, outcome.best_test_accuracy or 0.0)
                schedule.step()
            record.epoch({**line, "step_losses": step_losses})
            log.info(_describe(line, recipe.epochs, outcome.status))

            if outcome.status == "completed":
                state = {
                    "epoch": outcome.epochs,
                    "steps": outcome.steps,
                    "test_accuracy": outcome.test_accuracy,
                    "network": network.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                }
                record.checkpoint("last", state)
                chosen_by = line.get("validation_accuracy", line["test_accuracy"])
                if chosen_by > best:
                    best, outcome.best_epoch = chosen_by, outcome.epochs
                    record.checkpoint("best", state)
    return outcome


def _evaluate(
    network: nn.Module, split: Split, name: str, batch_size: int, normalise: Normalisation, autocast: Any
) -> tuple[float, float]:
    with bar(-(-len(split) // batch_size), name) as progress:

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for batch in evaluation_batches(split, batch_size, normalise):
                yield batch
                progress.update()

        return evaluate(network, autocast, batches())


def _describe(line: dict[str, Any], epochs: int, status: str) -> str:
    parts = [
        f"epoch {line['epoch']}/{epochs}",
        f"loss {line['train_loss']:.4f}",
        f"train {line['train_accuracy']:.2%}",
    ]
    parts += [f"{s} {line[f'{s}_accuracy']:.2%}" for s in ("validation", "test") if f"{s}_accuracy" in line]
    parts += [f"lr {line['lr']:g}", f"{line['images_per_s']:.0f} images/s", f"{line['train_time_s']:.1f} s"]
    return "  ".join(parts + ([status] if status != "completed" else []))
