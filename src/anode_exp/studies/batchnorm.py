"""What one set of running statistics for all times of a solve costs in test accuracy, epoch by epoch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from anode_exp.config import read_config, typed
from anode_exp.errors import UserError
from anode_exp.evaluate import evaluated
from anode_exp.training.checkpoints import Checkpoints
from anode_exp.training.records import read_metrics


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


def both_ways(directory: Path, epoch: int, calibrate: int, device: str) -> dict[str, Any]:
    """Test accuracy of one kept epoch's network with statistics by time and with one set.

    Those that the run kept while it trained are as recorded; the others are estimated anew from training batches.

    Returns:
        Accuracies in [0, 1]: ``by_time``; ``one_set_kept``, None where the run kept statistics by time;
        ``one_set_anew``, from the same number of batches as those by time; ``train_accuracy``, of the epoch's batches
        by their own statistics.
    """
    config = typed(read_config(directory))
    config = replace(config, runtime=replace(config.runtime, device=device))
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
