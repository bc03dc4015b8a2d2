"""Hydra's task: one job, alone or of a sweep. In a module of its own, for launchers that run it in other processes."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from anode_exp import composition  # noqa: F401  (registers the resolver that names jobs)
from anode_exp.config import TrainConfig, typed
from anode_exp.errors import UserError, fail

log = logging.getLogger(__name__)


def seed_runs(config: TrainConfig, directory: Path) -> list[tuple[TrainConfig, Path]]:
    """The runs that a configuration asks for: one in the directory, or one a seed, each in a folder of its own."""
    if config.seeds == 1:
        return [(config, directory)]
    seeds = range(config.seed, config.seed + config.seeds)
    return [(replace(config, seed=s, seeds=1), directory / f"{i}_seed-{s}") for i, s in enumerate(seeds)]


def run_job(config: DictConfig) -> None:
    """Train in Hydra's output directory. A failed job of a sweep is recorded and named, and the others go on."""
    from anode_exp.train import train_together  # imports torch

    hydra = HydraConfig.get()
    directory = Path(hydra.runtime.output_dir)
    runs = seed_runs(typed(config), directory)
    try:
        results = train_together(runs)
    except Exception as error:
        mistake = isinstance(error, UserError)
        if hydra.mode == RunMode.RUN:
            if mistake:
                fail(str(error))
            raise
        reason = str(error) if mistake else f"{type(error).__name__}: {error}".splitlines()[0]
        log.error(f"{directory.name} failed: {reason}\n  see {runs[0][1] / 'train.log'}", exc_info=not mistake)
        record = {"status": "failed", "error": reason, "mistake": mistake}
        for _, folder in runs:
            if not (folder / "results.json").exists():
                (folder / "results.json").write_text(json.dumps(record, indent=2) + "\n")
        return
    for result in results:
        if result["signal"] is not None:
            sys.exit(128 + result["signal"])
