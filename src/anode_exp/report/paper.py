"""A paper's reproduction beside the paper: curves, tables, commands, as one HTML page, Markdown and CSV.

Reads run records alone (``cell.json``, ``config.yaml``, ``metrics.jsonl``, ``results.json``), wherever they lie below a
folder.
"""

from __future__ import annotations

import base64
import csv
import html
import json
import shutil
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from tabulate import tabulate

from anode_exp.config import TrainConfig, read_config, typed
from anode_exp.json_lines import read_lines
from anode_exp.reproduction import is_calibrated

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STYLES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "v"), ((0, (6, 1, 1, 1, 1, 1)), "D"), ((0, (3, 1)), "P"))
"""Line and marker of each method: curves are told apart without colour."""

MISSING = "–"
COPIES = "records"
"""Folder, beside a report, of what it was made from."""

ACCURACY = "Test accuracy in percent, min / max / mean over seeds"
COMMANDS = "Commands"


@dataclass(frozen=True)
class Record:
    """One recorded run.

    Attributes:
        cell: as in ``cell.json``.
        epochs: a dictionary an epoch, without the losses of its steps.
        results: as in ``results.json``; None for a run that has not ended.
        evaluations: as in ``evaluations.jsonl``.
        config: None before the run has begun, and of a study.
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


def read_records(*directories: Path) -> list[Record]:
    """All records below the folders, by seed; what ``copy_records`` made of them there is none."""
    found = []
    paths = [
        path
        for place in directories
        for path in place.rglob("cell.json")
        if COPIES not in path.relative_to(place).parts
    ]
    for path in paths:
        folder, cell = path.parent, json.loads(path.read_text())
        results = folder / "results.json"
        epochs = [
            {k: v for k, v in line.items() if k != "step_losses"} for line in read_lines(folder / "metrics.jsonl")
        ]
        ended = json.loads(results.read_text()) if results.exists() else None
        begun = cell["method"] is not None and (folder / "config.yaml").exists()
        config = typed(read_config(folder)) if begun else None
        found.append(Record(folder, cell, epochs, ended, read_lines(folder / "evaluations.jsonl"), config))
    return sorted(found, key=lambda r: (r.cell["seed"] or 0, str(r.directory)))


@dataclass(frozen=True)
class Group:
    """The runs of one method in one figure, and what the paper says of them.

    Attributes:
        published: min, max, mean of the test accuracy in percent; None where the paper gives a plot alone.
        missing: commands of the runs that are not recorded.
    """

    figure: str
    method: str
    label: str
    published: list[float] | None
    runs: list[Record]
    missing: list[str]

    @property
    def completed(self) -> list[Record]:
        return [run for run in self.runs if run.status == "completed"]

    def percents(self, value: Callable[[Record], float | None]) -> list[float]:
        values = [value(run) for run in self.completed]
        return [100 * v for v in values if v is not None]


def _groups(spec: dict[str, Any], name: str, records: list[Record], expected: dict[Any, str]) -> list[Group]:
    figure = spec["figures"][name]
    shares = figure.get("shares", {})
    groups = []
    for method in figure.get("methods", []):
        place = shares["figure"] if method in shares.get("methods", []) else name
        of = shares["paper"] if method in shares.get("methods", []) else spec["name"]
        runs = [r for r in records if (r.cell["paper"], r.cell["figure"], r.cell["method"]) == (of, place, method)]
        there = {r.cell["seed"] for r in runs}
        missing = [c for (f, m, seed), c in expected.items() if (f, m) == (name, method) and seed not in there]
        published = figure.get("published", {}).get(method)
        groups.append(Group(name, method, spec["methods"][method]["label"], published, runs, missing))
    return groups


def _three(values: list[float]) -> str:
    if not values:
        return MISSING
    return f"{min(values):.2f} / {max(values):.2f} / {statistics.fmean(values):.2f}"


def _spread(values: list[float], form: str) -> str:
    """Mean, and the range where it is one."""
    if not values:
        return MISSING
    low, high, mean = (format(x, form) for x in (min(values), max(values), statistics.fmean(values)))
    return mean if low == high else f"{mean} ({low}–{high})"


def _final(run: Record) -> float | None:
    return run.last("test_accuracy")


def _best(run: Record) -> float | None:
    return max((e["test_accuracy"] for e in run.epochs if e.get("test_accuracy") is not None), default=None)


def _with_statistics(run: Record, by_time: bool) -> float | None:
    """Test accuracy of the last epoch's weights with BatchNorm statistics by time, or with one set for all times.

    The run's own scheme is measured in training, the other one afterwards. A network that has one time, or no running
    statistics in f, has one accuracy.
    """
    if run.config is None or run.results is None:
        return None
    model = run.config.model
    if model.block == "residual" or model.field_norm != "batch" or (model.statistics == "by_time") == by_time:
        return _final(run)
    found = [e for e in run.evaluations if is_calibrated(e, run.config, run.results["epochs"])]
    return found[0]["test_accuracy"] if found else None


def _by_time(run: Record) -> float | None:
    return _with_statistics(run, True)


def _one_set(run: Record) -> float | None:
    return _with_statistics(run, False)


def _statistics(group: Group) -> str:
    """By which statistics the runs were evaluated after every epoch: those of the curves and of the best epoch."""
    names = {"by_time": "by time", "forward": "one set", "every_evaluation": "one set, published code's"}
    return ", ".join(dict.fromkeys(names[run.config.model.statistics] for run in group.runs if run.config)) or MISSING


def _runs(group: Group) -> str:
    counts = {s: sum(run.status == s for run in group.runs) for s in dict.fromkeys(run.status for run in group.runs)}
    parts = [f"{n} {status}" for status, n in counts.items()]
    parts += [f"{len(group.missing)} not run"] if group.missing else []
    return ", ".join(parts)


def accuracy_rows(groups: list[Group]) -> list[dict[str, str]]:
    """Test accuracy in percent, min / max / mean over seeds, beside the published one."""
    rows = []
    for group in groups:
        by_time, best = group.percents(_by_time), group.percents(_best)
        published = group.published
        difference = f"{statistics.fmean(by_time) - published[2]:+.2f}" if published and by_time else MISSING
        rows.append(
            {
                "method": group.label,
                "runs": _runs(group),
                **({"published": " / ".join(f"{x:.2f}" for x in published)} if published else {}),
                "last epoch, statistics by time": _three(by_time),
                **({"difference of means": difference} if published else {}),
                "last epoch, one set": _three(group.percents(_one_set)),
                "best epoch": _three(best),
                "statistics in training": _statistics(group),
                "training loss": _spread(
                    [x for r in group.completed if (x := r.last("train_loss")) is not None], ".4f"
                ),
            }
        )
    return rows


def cost_rows(groups: list[Group]) -> list[dict[str, str]]:
    """Memory, time, evaluations, machine and commit of each method's runs."""
    rows = []
    for group in groups:
        results = [run.results for run in group.runs if run.results and "nfe" in run.results]
        if not results:
            continue
        nfe = [r["nfe"] for r in results if r["nfe"]]
        commits = dict.fromkeys(
            (r["commit"] or "unknown")[:10] + ("-dirty" * str(r["commit"]).endswith("-dirty")) for r in results
        )
        # A diverged run's last epoch is none, an interrupted one's time is not that of a run.
        whole = [run.results for run in group.completed if run.results]
        seconds = [r["wall_time_s"]["train"] / r["epochs"] for r in whole]
        rows.append(
            {
                "method": group.label,
                "peak memory, MB": _spread([r["peak_memory_bytes"] / 1e6 for r in results], ",.1f"),
                "training, s an epoch": _spread(seconds, ",.1f"),
                "training, min a run": _spread([r["wall_time_s"]["train"] / 60 for r in whole], ",.1f"),
                "evaluations of f a step": " + ".join(
                    _spread([n[k] for n in nfe], ".3g") for k in ("forward", "backward")
                )
                if nfe
                else MISSING,
                "runs at once": ", ".join(dict.fromkeys(str(r.get("runs_at_once", 1)) for r in results)),
                "device": ", ".join(dict.fromkeys(r["device"] for r in results)),
                "commit": ", ".join(commits),
            }
        )
    return rows


