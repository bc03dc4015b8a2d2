"""Table and plot of the evolution study."""

from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from anode_exp.report.drawing import plt, save


def report(rows: list[dict[str, Any]], directory: Path) -> str:
    """Writes ``study.png`` from ``kernels.npz``; returns the table of the rows of ``study.jsonl``."""
    kernels = np.load(directory / "kernels.npz")
    times = np.linspace(0, 1, len(rows[0]["moved"]))
    size = (1.5 * len(times), 1.7 * len(rows))
    figure, axes = plt.subplots(len(rows), len(times), figsize=size, layout="constrained", squeeze=False)
    for row, row_axes in zip(rows, axes, strict=True):
        name = f"{row['block']}.{row['convolution']}"
        limit = np.abs(kernels[name]).max()
        for ax, t, kernel in zip(row_axes, times, kernels[name], strict=True):
            ax.imshow(kernel, cmap="coolwarm", vmin=-limit, vmax=limit)
            for (y, x), value in np.ndenumerate(kernel):
                ax.text(x, y, f"{value / limit:.2f}", ha="center", va="center", fontsize=6)
            ax.set(xticks=[], yticks=[], title=f"t = {t:.1f}" if row is rows[0] else "")
        row_axes[0].set_ylabel(f"block {row['block']}\nconvolution {row['convolution']}", fontsize=8)
    save(figure, directory / "study.png")
    table = []
    for r in rows:
        line = {"block": r["block"], "convolution": r["convolution"], "kernel": "×".join(map(str, r["kernel"]))}
        for name, key in (("τ", "tau"), ("υ", "upsilon"), ("ρ", "rho")):
            line[name] = f"{r[key]:.3f}" if key in r else "–"
        moved = zip(times, r["moved"], strict=True)
        line |= {f"moved, t = {t:g}": f"{m:.1%}" for t, m in moved if t in (0.4, 1.0)}
        table.append({**line, "cosine, t = 1": f"{r['cosine'][-1]:.3f}"})
    return tabulate(table, headers="keys", disable_numparse=True)
