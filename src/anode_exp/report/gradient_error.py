"""Table, orders and plot of the gradient error study."""

from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from anode_exp.report.drawing import draw_lines, labels_of, plt, save


def _with_parts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, with precisions other than float64 in their names, each followed by rows for its drift and parts."""
    found = []
    for row in rows:
        precision = row.get("precision", "fp64")
        row = {**row, "gradient": row["gradient"] + ("" if precision == "fp64" else f", {precision}")}
        found.append(row)
        if "drift" in row:
            found.append({**row, "gradient": f"{row['gradient']}: drift", "relative_error": row["drift"]})
        for part in (p for p in ("reversal", "inconsistency") if f"{p}_error" in row):
            found.append({**row, "gradient": f"{row['gradient']}: {part}", "relative_error": row[f"{part}_error"]})
    return found


def order_in_dt(rows: list[dict[str, Any]]) -> float | None:
    """p of error ~ dt^p: least squares over the finer half of the steps, where errors are above rounding."""
    points = sorted((r["n_steps"], r["relative_error"]) for r in rows if r["n_steps"] and r["relative_error"])
    points = [p for p in points[len(points) // 2 :] if p[1] > 1e-12]
    if len(points) < 2:
        return None
    return float(-np.polyfit(np.log([p[0] for p in points]), np.log([p[1] for p in points]), 1)[0])


def report(rows: list[dict[str, Any]], directory: Path) -> str:
    """Writes ``study.png``; returns the tables of the rows of ``study.jsonl``."""
    rows = _with_parts(rows)
    over_training = len({row["epoch"] for row in rows}) > 1
    panels: list[tuple[str, str, list[dict[str, Any]]]] = []
    for solver, adaptive in dict.fromkeys((row["solver"], row["n_steps"] is None) for row in rows):
        part = [r for r in rows if r["solver"] == solver and (r["n_steps"] is None) == adaptive]
        x = "epoch" if over_training else "tolerance" if adaptive else "n_steps"
        panels.append((f"{solver}, adaptive" if adaptive else solver, x, part))
    worst = {k: max(r["relative_error"] or 0.0 for r in rows if r["gradient"] == k) for k in labels_of(rows)}
    exact = [label for label, error in worst.items() if error < 1e-9]
    # In float32 an exact mode has full_backprop's rounding; one curve is enough.
    rounded = [f"{label}, fp32" for label in exact if label != "reversible"]
    # The stored adjoint's error is the inconsistency; one curve is enough.
    twice = [label for label in worst if label.endswith(": inconsistency") and "stored_adjoint" in worst]
    size = (max(5 * len(panels), 8), 5)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    text = []
    for ax, (title, x, part) in zip(axes[0], panels, strict=True):
        shown = [r for r in part if r["relative_error"] and r["gradient"] not in [*exact, *rounded, *twice]]
        draw_lines(ax, shown, x, lambda row: row["relative_error"])
        ax.set(title=title, xlabel=x, yscale="log", ylabel="relative gradient error")
        if x == "epoch":
            ax.set_xscale("linear")
        if x == "tolerance":
            ax.set_xscale("log")
            ax.invert_xaxis()
        table = []
        for label in labels_of(part):
            mine = [r for r in part if r["gradient"] == label]
            cells = {f"{x}={r[x]:g}": "failed" if r["relative_error"] is None else r["relative_error"] for r in mine}
            order = order_in_dt(mine) if x == "n_steps" else None
            table.append({title: label, **cells, **({"order in dt": f"{order:.2f}"} if order is not None else {})})
        text.append(tabulate(table, headers="keys", floatfmt=".2e"))
    axes[0][0].legend(fontsize=8)
    if exact:
        most = max(worst[label] for label in exact)
        figure.suptitle(f"not drawn, at most {most:.0e}: {', '.join(exact)}", fontsize=9)
    save(figure, directory / "study.png")
    return "\n\n".join(text)