def command_rows(groups: list[Group]) -> list[dict[str, str]]:
    """The command of every run, recorded or missing."""
    rows = []
    for group in groups:
        for run in group.runs:
            rows.append({"method": group.label, "run": run.status, "command": run.cell["command"]})
        for command in group.missing:
            rows.append({"method": group.label, "run": "not run", "command": command})
    return rows


def _curves(group: Group, key: str) -> tuple[list[int], list[float], list[float], list[float]]:
    """Epochs, and the mean, least and largest value over the runs that reached each."""
    by_epoch: dict[int, list[float]] = {}
    for run in group.runs:
        for line in run.epochs:
            if line.get(key) is not None:
                by_epoch.setdefault(line["epoch"], []).append(line[key])
    epochs = sorted(by_epoch)
    values = [by_epoch[e] for e in epochs]
    return epochs, [statistics.fmean(v) for v in values], [min(v) for v in values], [max(v) for v in values]


def overview_rows(groups: list[list[Group]], titles: list[str]) -> list[dict[str, str]]:
    """A row a method, a column a figure with published numbers: our mean at the last epoch, and the paper's."""
    rows: dict[str, dict[str, str]] = {}
    for title, of_figure in zip(titles, groups, strict=True):
        for group in of_figure:
            if group.published:
                by_time = group.percents(_by_time)
                ours = f"{statistics.fmean(by_time):.2f}" if by_time else MISSING
                rows.setdefault(group.label, {"method": group.label})[title] = (
                    f"{ours} (paper {group.published[2]:.2f})"
                )
    return list(rows.values())


