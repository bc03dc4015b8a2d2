"""A recorded run, looked at again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
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
        checkpoint: ``best``, ``last``, or the number of an epoch that was kept; ``0`` is the untrained network.
        config: solve with the solver of this configuration instead of the run's own.

    Raises:
        UserError: if the directory holds no run, or the run no such checkpoint.
    """
    directory = Path(directory)
    config = typed(read_config(directory)) if config is None else config
    checkpoints = Checkpoints(directory / "checkpoints")
    torch.manual_seed(config.seed)
    network = build_model(config.model, config.solver, config.gradient, DATASETS[config.dataset.name][1])
    epoch = 0
    if checkpoint != "0":
        kept = [str(epoch) for epoch in checkpoints.epochs()]
        if checkpoint not in ("best", "last", *kept):
            raise UserError(
                f"checkpoint={checkpoint}: choose one of {', '.join(('best', 'last', '0', *kept))}; "
                "train with runtime.keep_every=1 to keep more"
            )
        state = checkpoints.load(f"epoch-{checkpoint}" if checkpoint in kept else checkpoint)
        if state is None:
            raise UserError(f"{directory}: has no {checkpoint} checkpoint yet; one is saved after every epoch")
        averaged = state.get("averaged")
        network.load_state_dict(state["network"] if averaged is None else averaged["network"])
        epoch = state["progress"]["epochs"]
    return Run(
        directory,
        config,
        network.eval(),
        epoch,
        read_metrics(directory),
        read_results(directory),
    )
