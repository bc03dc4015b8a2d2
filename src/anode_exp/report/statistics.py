"""Tables of a paper's reproduction: means and ranges over seeds, next to the published numbers."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from anode_exp.records.cells import Record, has_other_statistics, is_calibrated, other_statistics

MISSING = "–"
SCORES = "Score on the test data, mean over seeds (min–max)"


@dataclass(frozen=True)
class Group:
    """The runs of one method in one figure, and the paper's results for them.

    Attributes:
        published: min, max, mean of the test accuracy in percent; None if the paper gives only a plot.
        missing: commands of the runs that are not recorded.
        logged: test accuracy in percent after each epoch, if the authors' log has it.
    """

    figure: str
    method: str
    label: str
    published: list[float] | None
    runs: list[Record]
    missing: list[str]
    logged: list[float] = field(default_factory=list)

    @property
    def completed(self) -> list[Record]:
        return [run for run in self.runs if run.status == "completed"]

    def percents(self, value: Callable[[Record], float | None]) -> list[float]:
        values = [value(run) for run in self.completed]
        return [100 * v for v in values if v is not None]


def groups_of(spec: dict[str, Any], name: str, records: list[Record], expected: dict[Any, str]) -> list[Group]:
    figure = spec["figures"][name]
    shares = figure.get("shares", {})
    groups = []
    for method in figure.get("methods", []):
        shared = method in shares.get("methods", [])
        place = (shares["paper"], shares["figure"], method) if shared else (spec["name"], name, method)
        runs = [r for r in records if (r.cell["paper"], r.cell["figure"], r.cell["method"]) == place]
        there = {r.cell["seed"] for r in runs}
        missing = [c for (f, m, seed), c in expected.items() if (f, m) == (name, method) and seed not in there]
        published = figure.get("published", {}).get(method)
        logged = figure.get("logged", {}).get(method, [])
        groups.append(Group(name, method, spec["methods"][method]["label"], published, runs, missing, logged))
    return groups


def _three(values: list[float]) -> str:
    return " / ".join(f"{f(values):.2f}" for f in (min, max, statistics.fmean)) if values else MISSING


def spread(values: list[float], form: str) -> str:
    """The mean, and the range if the values differ."""
    if not values:
        return MISSING
    low, high, mean = (format(x, form) for x in (min(values), max(values), statistics.fmean(values)))
    return mean if low == high else f"{mean} ({low}–{high})"


def _best(run: Record) -> float | None:
    return max((e["test_accuracy"] for e in run.epochs if e.get("test_accuracy") is not None), default=None)


def _with_statistics(run: Record, by_time: bool) -> float | None:
    """Test accuracy of the last epoch's weights with BatchNorm statistics by time, or with one set for all times.

    The run's own scheme is measured in training, the other one afterwards. A network with one time, or without running
    statistics in f, has one accuracy.
    """
    if run.config is None or run.results is None:
        return None
    model = run.config.model
    if model.block == "residual" or model.field_norm != "batch" or (model.statistics == "by_time") == by_time:
        return run.last("test_accuracy")
    found = [e for e in run.evaluations if is_calibrated(e, run.config, run.results["epochs"])]
    return found[0]["test_accuracy"] if found else None


_by_time = partial(_with_statistics, by_time=True)
_one_set = partial(_with_statistics, by_time=False)


SCHEMES = {"by_time": "by time", "forward": "one set", "every_evaluation": "one set, published code's"}
"""Names of ``model.statistics``."""


def _statistics(group: Group) -> str:
    """The statistics with which the runs were evaluated after every epoch, for the curves and the best epoch."""
    schemes = (SCHEMES[run.config.model.statistics] for run in group.runs if run.config)
    return ", ".join(dict.fromkeys(schemes)) or MISSING


def kept_epochs(group: Group) -> dict[str, dict[int, float]]:
    """Test accuracy in percent of kept epochs with the statistics that a run does not keep in training.

    Returns:
        By scheme, then by epoch: the mean over the runs that have been evaluated so.
    """
    found: dict[str, dict[int, list[float]]] = {}
    for run in group.runs:
        if run.config is None:
            continue
        config, scheme = run.config, SCHEMES[other_statistics(run.config)]
        rows = [row for row in run.evaluations if row["checkpoint"].isdigit() and has_other_statistics(row, config)]
        for epoch, accuracy in {row["epoch"]: row["test_accuracy"] for row in rows}.items():  # the latest of each
            found.setdefault(scheme, {}).setdefault(epoch, []).append(100 * accuracy)
    return {scheme: {n: statistics.fmean(x[n]) for n in sorted(x)} for scheme, x in found.items()}


def status_counts(group: Group) -> str:
    """How many runs have each status, how far are those that can continue, and how many are missing."""
    parts = []
    for status in dict.fromkeys(run.status for run in group.runs):
        epochs = [len(run.epochs) for run in group.runs if run.status == status]
        reached = "–".join(dict.fromkeys(map(str, (min(epochs), max(epochs)))))
        so_far = f" (epoch {reached})" if status in ("unfinished", "interrupted") else ""
        parts.append(f"{len(epochs)} {status}{so_far}")
    parts += [f"{len(group.missing)} not run"] if group.missing else []
    return ", ".join(parts)


def accuracy_rows(groups: list[Group]) -> list[dict[str, str]]:
    """Test accuracy in percent, min / max / mean over seeds, next to the published one."""
    rows = []
    for group in groups:
        row = {"method": group.label, "runs": status_counts(group)}
        by_time, published = group.percents(_by_time), group.published
        if published:
            row["published"] = " / ".join(f"{x:.2f}" for x in published)
        row["last epoch, statistics by time"] = _three(by_time)
        if published:
            difference = f"{statistics.fmean(by_time) - published[2]:+.2f}" if by_time else MISSING
            row["difference of means"] = difference
        row["last epoch, one set"] = _three(group.percents(_one_set))
        row["best epoch"] = _three(group.percents(_best))
        row["statistics in training"] = _statistics(group)
        if any(g.logged for g in groups):
            epochs = max((len(run.epochs) for run in group.completed), default=0)
            known = 0 < epochs <= len(group.logged)
            row["the authors' log, same epoch"] = f"{group.logged[epochs - 1]:.2f}" if known else MISSING
        losses = [x for run in group.completed if (x := run.last("train_loss")) is not None]
        rows.append({**row, "training loss": spread(losses, ".4f")})
    return rows


def _had(group: Group, key: str, of: Callable[[Any], str]) -> str:
    """A setting that a resumed run may change, of all epochs; older records have it only in their configuration."""
    runs = [(run.epochs, of(run.config)) for run in group.runs if run.config is not None]
    return ", ".join(dict.fromkeys(line.get(key, own) for epochs, own in runs for line in epochs)) or MISSING


def cost_rows(groups: list[Group]) -> list[dict[str, str]]:
    """Memory, time, evaluations, machine and commit of each method's runs.

    For a run by several processes, memory is the largest of any process, and speed is that of all together.
    """
    rows = []
    for group in groups:
        results = [run.results for run in group.runs if run.results and "nfe" in run.results]
        if not results:
            continue
        nfe = [r["nfe"] for r in results if r["nfe"]]
        evaluations = [spread([n[k] for n in nfe], ".3g") for k in ("forward", "backward")] if nfe else [MISSING]
        commits = [(r["commit"] or "unknown")[:10] + "-dirty" * str(r["commit"]).endswith("-dirty") for r in results]
        # Times are of completed runs: a diverged run has an incomplete epoch, and an interrupted one is too short.
        seconds = [(r["wall_time_s"]["train"], r["epochs"]) for run in group.completed if (r := run.results)]
        peaks = [max(r.get("peak_memory_bytes_by_process", [r["peak_memory_bytes"]])) for r in results]
        kinds = dict.fromkeys(key for r in results for key in r if key.endswith("_per_s"))
        speeds = {key: [r[key] for r in results if r.get(key)] for key in kinds}
        rows.append(
            {
                "method": group.label,
                "peak memory, MB": spread([peak / 1e6 for peak in peaks], ",.1f"),
                "training, s per epoch": spread([s / epochs for s, epochs in seconds], ",.1f"),
                "training, min per run": spread([s / 60 for s, _ in seconds], ",.1f"),
                **{f"{key[:-6]}/s": spread(values, ",.0f") for key, values in speeds.items() if values},
                "evaluations of f per step": " + ".join(evaluations),
                "runs at once": ", ".join(dict.fromkeys(str(r.get("runs_at_once", 1)) for r in results)),
                "processes per run": ", ".join(dict.fromkeys(str(r.get("processes", 1)) for r in results)),
                "gradient": _had(group, "gradient", lambda config: config.gradient.name),
                "precision": _had(group, "precision", lambda config: config.runtime.precision),
                "device": ", ".join(dict.fromkeys(r["device"] for r in results)),
                "commit": ", ".join(dict.fromkeys(commits)),
            }
        )
    return rows


def command_rows(groups: list[Group]) -> list[dict[str, str]]:
    """The command of every run, recorded or missing."""
    rows = []
    for group in groups:
        commands = [(run.status, run.cell["command"]) for run in group.runs] + [("not run", c) for c in group.missing]
        rows += [{"method": group.label, "run": status, "command": command} for status, command in commands]
    return rows


def score_of(records: list[Record]) -> str:
    """The metric by which the runs' epochs are compared, such as ``accuracy``."""
    for record in records:
        for key in record.results or {}:
            if key.startswith("best_test_"):
                return key.removeprefix("best_test_")
    names = (key for record in records for line in record.epochs for key in line)
    return next((key.removeprefix("test_") for key in names if key.startswith("test_") and key != "test_loss"), "loss")


