"""The table of a sweep: one row per job, and mean and spread over seeds."""

import csv
import statistics
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from tabulate import tabulate

from anode_exp.records.reading import read_results

COSTS = ("train_loss", "peak_memory_bytes", "train_time_s")


def is_measure(key: str) -> bool:
    """Whether a row's entry is a final number of a run: a test score or a cost."""
    return key in COSTS or key.startswith(("test_", "best_test_"))


def _job(directory: Path, given: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """The overrides in ``given`` and the results of one job; a job without results counts as failed."""
    overrides = OmegaConf.to_container(OmegaConf.load(given / ".hydra" / "overrides.yaml"))
    settings = dict(str(line).lstrip("+").split("=", 1) for line in cast(list[str], overrides))
    if directory != given:  # one of several seeds that ran at once
        settings["seed"] = directory.name.rpartition("-")[2]
    found = read_results(directory) or {"status": "failed", "error": "ended without results"}
    found["train_time_s"] = found.get("wall_time_s", {}).get("train")
    return settings, found


def _number_of(folder: Path) -> int:
    return int(folder.name.partition("_")[0])


def runs_of_seeds(directory: Path) -> list[Path]:
    """The folders of a job that ran several seeds at once, in order; empty if it ran one, or for a sweep's folder."""
    if not (directory / ".hydra" / "overrides.yaml").exists():
        return []
    return sorted(directory.glob("*_seed-*/"), key=_number_of)


def sweep_rows(directory: Path) -> list[dict[str, Any]]:
    """A row for each job below a sweep's folder, or below one of several seeds at once: job, the settings that vary,
    status, measures, error."""
    if (directory / ".hydra" / "overrides.yaml").exists():
        folders = [directory]
    else:
        folders = sorted((f for f in directory.iterdir() if (f / ".hydra" / "overrides.yaml").exists()), key=_number_of)
    places = [(run, folder) for folder in folders for run in runs_of_seeds(folder) or [folder]]
    jobs = [_job(*place) for place in places]
    keys = dict.fromkeys(key for settings, _ in jobs for key in settings)
    varied = [k for k in keys if len({settings.get(k) for settings, _ in jobs}) > 1]
    scores = dict.fromkeys(k for _, results in jobs for k in results if k.startswith(("test_", "best_test_")))
    measures = [*(scores or ("test_accuracy", "best_test_accuracy")), *COSTS]
    rows = []
    for (run, _), (settings, results) in zip(places, jobs, strict=True):
        job = ".".join(part.partition("_")[0] for part in run.relative_to(directory).parts)
        row = {"job": job, **{k: settings.get(k) for k in varied}, "status": results["status"]}
        row |= {m: results.get(m) for m in measures}
        rows.append({**row, "error": results.get("error"), "mistake": results.get("mistake", False)})
    return rows


def over_seeds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and sample standard deviation of each measure over the completed jobs that differ only in their seed."""
    first = rows[0] if rows else {}
    measures = [k for k in first if is_measure(k)]
    fixed = [k for k in first if k not in ("job", "seed", "status", "error", "mistake", *measures)]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(str(row[k]) for k in fixed), []).append(row)
    table = []
    for group in groups.values():
        completed = [row for row in group if row["status"] == "completed"]
        line: dict[str, Any] = {k: group[0][k] for k in fixed} | {"seeds": f"{len(completed)} of {len(group)}"}
        for measure in measures:
            values = [row[measure] for row in completed if row[measure] is not None]
            line[f"{measure}_mean"] = statistics.fmean(values) if values else None
            line[f"{measure}_std"] = statistics.stdev(values) if len(values) > 1 else None
        table.append(line)
    return table


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a CSV file with a column for each key of any row."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), restval="")
        writer.writeheader()
        writer.writerows(rows)


def _number(value: float | None, measure: str) -> str:
    if value is None:
        return "–"
    if measure.endswith("accuracy"):
        return f"{value:.2%}"
    return f"{value / 1e6:,.1f} MB" if measure.endswith("bytes") else f"{value:.4g}"


def sweep_table(directory: Path, rows: list[dict[str, Any]]) -> str:
    """Write a sweep's rows to ``sweep.csv`` and, where seeds vary, ``sweep_over_seeds.csv``; return both as text."""
    if not rows:
        return f"no job of {directory} started"
    write_csv(directory / "sweep.csv", rows)
    columns = [key for key in rows[0] if key not in ("error", "mistake")]
    shown = [{k: _number(row[k], k) if is_measure(k) else row[k] for k in columns} for row in rows]
    text = tabulate(shown, headers="keys", disable_numparse=True)
    if "seed" in rows[0]:
        means = over_seeds(rows)
        write_csv(directory / "sweep_over_seeds.csv", means)
        fixed = [k for k in means[0] if not k.endswith(("_mean", "_std"))]
        shown = [{k: m[k] for k in fixed} for m in means]
        for row, m in zip(shown, means, strict=True):
            row |= {x: f"{_number(m[f'{x}_mean'], x)} ± {_number(m[f'{x}_std'], x)}" for x in rows[0] if is_measure(x)}
        text += "\n\n" + tabulate(shown, headers="keys", disable_numparse=True)
    return f"{text}\n{directory / 'sweep.csv'}"
