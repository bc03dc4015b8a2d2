"""Tables and picture of the study of stiff trajectories."""

import statistics
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from anode_exp.report.drawing import MARKERS, plt, save

Rows = list[dict[str, Any]]


def report(rows: Rows, directory: Path) -> str:
    """Writes ``study.png`` from the rows of ``study.jsonl`` and ``trajectories.npz``; returns the tables."""
    runs = [row for row in rows if row["kind"] == "run"]
    steps = [row for row in rows if row["kind"] == "steps"]
    epochs = [row for row in rows if row["kind"] == "epoch"]
    arrays = dict(np.load(directory / "trajectories.npz"))
    size = arrays["0.data"].shape[1]
    figure = plt.figure(figsize=(14, 7.4), layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False)[:, 0]
    _draw_trajectories(above.subplots(1, size, squeeze=False)[0], arrays, runs[0])
    of_steps, of_eigenvalues, of_cost, of_gradient = below.subplots(1, 4)
    _draw_steps(of_steps, steps)
    _draw_eigenvalues(of_eigenvalues, arrays, len(runs))
    if epochs:
        _draw_epochs(of_cost, of_gradient, epochs)
    else:
        for ax in (of_cost, of_gradient):
            ax.set_title("the runs kept no epochs", fontsize=9)
    save(figure, directory / "study.png")
    parts = [("Runs", _run_rows(runs)), ("Fixed steps between two points, the median over runs", _step_rows(steps))]
    if epochs:
        parts.append(("During training, the median over runs", _epoch_rows(epochs)))
    return "\n\n".join(f"{title}\n{tabulate(table, headers='keys', disable_numparse=True)}" for title, table in parts)


def _shown(x: float | None, form: str = ".2e") -> str:
    return "–" if x is None else format(x, form)


def _median(rows: Rows, key: str) -> float | None:
    """The median over the rows that have the key; None unless more than half have it."""
    found = [row[key] for row in rows if row.get(key) is not None]
    return statistics.median(found) if 2 * len(found) > len(rows) else None


def _groups(rows: Rows, *keys: str) -> dict[tuple[Any, ...], Rows]:
    found: dict[tuple[Any, ...], Rows] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def _run_rows(runs: Rows) -> Rows:
    after = list(dict.fromkeys(n for row in runs for n in row["best_after"]))
    return [
        {
            "trained by": row["trained_by"], "seed": row["seed"], "iterations": row["iterations"],
            "status": row["status"] or "–",
            **{f"best loss after {int(n):,}": _shown(row["best_after"].get(n)) for n in after},
            "at epoch": row["epoch"], "error": _shown(row["mae"]), "solved exactly": _shown(row["exact_mae"]),
        }
        for row in runs
    ]  # fmt: skip


def _step_rows(steps: Rows) -> Rows:
    table = []
    for (trained, solver, n), rows in _groups(steps, "trained_by", "solver", "n_steps").items():
        table.append({
            "trained by": trained, "solver": solver, "steps": n,
            "evaluations": _shown(_median(rows, "forward"), ",.0f"), "error to the data": _shown(_median(rows, "mae")),
            "error to the exact solution": _shown(_median(rows, "error")),
            "gradient": _shown(_median(rows, "gradient")),
            "finite": f"{sum(row['mae'] is not None for row in rows)} of {len(rows)}",
        })  # fmt: skip
    return table


def _epoch_rows(epochs: Rows) -> Rows:
    table = []
    keys = ("trained_by", "solver", "tolerance", "iterations")
    for (trained, solver, tolerance, iterations), rows in _groups(epochs, *keys).items():
        table.append({
            "trained by": trained, "iterations": f"{iterations:,}", "error": _shown(_median(rows, "own_mae")),
            "largest |λ|": _shown(_median(rows, "fastest"), ",.0f"),
            "gradient": _shown(_median(rows, "own_gradient")), "adaptive": f"{solver}, {tolerance:g}",
            "steps": _shown(_median(rows, "steps"), ",.0f"), "evaluations": _shown(_median(rows, "forward"), ",.0f"),
            "its error": _shown(_median(rows, "mae")), "its gradient": _shown(_median(rows, "gradient")),
        })  # fmt: skip
    return table