def score_rows(groups: list[Group], score: str) -> list[dict[str, str]]:
    """The score of completed runs after the last epoch and at the best one, and the training loss."""
    scale, form = (100.0, ".2f") if score == "accuracy" else (1.0, ".4g")
    unit = ", %" if score == "accuracy" else ""
    rows = []
    for group in groups:
        ends = [(run.last(f"test_{score}"), run.results) for run in group.completed]
        last = [scale * end for end, _ in ends if end is not None]
        best = [scale * r[f"best_test_{score}"] for _, r in ends if r and r.get(f"best_test_{score}") is not None]
        losses = [x for run in group.completed if (x := run.last("train_loss")) is not None]
        rows.append({
            "runs of": group.label, "runs": status_counts(group), f"{score}{unit}, last epoch": spread(last, form),
            f"{score}{unit}, best epoch": spread(best, form), "training loss": spread(losses, ".4g"),
        })  # fmt: skip
    return rows


def curves_of(group: Group, key: str) -> tuple[list[int], list[float], list[float], list[float]]:
    """Epochs, and the mean, least and largest value over the runs that reached each."""
    by_epoch: dict[int, list[float]] = {}
    for run in group.runs:
        for line in run.epochs:
            if line.get(key) is not None:
                by_epoch.setdefault(line["epoch"], []).append(line[key])
    epochs = sorted(by_epoch)
    values = [by_epoch[e] for e in epochs]
    return epochs, [statistics.fmean(v) for v in values], [min(v) for v in values], [max(v) for v in values]


def add_overview(rows: dict[str, dict[str, str]], title: str, groups: list[Group]) -> None:
    """Add a column to rows by method: our mean at the last epoch, and the paper's, where there is one."""
    for group, published in ((g, g.published) for g in groups if g.published):
        by_time = group.percents(_by_time)
        ours = f"{statistics.fmean(by_time):.2f}" if by_time else MISSING
        rows.setdefault(group.label, {"method": group.label})[title] = f"{ours} (paper {published[2]:.2f})"
