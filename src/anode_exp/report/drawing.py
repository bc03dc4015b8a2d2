"""Curves of runs and of studies."""

from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib

from anode_exp.report.statistics import Group, curves_of, kept_epochs

matplotlib.use("Agg")  # draws to files, with or without a display
import matplotlib.pyplot as plt

plt.rcParams |= {"axes.grid": True, "grid.alpha": 0.3}

STYLES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "v"), ((0, (6, 1, 1, 1, 1, 1)), "D"), ((0, (3, 1)), "P"))
"""Line and marker of each method, so that curves differ without colour."""


def save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw(groups: list[Group], title: str, path: Path, score: str = "accuracy") -> None:
    """Training loss and test score over epochs: the mean over seeds, the range as a band, ✕ where a run diverged.

    Hollow points are kept epochs that were evaluated with the other BatchNorm statistics.
    """
    scale, name = (100.0, "test accuracy, %") if score == "accuracy" else (1.0, f"test {score}")
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    drawn = [g for g in groups if any(run.epochs for run in g.runs)]
    others: list[Any] = []  # points beside the curves, in a legend of their own
    for i, group in enumerate(drawn):
        line, marker = STYLES[i % len(STYLES)]
        for axes, key, times in zip(panels, ("train_loss", f"test_{score}"), (1.0, scale), strict=True):
            epochs, *curves = curves_of(group, key)
            if not epochs:  # diverged in its first epoch
                axes.plot(1, 0.98, "x", markersize=10, markeredgewidth=2.5, color="black", label=group.label,
                          transform=axes.get_xaxis_transform())  # fmt: skip
                continue
            mean, low, high = ([times * v for v in curve] for curve in curves)
            (drawn_line,) = axes.plot(
                epochs, mean, linestyle=line, marker=marker, markersize=4, linewidth=1.5, label=group.label,
                markevery=max(1, len(epochs) // 10),
            )  # fmt: skip
            axes.fill_between(epochs, low, high, alpha=0.2, color=drawn_line.get_color(), linewidth=0)
            for run in group.runs:
                if run.status == "diverged" and run.epochs:
                    last = [e for e in run.epochs if e.get(key) is not None][-1:]
                    x, y = (last[0]["epoch"], times * last[0][key]) if last else (run.epochs[-1]["epoch"], mean[-1])
                    axes.plot(x, y, marker="x", markersize=10, markeredgewidth=2.5, color="black", zorder=5)
        if score == "accuracy":
            for scheme, points in kept_epochs(group).items():
                others += panels[1].plot(
                    points.keys(), points.values(), marker, markersize=5, markerfacecolor="none",
                    color=drawn_line.get_color(), label=f"{group.label}, statistics {scheme}",
                )  # fmt: skip
        if group.logged:
            name_of = f"{group.label}, the authors' log"
            others += panels[1].plot(range(1, len(group.logged) + 1), group.logged, "k+", markersize=7, label=name_of)
    losses = [y for drawn_line in panels[0].lines for y in drawn_line.get_ydata()]
    # A diverging run, for example, makes the other curves flat on a linear scale.
    if losses and 0 < 1e3 * min(losses) < max(losses):
        panels[0].set_yscale("log")
    for axes, label in zip(panels, ("training loss", name), strict=True):
        axes.set(xlabel="epoch", ylabel=label)
    if drawn:
        panels[0].legend(fontsize=8)
    if others:
        panels[1].legend(handles=others, fontsize=8)
    figure.suptitle(title, fontsize=11)
    save(figure, path)


MARKERS = "os^vD<>Px*hp8Hd"  # so that curves differ without colour too


def labels_of(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["gradient"] for row in rows))


def peak_of(row: dict[str, Any]) -> float:
    return float(row["cuda_bytes"] or row["counted_bytes"])


def draw_lines(axes: Any, rows: list[dict[str, Any]], x: str, y: Any) -> None:
    for label, marker in zip(labels_of(rows), cycle(MARKERS), strict=False):
        points = sorted((row[x], y(row)) for row in rows if row["gradient"] == label)
        axes.plot(*zip(*points, strict=True), marker=marker, label=label, linewidth=1.2, markersize=5)
    ticks = sorted({row[x] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(t) for t in ticks])
