"""The recorded runs of a paper's reproduction."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anode_exp.config.check import read_config, typed
from anode_exp.config.schema import TrainConfig
from anode_exp.records.reading import read_lines, read_metrics, read_results

CALIBRATION_BATCHES = 50


def other_statistics(config: TrainConfig) -> str:
    """The scheme with which a run is evaluated in addition to its own: statistics by time, or one set for all times."""
    return "forward" if config.model.statistics == "by_time" else "by_time"


def has_other_statistics(row: dict[str, Any], config: TrainConfig) -> bool:
    """Whether a row of ``evaluations.jsonl`` tests a run as it was trained, but with the other statistics.

    Training does not depend on running statistics, so this is the score of a run with the other ``model.statistics``.
    """
    statistics = f"{other_statistics(config)}, {CALIBRATION_BATCHES} batches anew"
    same: dict[str, Any] = {"dataset": config.dataset.name, "statistics": statistics}
    same |= {"solver": config.solver.name, "n_steps": config.solver.n_steps}
    return row.items() >= same.items()


def is_calibrated(row: dict[str, Any], config: TrainConfig, epochs: int) -> bool:
    """Whether a row of ``evaluations.jsonl`` tests a run after its last epoch, with the other statistics."""
    return row.items() >= {"checkpoint": "last", "epoch": epochs}.items() and has_other_statistics(row, config)


COPIES = "records"
"""Folder next to a report, with copies of the records that it shows."""


@dataclass(frozen=True)
class Record:
    """One recorded run.

    Attributes:
        cell: as in ``cell.json``.
        epochs: one dictionary per epoch, without the losses of its steps.
        results: as in ``results.json``; None for a run that has not ended.
        evaluations: as in ``evaluations.jsonl``.
        config: None before the run has begun, and for a study.
    """

    directory: Path
    cell: dict[str, Any]
    epochs: list[dict[str, Any]]
    results: dict[str, Any] | None
    evaluations: list[dict[str, Any]]
    config: TrainConfig | None

    @property
    def status(self) -> str:
        return self.results["status"] if self.results else "unfinished"

    def last(self, key: str) -> float | None:
        return self.epochs[-1].get(key) if self.epochs else None


def read_record(folder: Path, cell: dict[str, Any], config: TrainConfig | None) -> Record:
    """What a run has written to its folder."""
    epochs = [{k: v for k, v in line.items() if k != "step_losses"} for line in read_metrics(folder)]
    return Record(folder, cell, epochs, read_results(folder), read_lines(folder / "evaluations.jsonl"), config)


def read_records(*directories: Path) -> list[Record]:
    """All records below the folders, by seed. Copies that ``copy_records`` wrote next to a report are not counted."""
    found = []
    paths = [(place, path) for place in directories for path in place.rglob("cell.json")]
    for folder in (path.parent for place, path in paths if COPIES not in path.relative_to(place).parts):
        cell = json.loads((folder / "cell.json").read_text())
        begun = cell["method"] is not None and (folder / "config.yaml").exists()
        found.append(read_record(folder, cell, typed(read_config(folder)) if begun else None))
    return sorted(found, key=lambda r: (r.cell["seed"] or 0, str(r.directory)))


def copy_records(records: list[Record], target: Path) -> None:
    """Copy every record to a folder, without checkpoints, TensorBoard events and the losses of single steps."""
    for record in records:
        folder = target / record.cell["paper"] / record.cell["length"] / record.cell["figure"]
        if record.cell["method"] is not None:
            folder = folder / f"{record.cell['method']}_seed-{record.cell['seed']}"
        if folder.resolve() == record.directory.resolve():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        kept = ("cell.json", "config.yaml", "results.json", "evaluations.jsonl")
        for name in (*kept, "study.jsonl", "study.png", "table.txt", "environment.json"):
            if (record.directory / name).exists():
                shutil.copyfile(record.directory / name, folder / name)
        if record.epochs:
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in record.epochs))
