"""Table and plot of the reversibility study."""

from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from anode_exp.report.drawing import plt, save


def report(rows: list[dict[str, Any]], directory: Path) -> str:
    """Writes ``study.png`` from ``images.npz``; returns the tables of the rows of ``study.jsonl``."""
    images = np.load(directory / "images.npz")
    of_images = [r for r in rows if r["kind"] == "image"]
    solvers = list(dict.fromkeys(r["solver"] for r in of_images))
    activations = list(dict.fromkeys(r["activation"] for r in of_images))
    columns = [("input", None)] + [(what, solver) for solver in solvers for what in ("output", "reversed")]
    size = (2.1 * len(columns), 2.4 * len(activations))
    figure, axes = plt.subplots(len(activations), len(columns), figsize=size, layout="constrained")
    for row_axes, activation in zip(axes, activations, strict=True):
        for ax, (what, solver) in zip(row_axes, columns, strict=True):
            ax.set(xticks=[], yticks=[])
            key = "input" if what == "input" else f"{activation}|{solver}|{what}"
            title = what if solver is None else f"{what}\n{solver}"
            if activation == activations[0]:
                ax.set_title(title, fontsize=9)
            if what == "input":
                ax.set_ylabel(activation)
            if key not in images:
                ax.text(0.5, 0.5, "the solve failed", ha="center", va="center", fontsize=8)
                continue
            picture = np.nan_to_num(np.moveaxis(images[key][0], 0, -1))
            if what == "output":  # rescaled: only the reversed image has the scale of the input
                picture = (picture - picture.min()) / max(picture.max() - picture.min(), 1e-12)
            ax.imshow(np.clip(picture, 0, 1), interpolation="nearest")
            if what == "reversed":
                (row,) = [r for r in of_images if r["activation"] == activation and r["solver"] == solver]
                ax.set_xlabel(f"ρ = {row['rho_of_images'][0]:.2g}", fontsize=9)
    save(figure, directory / "study.png")

    def shown(value: Any) -> str:
        return "more than tried" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)

    table = [
        {"case": r["case"], "solve": r["solver"], "quantity": r["quantity"], "stated": r["stated"],
         "measured": shown(r["measured"])}
        for r in rows if r["kind"] == "case"
    ]  # fmt: skip
    image_table = [
        {"activation": r["activation"], "solve": r["solver"],
         "ρ": "failed" if r["rho"] is None else f"{r['rho']:.3g}", "steps": r.get("steps"), "back": r.get("steps_back")}
        for r in of_images
    ]  # fmt: skip
    return f"{tabulate(image_table, headers='keys')}\n\n{tabulate(table, headers='keys', disable_numparse=True)}"
