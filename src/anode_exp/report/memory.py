"""Table, fits and plot of the memory study."""

from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from anode_exp.report.drawing import draw_lines, labels_of, peak_of, plt, save

ORDER = {  # growth stated by the papers, for N steps of s stages in L blocks
    "full_backprop": "O(L N)",
    "dto_checkpoint": "O(L) + O(N)",
    "step_checkpoint keep": "O(L N) states",
    "step_checkpoint rebuild": "O(L) + O(N) states",
    "stage_checkpoint keep": "O(L N s) states",
    "stage_checkpoint rebuild": "O(L) + O(N) states",
    "revolve stage 3": "O(L)",
    "equispaced stage 3": "O(L)",
    "reverse_adjoint": "O(L)",
    "alf full_backprop": "O(L N)",
    "alf reversible": "O(L)",
    "reversible_rk reversible": "O(L s)",
}


def growth(rows: list[dict[str, Any]], x: str) -> dict[str, tuple[float, float]]:
    """Least squares peak = a + b·x of each mode: (a, b) in bytes."""
    found = {}
    for label in labels_of(rows):
        points = [(row[x], peak_of(row)) for row in rows if row["gradient"] == label]
        if len({p[0] for p in points}) > 1:
            b, a = np.polyfit([p[0] for p in points], [p[1] for p in points], 1)
            found[label] = (float(a), float(b))
    return found


def report(rows: list[dict[str, Any]], directory: Path) -> str:
    """Writes ``study.png``; returns the tables of the rows of ``study.jsonl``."""
    panels = [(x, part) for x in ("n_steps", "blocks_per_stage") if (part := [r for r in rows if r["varied"] == x])]
    count = len(panels) + 1
    figure, axes = plt.subplots(1, count, figsize=(5 * count, 4.5), layout="constrained")
    for ax, (x, part) in zip(axes, panels, strict=False):
        draw_lines(ax, part, x, lambda row: peak_of(row) / 1e6)
        ax.set(xlabel=x, ylabel="peak, MB", yscale="log")
    x, part = panels[0]
    draw_lines(axes[-1], part, x, lambda row: row["time_ratio"])
    axes[-1].set(xlabel=x, ylabel=f"time of a step, relative to {labels_of(part)[0]}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    save(figure, directory / "study.png")
    text = []
    for x, part in panels:
        table = []
        fits = growth(part, x)
        for label in labels_of(part):
            mine = {row[x]: row for row in part if row["gradient"] == label}
            fit = f"{fits[label][0] / 1e6:,.0f} + {fits[label][1] / 1e6:,.1f} {x}" if label in fits else ""
            cells = {f"{x}={k}": f"{peak_of(r) / 1e6:,.0f} MB ×{r['time_ratio']:.2f}" for k, r in mine.items()}
            table.append({"gradient": label, **cells, "fit, MB": fit, "stated": ORDER.get(label, "")})
        text.append(tabulate(table, headers="keys"))
    return "\n\n".join(text)
