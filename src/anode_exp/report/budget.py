"""Table and plot of the budget study."""

from pathlib import Path
from typing import Any

from tabulate import tabulate

from anode_exp.report.drawing import peak_of, plt, save


def report(rows: list[dict[str, Any]], directory: Path) -> str:
    """Writes ``study.png``; returns the table of the rows of ``study.jsonl``."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    budgets = [r["budget_bytes"] / 1e6 for r in rows]
    left.plot(budgets, budgets, color="grey", linestyle=":", label="budget")
    left.plot(budgets, [r["predicted_bytes"] / 1e6 for r in rows], marker="x", label="predicted", linewidth=1.2)
    left.plot(budgets, [peak_of(r) / 1e6 for r in rows], marker="o", fillstyle="none", label="measured", linewidth=0)
    left.set(xlabel="budget, MB", ylabel="peak, MB", xscale="log", yscale="log")
    right.plot(budgets, [r["step_time_s"] / rows[-1]["step_time_s"] for r in rows], marker="s", linewidth=1.2)
    right.set(xlabel="budget, MB", ylabel="time of a step, relative to the largest budget", xscale="log")
    left.legend()
    save(figure, directory / "study.png")
    table = []
    for r in rows:
        sizes = {"budget": r["budget_bytes"], "predicted": r["predicted_bytes"], "measured": peak_of(r)}
        line = {name: f"{size / 1e6:,.1f} MB" for name, size in sizes.items()}
        line |= {"step, ms": f"{r['step_time_s'] * 1e3:,.0f}"}
        line |= {"relative to the last": f"×{r['step_time_s'] / rows[-1]['step_time_s']:.2f}"}
        table.append({**line, "policies of the blocks": ", ".join(r["policies"])})
    return tabulate(table, headers="keys")