def draw(groups: list[Group], title: str, path: Path) -> None:
    """Training loss and test accuracy over epochs: the mean over seeds, the range as a band, ✕ where a run diverged."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    drawn = [g for g in groups if any(run.epochs for run in g.runs)]
    for i, group in enumerate(drawn):
        line, marker = STYLES[i % len(STYLES)]
        for axes, key, scale in zip(panels, ("train_loss", "test_accuracy"), (1.0, 100.0), strict=True):
            epochs, *curves = _curves(group, key)
            if not epochs:  # diverged in its first epoch
                axes.plot(1, 0.98, "x", markersize=10, markeredgewidth=2.5, color="black", label=group.label,
                          transform=axes.get_xaxis_transform())  # fmt: skip
                continue
            mean, low, high = ([scale * v for v in curve] for curve in curves)
            (drawn_line,) = axes.plot(
                epochs, mean, linestyle=line, marker=marker, markersize=4, linewidth=1.5, label=group.label,
                markevery=max(1, len(epochs) // 10),
            )  # fmt: skip
            axes.fill_between(epochs, low, high, alpha=0.2, color=drawn_line.get_color(), linewidth=0)
            for run in group.runs:
                if run.status == "diverged" and run.epochs:
                    last = [e for e in run.epochs if e.get(key) is not None][-1:]
                    x, y = (last[0]["epoch"], scale * last[0][key]) if last else (run.epochs[-1]["epoch"], mean[-1])
                    axes.plot(x, y, marker="x", markersize=10, markeredgewidth=2.5, color="black", zorder=5)
    for axes, name in zip(panels, ("training loss", "test accuracy, %"), strict=True):
        axes.set_xlabel("epoch")
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
    if drawn:
        panels[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


@dataclass(frozen=True)
class Section:
    """One figure's part of the report: tables by caption, a picture, text."""

    title: str
    shown: str
    tables: list[tuple[str, list[dict[str, str]]]]
    picture: Path | None
    text: str = ""


def _sections(spec: dict[str, Any], records: list[Record], expected: dict[Any, str], target: Path) -> Iterator[Section]:
    for name, figure in spec["figures"].items():
        picture = target / f"{name}.png"
        if "study" in figure:
            folders = [
                r.directory for r in records if r.cell["figure"] == name and (r.directory / "study.png").exists()
            ]
            text = (folders[0] / "table.txt").read_text() if folders else "not run"
            if folders and (folders[0] / "study.png").resolve() != picture.resolve():
                shutil.copyfile(folders[0] / "study.png", picture)
            yield Section(figure["title"], figure.get("shown", ""), [], picture if folders else None, text)
            continue
        groups = _groups(spec, name, records, expected)
        if not any(run.epochs for group in groups for run in group.runs):
            yield Section(figure["title"], figure.get("shown", ""), [(ACCURACY, accuracy_rows(groups))], None)
            continue
        draw(groups, figure["title"], picture)
        tables = [
            (ACCURACY, accuracy_rows(groups)),
            ("Cost of a run", cost_rows(groups)),
            (COMMANDS, command_rows(groups)),
        ]
        yield Section(figure["title"], figure.get("shown", ""), tables, picture)


