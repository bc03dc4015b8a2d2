"""A recorded run, looked at again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from anode_exp.build import build_model
from anode_exp.config import TrainConfig, read_config, typed
from anode_exp.data import DATASETS
from anode_exp.errors import UserError
from anode_exp.training.checkpoints import Checkpoints
from anode_exp.training.records import read_metrics, read_results


@dataclass(frozen=True)
class Run:
    """A run's network in evaluation mode, on the CPU, and its records.

    Attributes:
        epoch: the epoch after which the network's weights were saved.
        metrics: a dictionary an epoch, as in ``metrics.jsonl``.
        results: as in ``results.json``; None for a run that has not ended.
    """

    directory: Path
    config: TrainConfig
    network: nn.Module
    epoch: int
    metrics: list[dict[str, Any]]
    results: dict[str, Any] | None


def load_run(directory: str | Path, checkpoint: str = "best", config: TrainConfig | None = None) -> Run:
    """The network and records of a run.

    Args:
        checkpoint: ``best`` or ``last``.
        config: solve with the solver of this configuration instead of the run's own.

    Raises:
        UserError: if the directory holds no run, or the run no such checkpoint.
    """
    directory = Path(directory)
    config = typed(read_config(directory)) if config is None else config
    if checkpoint not in ("best", "last"):
        raise UserError(f"checkpoint={checkpoint}: choose one of best, last")
    state = Checkpoints(directory / "checkpoints").load(checkpoint)
    if state is None:
        raise UserError(f"{directory}: has no {checkpoint} checkpoint yet; one is saved after every epoch")
    network = build_model(config.model, config.solver, config.gradient, DATASETS[config.dataset.name][1])
    network.load_state_dict(state["network"])
    return Run(
        directory,
        config,
        network.eval(),
        state["progress"]["epochs"],
        read_metrics(directory),
        read_results(directory),
    )
