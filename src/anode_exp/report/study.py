"""Tables, fits and plots of studies, from their JSON lines alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from tabulate import tabulate

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ORDER = {  # growth that the papers state, for N steps of s stages in L blocks
    "full_backprop": "O(L N)",
    "dto_checkpoint": "O(L) + O(N)",
    "step_checkpoint keep": "O(L N) states",
    "step_checkpoint rebuild": "O(L) + O(N) states",
    "stage_checkpoint keep": "O(L N s) states",
    "stage_checkpoint rebuild": "O(L) + O(N) states",
    "revolve stage 3": "O(L)",
    "equispaced stage 3": "O(L)",
    "reverse_adjoint": "O(L)",
}
MARKERS = "os^vD<>Px*"  # curves are told apart without colour too


def _labels(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["gradient"] for row in rows))


def _peak(row: dict[str, Any]) -> float:
    return float(row["cuda_bytes"] or row["counted_bytes"])


def _draw(axes: Any, rows: list[dict[str, Any]], x: str, y: Any) -> None:
    for label, marker in zip(_labels(rows), MARKERS, strict=False):
        points = sorted((row[x], y(row)) for row in rows if row["gradient"] == label)
        axes.plot(*zip(*points, strict=True), marker=marker, label=label, linewidth=1.2, markersize=5)
    ticks = sorted({row[x] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.grid(alpha=0.3)


def growth(rows: list[dict[str, Any]], x: str) -> dict[str, tuple[float, float]]:
    """Least squares peak = a + b·x of each mode: (a, b) in bytes."""
    found = {}
    for label in _labels(rows):
        points = [(row[x], _peak(row)) for row in rows if row["gradient"] == label]
        if len({p[0] for p in points}) > 1:
            b, a = np.polyfit([p[0] for p in points], [p[1] for p in points], 1)
            found[label] = (float(a), float(b))
    return found


def memory_report(directory: Path) -> str:
    """Writes ``study.png``; returns the tables of ``study.jsonl``."""
    rows = [json.loads(line) for line in (directory / "study.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["varied"] == "n_steps"]
    blocks = [row for row in rows if row["varied"] == "blocks_per_stage"]
    panels = [("n_steps", steps), ("blocks_per_stage", blocks)]
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for ax, (x, part) in zip(axes, panels, strict=False):
        _draw(ax, part, x, lambda row: _peak(row) / 1e6)
        ax.set(xlabel=x, ylabel="peak, MB", yscale="log")
    _draw(axes[2], steps, "n_steps", lambda row: row["time_ratio"])
    axes[2].set(xlabel="n_steps", ylabel=f"time of a step over {_labels(steps)[0]}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(directory / "study.png", dpi=110)
    plt.close(figure)
    text = []
    for x, part in panels:
        table = []
        fits = growth(part, x)
        for label in _labels(part):
            mine = {row[x]: row for row in part if row["gradient"] == label}
            fit = f"{fits[label][0] / 1e6:,.0f} + {fits[label][1] / 1e6:,.1f} {x}" if label in fits else ""
            table.append(
                {"gradient": label}
                | {f"{x}={k}": f"{_peak(r) / 1e6:,.0f} MB ×{r['time_ratio']:.2f}" for k, r in mine.items()}
                | {"fit, MB": fit, "stated": ORDER.get(label, "")}
            )
        text.append(tabulate(table, headers="keys"))
    return "\n\n".join(text)


def gradient_error_report(directory: Path) -> str:
    """Writes ``study.png``; returns the table of ``study.jsonl``."""
    rows = [json.loads(line) for line in (directory / "study.jsonl").read_text().splitlines()]
    solvers = list(dict.fromkeys(row["solver"] for row in rows))
    figure, axes = plt.subplots(1, len(solvers), figsize=(5 * len(solvers), 4.5), squeeze=False, layout="constrained")
    for ax, name in zip(axes[0], solvers, strict=True):
        _draw(ax, [r for r in rows if r["solver"] == name], "n_steps", lambda row: max(row["relative_error"], 1e-17))
        ax.set(title=name, xlabel="n_steps", yscale="log", ylabel="relative gradient error", ylim=(1e-17, 1e2))
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.savefig(directory / "study.png", dpi=110)
    plt.close(figure)
    table = []
    for name in solvers:
        for label in _labels(rows):
            mine = [r for r in rows if r["solver"] == name and r["gradient"] == label]
            table.append({"solver": name, "gradient": label} | {f"N={r['n_steps']}": r["relative_error"] for r in mine})
    return tabulate(table, headers="keys", floatfmt=".2e")


REPORTS = {"memory": memory_report, "gradient_error": gradient_error_report}