def write_report(
    spec: dict[str, Any], length: str, epochs: str, records: list[Record], expected: dict[Any, str], target: Path
) -> Path:
    """Write ``index.html`` (self-contained), ``README.md``, ``accuracy.csv`` and plots; returns the page.

    Args:
        spec: a paper's methods, figures and published numbers.
        length, epochs: name and description of the recipe's length.
        expected: the command of every run that the reproduction consists of, by (figure, method, seed); a figure's
            runs may be another reproduction's, where the figure ``shares`` them.
    """
    target.mkdir(parents=True, exist_ok=True)
    sections = list(_sections(spec, records, expected, target))
    named = [name for name, figure in spec["figures"].items() if "published" in figure]
    columns = [spec["figures"][name]["title"].removeprefix("Table, ") for name in named]
    overview = overview_rows([_groups(spec, name, records, expected) for name in named], columns)
    if overview:
        sections.insert(
            0, Section("The table", "", [("Mean test accuracy in percent at the last epoch", overview)], None)
        )
    head = f"{spec['paper']} reproduced: {length}, {epochs}"
    about = (
        f"Published: {spec['source']}; {spec['published_kind']}. Ours: the weights of the last epoch with BatchNorm "
        "statistics for every time of the solve, next to the same weights with one set for all times, the scheme of "
        "the published code. One set is a mixture of the activations at all times, which no batch has: training is the "
        "same either way, but one set evaluates it wrongly. Curves and the best epoch on test images, a choice made on "
        "them, are by the statistics kept in training; the others are estimated from training batches afterwards. "
        "Diverged and unfinished runs count in curves, not in accuracies."
    )
    if length != "paper":
        about += " A run this short is no measurement of the published accuracies: it shows an ordering at best."
    (target / "index.html").write_text(_page(head, about, sections))
    (target / "README.md").write_text(_markdown(head, about, sections, target))
    rows = [
        {"figure": section.title, **row}
        for section in sections
        for caption, table in section.tables
        if caption == ACCURACY
        for row in table
    ]
    with (target / "accuracy.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(k for row in rows for k in row)), restval="")
        writer.writeheader()
        writer.writerows(rows)
    return target / "index.html"


CSS = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #111 }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #bbb } img { max-width: 100%; height: auto }
div.table { overflow-x: auto } table { border-collapse: collapse; margin: .3rem 0 1rem; font-size: 13px }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .6rem; text-align: left; vertical-align: top }
th { border-bottom: 2px solid #888 } caption { text-align: left; font-weight: 600; padding: .3rem 0 }
pre { background: #f4f4f4; padding: .6rem; overflow-x: auto; font-size: 12px } summary { cursor: pointer }
"""


def _html_table(caption: str, rows: list[dict[str, str]]) -> str:
    body = tabulate(rows, headers="keys", tablefmt="html", disable_numparse=True)
    body = body.replace("<table>", f"<table><caption>{html.escape(caption)}</caption>", 1)
    table = f'<div class="table">{body}</div>'
    return f"<details><summary>Commands</summary>{table}</details>" if caption == COMMANDS else table


def _page(head: str, about: str, sections: list[Section]) -> str:
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(head)}</title><style>{CSS}</style>',
        f"<h1>{html.escape(head)}</h1><p>{html.escape(about)}</p>",
    ]
    for section in sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        if section.shown:
            parts.append(f"<p>The paper: {html.escape(section.shown)}.</p>")
        if section.picture is not None:
            data = base64.b64encode(section.picture.read_bytes()).decode()
            parts.append(f'<img alt="{html.escape(section.title)}" src="data:image/png;base64,{data}">')
        parts += [_html_table(caption, rows) for caption, rows in section.tables if rows]
        if section.text:
            parts.append(f"<pre>{html.escape(section.text)}</pre>")
    return "\n".join(parts) + "\n</html>\n"


def _markdown(head: str, about: str, sections: list[Section], target: Path) -> str:
    parts = [f"# {head}", about]
    for section in sections:
        parts.append(f"## {section.title}")
        if section.shown:
            parts.append(f"The paper: {section.shown}.")
        if section.picture is not None:
            parts.append(f"![{section.title}]({section.picture.relative_to(target)})")
        for caption, rows in section.tables:
            if caption == COMMANDS:
                lines = "\n".join(f"# {row['method']}: {row['run']}\n{row['command']}" for row in rows)
                parts.append(f"```\n{lines}\n```")
            elif rows:
                parts.append(
                    f"{caption}:\n\n{tabulate(rows, headers='keys', tablefmt='github', disable_numparse=True)}"
                )
        if section.text:
            parts.append(f"```\n{section.text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def copy_records(records: list[Record], target: Path) -> None:
    """The small part of every record: all but checkpoints, TensorBoard events and the losses of single steps."""
    for record in records:
        folder = target / record.cell["paper"] / record.cell["length"] / record.cell["figure"]
        if record.cell["method"] is not None:
            folder = folder / f"{record.cell['method']}_seed-{record.cell['seed']}"
        if folder.resolve() == record.directory.resolve():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("cell.json", "config.yaml", "results.json", "evaluations.jsonl", "study.png", "table.txt"):
            if (record.directory / name).exists():
                shutil.copyfile(record.directory / name, folder / name)
        if record.epochs:
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in record.epochs))