def _draw_trajectories(axes: Any, arrays: dict[str, Any], run: dict[str, Any]) -> None:
    """Draw the first run, in the units of the system."""
    times, low, high = (arrays[f"0.{key}"] for key in ("times", "low", "high"))
    logarithmic = times[0] > 0 and times[-1] / times[0] > 1e3
    for k, ax in enumerate(axes):
        curves = (("data", "o", "none"), ("model", "-", run["trained_by"]), ("exact", "--", "solved exactly"))
        for key, line, label in curves:
            values = low[k] + (high[k] - low[k]) * arrays[f"0.{key}"][:, k]
            data = key == "data"
            ax.plot(times, values, line, label="data" if data else label, markersize=4, fillstyle="none", linewidth=1.3)
        ax.set(xlabel="t", title=f"component {k + 1}")
        if logarithmic:
            ax.set_xscale("log")
    axes[0].legend(fontsize=8)


def _draw_steps(ax: Any, steps: Rows) -> None:
    solvers = list(dict.fromkeys(row["solver"] for row in steps))
    for solver, marker in zip(solvers, MARKERS, strict=False):
        groups = _groups([row for row in steps if row["solver"] == solver], "n_steps")
        points = [(n, error) for (n,), rows in groups.items() if (error := _median(rows, "error")) is not None]
        if points:
            ax.plot(*zip(*points, strict=True), marker=marker, markersize=4, linewidth=1.2, label=solver)
        else:
            ax.plot([], [], marker=marker, label=f"{solver}: not finite")
    ax.set(xscale="log", yscale="log", xlabel="steps between two points", ylabel="error of the solve, median over runs")
    ax.legend(fontsize=7)


def _draw_eigenvalues(ax: Any, arrays: dict[str, Any], runs: int) -> None:
    for i in range(runs):
        times, sizes = arrays[f"{i}.times"], np.abs(arrays[f"{i}.eigenvalues"])
        for k in range(sizes.shape[1]):
            label = f"|λ{k + 1}|" if i == 0 else None
            ax.plot(times, sizes[:, k], color=f"C{k}", linewidth=1, alpha=0.7, label=label)
    known = any(np.isfinite(arrays[f"{i}.eigenvalues"]).any() for i in range(runs))  # not if every solve failed
    scale = "log" if known else "linear"
    ax.set(xscale="log", yscale=scale, xlabel="t", ylabel="eigenvalues of ∂f/∂y, every run")
    ax.legend(fontsize=7)


def _draw_epochs(of_cost: Any, of_gradient: Any, epochs: Rows) -> None:
    solvers = list(dict.fromkeys((row["solver"], row["tolerance"]) for row in epochs))
    for color, (solver, tolerance) in enumerate(solvers):
        mine = [row for row in epochs if (row["solver"], row["tolerance"]) == (solver, tolerance)]
        for first, (_, rows) in enumerate(_groups(mine, "run").items()):
            label = f"{solver}, {tolerance:g}" if first == 0 else None
            style = {"color": f"C{color}", "linewidth": 1, "marker": MARKERS[color], "markersize": 3, "alpha": 0.7}
            for ax, key in ((of_cost, "steps"), (of_gradient, "gradient")):
                points = [(row["iterations"], row[key]) for row in rows if row.get(key)]
                if points:
                    ax.plot(*zip(*points, strict=True), label=label, **style)
    for first, (_, rows) in enumerate(_groups(epochs, "run").items()):
        points = [(row["iterations"], row["own_gradient"]) for row in rows if row["own_gradient"]]
        if points:
            label = "steps of training" if first == 0 else None
            of_gradient.plot(*zip(*points, strict=True), ":", color="black", linewidth=1, label=label)
    of_cost.set(xlabel="training steps", ylabel="accepted steps of a solve", yscale="log")
    of_gradient.set(xlabel="training steps", ylabel="norm of the gradient", yscale="log")
    for ax in (of_cost, of_gradient):
        ax.legend(fontsize=7)
