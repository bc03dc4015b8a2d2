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


def _with_parts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, and after each split error a row for either part."""
    found = []
    for row in rows:
        found.append(row)
        found += [
            {**row, "gradient": f"{row['gradient']}: {part}", "relative_error": row[f"{part}_error"]}
            for part in ("reversal", "inconsistency")
            if f"{part}_error" in row
        ]
    return found


def order_in_dt(rows: list[dict[str, Any]]) -> float | None:
    """p of error ~ dt^p: least squares over the finer half of the steps, where there are errors beyond rounding."""
    points = sorted((r["n_steps"], r["relative_error"]) for r in rows if r["n_steps"] and r["relative_error"])
    points = [p for p in points[len(points) // 2 :] if p[1] > 1e-12]
    if len(points) < 2:
        return None
    return float(-np.polyfit(np.log([p[0] for p in points]), np.log([p[1] for p in points]), 1)[0])


def gradient_error_report(directory: Path) -> str:
    """Writes ``study.png``; returns the tables of ``study.jsonl``."""
    rows = _with_parts([json.loads(line) for line in (directory / "study.jsonl").read_text().splitlines()])
    over_training = len({row["epoch"] for row in rows}) > 1
    panels: list[tuple[str, str, list[dict[str, Any]]]] = []
    for solver, adaptive in dict.fromkeys((row["solver"], row["n_steps"] is None) for row in rows):
        part = [r for r in rows if r["solver"] == solver and (r["n_steps"] is None) == adaptive]
        x = "epoch" if over_training else "tolerance" if adaptive else "n_steps"
        panels.append((f"{solver}, adaptive" if adaptive else solver, x, part))
    worst = {k: max(r["relative_error"] or 0.0 for r in rows if r["gradient"] == k) for k in _labels(rows)}
    exact = [label for label, error in worst.items() if error < 1e-9]
    # The stored adjoint's error is the inconsistency; one curve is enough.
    twice = [label for label in worst if label.endswith(": inconsistency") and "stored_adjoint" in worst]
    size = (max(5 * len(panels), 8), 5)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    text = []
    for ax, (title, x, part) in zip(axes[0], panels, strict=True):
        shown = [r for r in part if r["relative_error"] and r["gradient"] not in [*exact, *twice]]
        _draw(ax, shown, x, lambda row: row["relative_error"])
        ax.set(title=title, xlabel=x, yscale="log", ylabel="relative gradient error")
        if x == "epoch":
            ax.set_xscale("linear")
        if x == "tolerance":
            ax.set_xscale("log")
            ax.invert_xaxis()
        table = []
        for label in _labels(part):
            mine = [r for r in part if r["gradient"] == label]
            cells = {f"{x}={r[x]:g}": "failed" if r["relative_error"] is None else r["relative_error"] for r in mine}
            order = order_in_dt(mine) if x == "n_steps" else None
            table.append({title: label, **cells, **({"order in dt": f"{order:.2f}"} if order is not None else {})})
        text.append(tabulate(table, headers="keys", floatfmt=".2e"))
    axes[0][0].legend(fontsize=8)
    if exact:
        most = max(worst[label] for label in exact)
        figure.suptitle(f"not drawn, at most {most:.0e}: {', '.join(exact)}", fontsize=9)
    figure.savefig(directory / "study.png", dpi=110)
    plt.close(figure)
    return "\n\n".join(text)


def reversibility_report(directory: Path) -> str:
    """Writes ``study.png`` from ``images.npz``; returns the tables of ``study.jsonl``."""
    rows = [json.loads(line) for line in (directory / "study.jsonl").read_text().splitlines()]
    images = np.load(directory / "images.npz")
    of_images = [r for r in rows if r["kind"] == "image"]
    solvers = list(dict.fromkeys(r["solver"] for r in of_images))
    activations = list(dict.fromkeys(r["activation"] for r in of_images))
    columns = [("input", None)] + [(what, solver) for solver in solvers for what in ("output", "reversed")]
    figure, axes = plt.subplots(
        len(activations), len(columns), figsize=(2.1 * len(columns), 2.4 * len(activations)), layout="constrained"
    )
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
            if what == "output":  # its values mean nothing in themselves; the reversed one is shown as the input is
                picture = (picture - picture.min()) / max(picture.max() - picture.min(), 1e-12)
            ax.imshow(np.clip(picture, 0, 1), interpolation="nearest")
            if what == "reversed":
                (row,) = [r for r in of_images if r["activation"] == activation and r["solver"] == solver]
                ax.set_xlabel(f"ρ = {row['rho_of_images'][0]:.2g}", fontsize=9)
    figure.savefig(directory / "study.png", dpi=110)
    plt.close(figure)

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


def budget_report(directory: Path) -> str:
    """Writes ``study.png``; returns the table of ``study.jsonl``."""
    rows = [json.loads(line) for line in (directory / "study.jsonl").read_text().splitlines()]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    budgets = [r["budget_bytes"] / 1e6 for r in rows]
    left.plot(budgets, budgets, color="grey", linestyle=":", label="budget")
    left.plot(budgets, [r["predicted_bytes"] / 1e6 for r in rows], marker="x", label="predicted", linewidth=1.2)
    left.plot(budgets, [_peak(r) / 1e6 for r in rows], marker="o", fillstyle="none", label="measured", linewidth=0)
    left.set(xlabel="budget, MB", ylabel="peak, MB", xscale="log", yscale="log")
    right.plot(budgets, [r["step_time_s"] / rows[-1]["step_time_s"] for r in rows], marker="s", linewidth=1.2)
    right.set(xlabel="budget, MB", ylabel="time of a step over the largest budget's", xscale="log")
    for ax in (left, right):
        ax.grid(alpha=0.3)
    left.legend()
    figure.savefig(directory / "study.png", dpi=110)
    plt.close(figure)
    table = [
        {
            "budget": f"{r['budget_bytes'] / 1e6:,.1f} MB",
            "predicted": f"{r['predicted_bytes'] / 1e6:,.1f} MB",
            "measured": f"{_peak(r) / 1e6:,.1f} MB",
            "step, ms": f"{r['step_time_s'] * 1e3:,.0f}",
            "over the last": f"×{r['step_time_s'] / rows[-1]['step_time_s']:.2f}",
            "policies of the blocks": ", ".join(r["policies"]),
        }
        for r in rows
    ]
    return tabulate(table, headers="keys")


def batchnorm_report(directory: Path) -> str:
    """Writes ``study.png``; returns the table of ``study.jsonl``."""
    rows = [json.loads(line) for line in (directory / "study.jsonl").read_text().splitlines()]
    runs = list(dict.fromkeys(row["run"] for row in rows))
    columns = min(3, len(runs))
    lines = -(-len(runs) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(1 + 3.8 * columns, 0.7 + 3.1 * lines), layout="constrained", squeeze=False, sharey=True
    )
    curves = (
        ("by_time", "test, statistics by time", "-", "o"),
        ("one_set_kept", "test, one set, kept in training", "--", "s"),
        ("one_set_anew", "test, one set, estimated anew", ":", "^"),
        ("train_accuracy", "training batches, by their own statistics", "-.", "x"),
    )
    table = []
    for ax, run in zip(axes.flat, runs, strict=False):
        part = [row for row in rows if row["run"] == run]
        for key, label, line, marker in curves:
            points = [(row["epoch"], 100 * row[key]) for row in part if row[key] is not None]
            if points:
                ax.plot(*zip(*points, strict=True), line, marker=marker, markersize=4, linewidth=1.2, label=label)
        ax.set(title=f"{part[0]['model']}, {part[0]['solver']}", xlabel="epoch")
        ax.grid(alpha=0.3)
        gaps = [row["by_time"] - row["one_set_anew"] for row in part]
        last = part[-1]
        table.append(
            {
                "model": last["model"],
                "solver": last["solver"],
                "epoch": last["epoch"],
                "training loss": f"{last['train_loss']:.3f}",
                "by time, %": f"{100 * last['by_time']:.2f}",
                "one set, %": "–" if last["one_set_kept"] is None else f"{100 * last['one_set_kept']:.2f}",
                "one set anew, %": f"{100 * last['one_set_anew']:.2f}",
                "gap, points": f"{100 * gaps[-1]:.1f}",
                "least to largest gap": f"{100 * min(gaps):.1f} to {100 * max(gaps):.1f}",
            }
        )
    for ax in list(axes.flat)[len(runs) :]:
        ax.axis("off")
    for ax in axes[:, 0]:
        ax.set_ylabel("accuracy, %")
    handles: dict[str, Any] = {}
    for ax in axes.flat:
        handles |= {label: handle for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, fontsize=9)
    figure.savefig(directory / "study.png", dpi=110)
    plt.close(figure)
    return tabulate(table, headers="keys", disable_numparse=True)


def evolution_report(directory: Path) -> str:
    """Writes ``study.png`` from ``kernels.npz``; returns the table of ``study.jsonl``."""
    rows = [json.loads(line) for line in (directory / "study.jsonl").read_text().splitlines()]
    kernels = np.load(directory / "kernels.npz")
    times = np.linspace(0, 1, len(rows[0]["moved"]))
    figure, axes = plt.subplots(
        len(rows), len(times), figsize=(1.5 * len(times), 1.7 * len(rows)), layout="constrained", squeeze=False
    )
    for row, row_axes in zip(rows, axes, strict=True):
        name = f"{row['block']}.{row['convolution']}"
        limit = np.abs(kernels[name]).max()
        for ax, t, kernel in zip(row_axes, times, kernels[name], strict=True):
            ax.imshow(kernel, cmap="coolwarm", vmin=-limit, vmax=limit)
            for (y, x), value in np.ndenumerate(kernel):
                ax.text(x, y, f"{value / limit:.2f}", ha="center", va="center", fontsize=6)
            ax.set(xticks=[], yticks=[], title=f"t = {t:.1f}" if row is rows[0] else "")
        row_axes[0].set_ylabel(f"block {row['block']}\nconvolution {row['convolution']}", fontsize=8)
    figure.savefig(directory / "study.png", dpi=110)
    plt.close(figure)
    table = [
        {
            "block": r["block"],
            "convolution": r["convolution"],
            "kernel": "×".join(map(str, r["kernel"])),
            **{
                name: f"{r[key]:.3f}" if key in r else "–"
                for name, key in (("τ", "tau"), ("υ", "upsilon"), ("ρ", "rho"))
            },
            **{f"moved, t = {t:g}": f"{m:.1%}" for t, m in zip(times, r["moved"], strict=True) if t in (0.4, 1.0)},
            "cosine, t = 1": f"{r['cosine'][-1]:.3f}",
        }
        for r in rows
    ]
    return tabulate(table, headers="keys", disable_numparse=True)


REPORTS = {
    "batchnorm": batchnorm_report,
    "budget": budget_report,
    "evolution": evolution_report,
    "memory": memory_report,
    "gradient_error": gradient_error_report,
    "reversibility": reversibility_report,
}
