"""The records of a run: configuration, one JSON line per epoch, results, TensorBoard events, checkpoints.

A run directory holds
    config.yaml          the resolved configuration
    metrics.jsonl        one line per epoch
    results.json         written when the run ends
    checkpoints/         last.pt, previous.pt, best.pt
    train.log            the lines of the terminal
    events.out.tfevents… TensorBoard
"""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from anode_exp.config.check import read_config, typed
from anode_exp.config.describe import flat
from anode_exp.config.schema import TrainConfig
from anode_exp.errors import UserError
from anode_exp.records.claim import claim
from anode_exp.records.reading import read_metrics, write_atomically, write_json


def _finite(value: Any) -> Any:
    """Non-finite numbers as null: JSON has no NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


def _metric_tags(line: dict[str, Any]) -> list[tuple[str, str]]:
    """TensorBoard's tag and the key of each metric of a split, such as loss/train; and of samples per second."""
    tags = []
    for key in line:
        split, _, metric = key.partition("_")
        if split in ("train", "validation", "test") and metric != "time_s":
            tags.append((f"{metric}/{split}", key))
        elif key.endswith("_per_s"):
            tags.append((key, key))
    return tags


TAGS = (
    ("epoch", "epoch"), ("learning_rate", "lr"), ("peak_memory_bytes", "peak_memory_bytes"),
    ("epoch_time_s/train", "train_time_s"), ("epoch_time_s/evaluation", "evaluation_time_s"),
    ("nfe_per_step/forward", "nfe_forward"), ("nfe_per_step/backward", "nfe_backward"),
    ("adaptive_steps_per_step/accepted", "nfe_accepted"), ("adaptive_steps_per_step/rejected", "nfe_rejected"),
)  # fmt: skip
"""TensorBoard's name for each value of an epoch's line that is not a metric."""


class NoRecord:
    """Replaces ``RunRecord`` in all processes of a run except the first: writes nothing."""

    def epoch(self, line: dict[str, Any]) -> None:
        pass

    def finish(self, results: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


class RunRecord(NoRecord):
    """The open records of one run.

    Args:
        resume_after: (epochs, steps) of the checkpoint from which the run continues; later records are dropped, because
            those epochs are repeated. None starts a new run.

    Raises:
        UserError: if the directory already holds a run (when resuming: no run), is in use, or cannot be written.
    """

    def __init__(self, directory: Path, config: TrainConfig, resume_after: tuple[int, int] | None = None) -> None:
        self.directory = directory
        self.config = config
        text = OmegaConf.to_yaml(OmegaConf.structured(config))
        try:
            # Creating this folder claims the directory, even if two processes start at once.
            (directory / "checkpoints").mkdir(parents=True, exist_ok=resume_after is not None)
            self._lock = claim(directory, "run")
            metrics = directory / "metrics.jsonl"
            if resume_after is not None:
                (directory / "results.json").unlink(missing_ok=True)
                old = typed(read_config(directory)) if (directory / "config.yaml").exists() else config
                # Lines of older versions lack these two.
                had = {"gradient": old.gradient.name, "precision": old.runtime.precision}
                lines = [had | line for line in read_metrics(directory) if line["epoch"] <= resume_after[0]]
                write_atomically(metrics, "".join(json.dumps(line) + "\n" for line in lines))
            write_atomically(directory / "config.yaml", text)
            self._metrics = metrics.open("a")
        except FileExistsError as error:
            raise UserError(f"{directory}: already holds a run; choose another hydra.run.dir") from error
        except OSError as error:
            raise UserError(f"{directory}: {error.strerror}; choose a writable hydra.run.dir") from error
        # TensorBoard reads event files in the order of their names, which contain the time in seconds. Two files of one
        # second may be read in the wrong order, and the events of the later one are then purged.
        stamps = [int(file.name.split(".")[3]) for file in directory.glob("events.out.tfevents.*")]
        while int(time.time()) in stamps:
            time.sleep(0.05)
        self._events = SummaryWriter(str(directory), purge_step=None if resume_after is None else resume_after[1] + 1)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            remedy = f"make room, then continue with train resume={self.directory}"
            raise UserError(f"{self.directory}: cannot be written ({error.strerror}); {remedy}") from error

    def epoch(self, line: dict[str, Any]) -> None:
        """Append one epoch to ``metrics.jsonl`` and to TensorBoard.

        ``line`` has at least epoch, steps and step_losses. All curves in TensorBoard are over training steps, because
        resuming purges by step. UserError if it cannot be written.
        """
        with self._writing():
            self._metrics.write(json.dumps(_finite(line)) + "\n")
            self._metrics.flush()
            os.fsync(self._metrics.fileno())
        losses = line["step_losses"]
        for step, loss in enumerate(losses, line["steps"] - len(losses) + 1):
            self._events.add_scalar("train_step/loss", loss, step)
        for tag, key in (*TAGS, *_metric_tags(line)):
            if line.get(key) is not None:
                self._events.add_scalar(tag, line[key], line["steps"])
        self._events.flush()

    def finish(self, results: dict[str, Any]) -> None:
        """Write ``results.json`` and the hyperparameters, and close; UserError if they cannot be written."""
        with self._writing():
            write_json(self.directory / "results.json", _finite(results))
        settings = {k: v for k, v in flat(asdict(self.config)).items() if k != "seeds"}
        shown = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in settings.items()}
        measures = [k for k in results if k.startswith(("test_", "best_test_"))] + ["train_loss", "peak_memory_bytes"]
        numbers = {f"hparam/{k}": float(results[k]) for k in measures if results.get(k) is not None}
        # SummaryWriter.add_hparams would create another directory; this writes the same three summaries to this one.
        for summary in hparams(shown, numbers):
            self._events._get_file_writer().add_summary(summary)
        for tag, value in numbers.items():
            self._events.add_scalar(tag, value, results["steps"])
        self.close()

    def close(self) -> None:
        with suppress(OSError):  # of a line that could not be written: the run has failed because of it
            self._metrics.close()
        self._events.close()
        self._lock.close()
