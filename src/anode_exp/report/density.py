"""Tables and pictures of the density study."""

from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from anode_exp.report.drawing import peak_of, plt, save


def _densities(rows: list[dict[str, Any]]) -> str:
    table = []
    for row in rows:
        by_steps = row.get("nll_by_steps")
        shown = {"−log p, nats": f"{row['nll']:.4f}", "": row.get("chosen", "")}
        if by_steps is not None:
            shown |= {"by its own steps": f"{by_steps:.4f}", "difference": f"{by_steps - row['nll']:+.4f}"}
            shown |= {"round trip": f"{row['round_trip']:.1e}"}
        if row.get("integral") is not None:
            shown |= {"integral": f"{row['integral']:.5f}", "by its own steps ": f"{row['integral_by_steps']:.5f}"}
        table.append({"density": row["name"], **shown})
    return tabulate(table, headers="keys", disable_numparse=True)


def _gradients(rows: list[dict[str, Any]]) -> str:
    table = []
    for row in rows:
        first = next(r for r in rows if r["name"] == row["name"])
        table.append({
            "run": row["name"], "gradient": row["gradient"], "error in float64": f"{row['relative_error']:.1e}",
            "peak, MB": f"{peak_of(row) / 1e6:.2f}", "relative to the first": f"{peak_of(row) / peak_of(first):.3f}",
            "time": f"×{row['time_ratio']:.2f}", "evaluations": f"{row['nfe_forward']} + {row['nfe_backward']}",
        })  # fmt: skip
    return tabulate(table, headers="keys", disable_numparse=True)


def _warnings(rows: list[dict[str, Any]]) -> list[str]:
    return [
        f"{row['name']}: the flow has learned the errors of its steps ({row['chosen']}); −log p by them is off by "
        f"{row['nll_by_steps'] - row['nll']:+.3f} nats. Train with more steps."
        for row in rows
        if row.get("exploits_steps")
    ]


def _draw_plane(flows: list[dict[str, Any]], pictures: Any, path: Path) -> None:
    """Data and true density, then samples and density of every flow, and its density by its own steps."""
    columns = [("data", pictures["data"], pictures["truth"], None)]
    for row in flows:
        drawn = (pictures[f"{row['name']}|{key}"] for key in ("samples", "density", "density_by_steps"))
        columns.append((row["name"], *drawn))
    axis = np.unique(pictures["points"][:, 0])
    brightest = float(pictures["truth"].max())
    extent = (axis[0], axis[-1], axis[0], axis[-1])
    window = 1.2 * np.abs(pictures["data"]).max()
    size = (3 * len(columns), 9)
    figure, panels = plt.subplots(3, len(columns), figsize=size, squeeze=False, layout="constrained")
    for column, (name, samples, density, by_steps) in zip(panels.T, columns, strict=True):
        column[0].plot(*samples[:5000].T, ".", color="black", markersize=1)
        column[0].set_title(name)
        for ax, values in zip(column[1:], (density, by_steps), strict=True):
            ax.grid(False)
            if values is None:
                ax.set_axis_off()
                continue
            picture = values.reshape(len(axis), len(axis)).T
            ax.imshow(picture, origin="lower", extent=extent, vmin=0, vmax=brightest)
        for ax in column:
            ax.set(xticks=[], yticks=[], aspect="equal", xlim=(-window, window), ylim=(-window, window))
    panels[0][0].set_ylabel("samples")
    panels[1][0].set_ylabel("density")
    if len(columns) > 1:
        panels[2][1].set_ylabel("density by its own steps")
    save(figure, path)


def _draw_bars(densities: list[dict[str, Any]], path: Path) -> None:
    figure, ax = plt.subplots(figsize=(7, 0.6 * len(densities) + 1), layout="constrained")
    ax.barh([r["name"] for r in densities], [r["nll"] for r in densities])
    low, high = (f(r["nll"] for r in densities) for f in (min, max))
    ax.set(xlim=(low - (high - low) - 1e-3, high + 1e-3), xlabel="−log p of test samples, nats")
    ax.invert_yaxis()
    save(figure, path)


def report(rows: list[dict[str, Any]], directory: Path) -> str:
    """Writes ``study.png``, for the plane from ``pictures.npz``; returns the tables of the rows of ``study.jsonl``."""
    densities = [row for row in rows if row["kind"] == "density"]
    gradients = [row for row in rows if row["kind"] == "gradient"]
    if (directory / "pictures.npz").is_file():
        flows = [row for row in densities if "nll_by_steps" in row]
        _draw_plane(flows, np.load(directory / "pictures.npz"), directory / "study.png")
    else:
        _draw_bars(densities, directory / "study.png")
    return "\n\n".join([_densities(densities), *_warnings(densities), _gradients(gradients)])
