"""Table and plot of the BatchNorm study."""

from pathlib import Path
from typing import Any

from tabulate import tabulate

from anode_exp.report.drawing import plt, save


def report(rows: list[dict[str, Any]], directory: Path) -> str:
    """Writes ``study.png``; returns the table of the rows of ``study.jsonl``."""
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
        gaps = [row["by_time"] - row["one_set_anew"] for row in part]
        last = part[-1]
        row = {key: last[key] for key in ("model", "solver", "epoch")}
        row |= {"training loss": f"{last['train_loss']:.3f}"}
        for title, key in (("by time", "by_time"), ("one set", "one_set_kept"), ("one set anew", "one_set_anew")):
            row[f"{title}, %"] = "–" if last[key] is None else f"{100 * last[key]:.2f}"
        row |= {"gap, points": f"{100 * gaps[-1]:.1f}"}
        table.append({**row, "least to largest gap": f"{100 * min(gaps):.1f} to {100 * max(gaps):.1f}"})
    for ax in list(axes.flat)[len(runs) :]:
        ax.axis("off")
    for ax in axes[:, 0]:
        ax.set_ylabel("accuracy, %")
    handles: dict[str, Any] = {}
    for ax in axes.flat:
        handles |= {label: handle for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, fontsize=9)
    save(figure, directory / "study.png")
    return tabulate(table, headers="keys", disable_numparse=True)
