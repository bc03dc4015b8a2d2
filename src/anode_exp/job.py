"""Hydra's task: one job, alone or of a sweep. In a module of its own, for launchers that run it in other processes."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from anode_exp import composition  # noqa: F401  (registers the resolver that names jobs)
from anode_exp.config import typed
from anode_exp.errors import UserError, fail

log = logging.getLogger(__name__)


def run_job(config: DictConfig) -> None:
    """Train in Hydra's output directory. A failed job of a sweep is recorded and named, and the others go on."""
    from anode_exp.train import train  # imports torch

    hydra = HydraConfig.get()
    directory = Path(hydra.runtime.output_dir)
    try:
        results = train(typed(config), directory)
    except Exception as error:
        mistake = isinstance(error, UserError)
        if hydra.mode == RunMode.RUN:
            if mistake:
                fail(str(error))
            raise
        reason = str(error) if mistake else f"{type(error).__name__}: {error}".splitlines()[0]
        log.error(f"{directory.name} failed: {reason}\n  see {directory / 'train.log'}", exc_info=not mistake)
        record = {"status": "failed", "error": reason, "mistake": mistake}
        (directory / "results.json").write_text(json.dumps(record, indent=2) + "\n")
        return
    if results["signal"] is not None:
        sys.exit(128 + results["signal"])
