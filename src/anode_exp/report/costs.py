"""Memory, time and evaluations of PNODE's methods against the number of steps, and the paper's claims."""

import math
from collections.abc import Callable, Iterable
from typing import Any

from anode_exp.records.cells import Record
from anode_exp.records.reading import Row, read_lines
from anode_exp.report.drawing import labels_of, peak_of
from anode_exp.report.statistics import MISSING, Group

IMAGES = 50_000
"""Training images of CIFAR-10, one epoch."""

STAGES = {"euler": 1, "rk2": 2, "heun": 2, "bosh3": 3, "rk4": 4, "dopri5": 6}
"""Evaluations of f in a step of fixed size. The last stage of Bosh3 and Dopri5 is only for the error estimate."""

Formula = tuple[str, Callable[[int, int], tuple[int, int]]]
NAMES: dict[str, tuple[str, Formula | None]] = {
    "full_backprop": ("naive (full backpropagation)", ("Ns + 0", lambda n, s: (n * s, 0))),
    "torchdiffeq": ("vanilla, torchdiffeq", ("Ns + Ns", lambda n, s: (n * s, n * s))),
    "reverse_adjoint": ("vanilla, this project", ("Ns + Ns", lambda n, s: (n * s, n * s))),
    "dto_checkpoint": ("ANODE", ("Ns + Ns", lambda n, s: (n * s, n * s))),
    "step_checkpoint keep": ("ACA", ("Ns + 2Ns + 1", lambda n, s: (n * s, 2 * n * s + 1))),
    "stage_checkpoint keep": ("PNODE, every stage kept", ("Ns + Ns", lambda n, s: (n * s, n * s))),
    "stage_checkpoint rebuild": ("PNODE, stages solved again", ("Ns + 2Ns", lambda n, s: (n * s, 2 * n * s))),
    "revolve stage 3": ("PNODE, binomial, 3 states", None),
    "budget": ("byte budget", None),
    "alf reversible": ("reversible leapfrog", None),
}
"""The name of each method of ``study memory`` in PNODE's comparison, and the paper's formula for evaluations of f."""

Table = tuple[str, list[dict[str, str]]]


def cost_tables(rows: list[Row]) -> list[Table]:
    """Tables of ``study memory``'s rows over the number of steps, one row per method."""
    naive = {row["n_steps"]: row["step_time_s"] for row in rows if row["gradient"] == "full_backprop"}
    batch = rows[0]["batch_size"]

    def evaluations(row: Row) -> str:
        return f"{row['nfe_forward'] // row['blocks']} + {row['nfe_backward'] // row['blocks']}"

    def over_naive(row: Row) -> str:
        ratio = f" ×{row['step_time_s'] / naive[row['n_steps']]:.2f}" if row["n_steps"] in naive else ""
        return f"{row['step_time_s']:.3g}{ratio}"

    cells: list[tuple[str, Callable[[Row], str]]] = [
        ("Peak of a training step, MB", lambda row: f"{peak_of(row) / 1e6:,.0f}"),
        (f"Time of a training step, s, batch {batch}, and relative to naive; median of {_turns(rows)}", over_naive),
        (f"Time of an epoch of {IMAGES:,} images, s, training steps only",
         lambda row: f"{row['step_time_s'] * math.ceil(IMAGES / batch):,.0f}"),
        ("Evaluations of f per step in each block, forward + backward", evaluations),
    ]  # fmt: skip
    if rows[0]["device_bytes"] is not None:
        cells.insert(1, ("The whole device's memory in use, MB", lambda row: f"{row['device_bytes'] / 1e6:,.0f}"))
    known = list(NAMES)
    labels = sorted(labels_of(rows), key=lambda x: known.index(x) if x in known else len(known))
    tables = []
    for caption, cell in cells:
        table = []
        for label in labels:
            name, formula = NAMES.get(label, (label, None))
            line = {"method": name}
            if cell is evaluations:
                line["the paper's"] = formula[0] if formula else MISSING
            line |= {f"N = {row['n_steps']}": cell(row) for row in rows if row["gradient"] == label}
            table.append(line)
        tables.append((caption, table))
    return tables


def _turns(rows: list[Row]) -> str:
    """How often each step was timed, by the number of steps where that differs."""
    by_turns: dict[int, list[str]] = {}
    for row in rows:
        steps = by_turns.setdefault(row.get("turns", 15), [])
        if str(row["n_steps"]) not in steps:
            steps.append(str(row["n_steps"]))
    most, *others = sorted(by_turns, reverse=True)
    fewer = ", ".join(f"{turns} at N = {', '.join(by_turns[turns])}" for turns in others)
    return f"{most} turns" + (f" ({fewer})" if fewer else "")


def other_evaluations(rows: list[Row]) -> list[str]:
    """The methods that do not evaluate f as often as the paper's formula says."""
    names = []
    for row in rows:
        name, formula = NAMES.get(row["gradient"], ("", None))
        if formula is None or row["solver"] not in STAGES:
            continue
        stated = formula[1](row["n_steps"], STAGES[row["solver"]])
        if stated != (row["nfe_forward"] // row["blocks"], row["nfe_backward"] // row["blocks"]):
            names.append(name)
    return list(dict.fromkeys(names))


def _range(values: Iterable[float]) -> str:
    numbers = list(values)
    low, high = f"{min(numbers):.2f}", f"{max(numbers):.2f}"
    return f"×{low}" if low == high else f"×{low} to ×{high}"


def _by_steps(rows: list[Row], value: Callable[[Row], float]) -> dict[str, dict[int, float]]:
    """A value of every method by its number of steps."""
    return {x: {row["n_steps"]: value(row) for row in rows if row["gradient"] == x} for x in labels_of(rows)}


def _vanilla(rows: list[Row]) -> tuple[str, str, str]:
    times = _by_steps(rows, lambda row: row["step_time_s"])
    pnode = times["stage_checkpoint keep"]
    ours = {n: times["reverse_adjoint"][n] / t for n, t in pnode.items()}
    if "torchdiffeq" not in times:
        return "this project's vanilla only; torchdiffeq has no such fixed steps", _range(ours.values()), MISSING
    theirs = {n: times["torchdiffeq"][n] / t for n, t in pnode.items()}
    most = max(theirs.values())
    holds = "yes" if most >= 2 else f"up to ×{most:.2f}" if most > 1.05 else "no"
    said = f"torchdiffeq's {_range(theirs.values())}, this project's {_range(ours.values())} of PNODE's time"
    return said, _range(theirs.values()), holds


def _reverse_accurate(rows: list[Row]) -> tuple[str, str, str]:
    times = _by_steps(rows, lambda row: row["step_time_s"])
    pnode = times["stage_checkpoint keep"]
    over = {name: {n: times[label][n] / t for n, t in pnode.items()}
            for name, label in (("ANODE", "dto_checkpoint"), ("ACA", "step_checkpoint keep"))}  # fmt: skip
    best = [min(over[name][n] for name in over) for n in pnode]
    holds = "yes" if max(best) >= 2.3 else f"up to ×{max(best):.2f}" if max(best) > 1.05 else "no"
    said = ", ".join(f"{name} {_range(ratios.values())}" for name, ratios in over.items()) + " of PNODE's time"
    return said, _range(best), holds


def _memory(rows: list[Row]) -> tuple[str, str, str]:
    peaks = _by_steps(rows, peak_of)
    own = ("stage_checkpoint keep", "stage_checkpoint rebuild", "revolve stage 3")
    steps = list(peaks[own[0]])
    least = {n: min(peaks[x][n] for x in own) for n in steps}
    others = {n: min(peaks[x][n] for x in ("full_backprop", "dto_checkpoint", "step_checkpoint keep")) for n in steps}
    ratios = {n: others[n] / least[n] for n in steps}
    n = steps[-1]
    said = f"N = {n}: the best of naive, ANODE, ACA {others[n] / 1e6:,.0f} MB, PNODE's least {least[n] / 1e6:,.0f} MB"
    if "alf reversible" in peaks:
        said += f", reversible {peaks['alf reversible'][n] / 1e6:,.0f} MB"
    below = [n for n in steps if ratios[n] < 0.995]
    holds = "yes" if not below else f"not at N = {', '.join(map(str, below))}"
    return said, _range(ratios.values()), holds


_EXACT = {"full_backprop", "dto_checkpoint", "step_checkpoint keep", "stage_checkpoint keep"}

OF_COSTS: dict[str, tuple[Callable[[list[Row]], tuple[str, str, str]], set[str]]] = {
    "faster_than_vanilla": (_vanilla, {"stage_checkpoint keep", "reverse_adjoint"}),
    "faster_than_reverse_accurate": (_reverse_accurate, _EXACT - {"full_backprop"}),
    "least_memory": (_memory, {*_EXACT, "stage_checkpoint rebuild", "revolve stage 3"}),
}
"""How each claim is measured, and the methods that a study must have for it."""


def _implicit(groups: list[Group]) -> tuple[str, str, str]:
    parts, best = [], {}
    for group in (g for g in groups if g.runs):
        scores = [r["best_test_mae"] for run in group.runs if (r := run.results) and r.get("best_test_mae") is not None]
        ended = sum(run.status == "completed" for run in group.runs)
        below = f", best errors {min(scores):.1e} to {max(scores):.1e}" if scores else ""
        parts.append(f"{group.label}: {ended} of {len(group.runs)} trained to the end{below}")
        best[group.method] = min(scores, default=math.inf)
    implicit = min((v for k, v in best.items() if k != "explicit"), default=math.inf)
    explicit = best.get("explicit", math.inf)
    ratio = f"×{explicit / implicit:,.0f}" if math.isfinite(explicit) and math.isfinite(implicit) else MISSING
    return "; ".join(parts), ratio, "yes" if implicit < 0.01 else "no" if parts else MISSING


def claim_rows(spec: dict[str, Any], records: list[Record], stiff: list[Group]) -> list[dict[str, str]]:
    """Each of a paper's claims with the results of the recorded studies and runs, setting by setting."""
    memory = [r.directory for r in records if r.cell.get("study") == "memory"]
    costs = [rows for folder in memory if (rows := read_lines(folder / "study.jsonl"))]
    table = []
    for name, said in spec["claims"].items():
        found = []
        if name in OF_COSTS:
            measure, needed = OF_COSTS[name]
            for rows in costs:
                steps = sorted({row["n_steps"] for row in rows})
                setting = f"{rows[0]['solver']}, batch {rows[0]['batch_size']}, N = {steps[0]} to {steps[-1]}"
                lacking = sorted(needed.difference(labels_of(rows)))
                without = f"not measured: {'; '.join(NAMES[label][0] for label in lacking)}"
                found.append((setting, *((without, MISSING, MISSING) if lacking else measure(rows))))
        elif any(group.runs for group in stiff):
            epochs = max((len(run.epochs) for group in stiff for run in group.runs), default=0)
            found.append((f"Robertson's reaction, {epochs} epochs", *_implicit(stiff)))
        for i, (setting, ours, ratio, holds) in enumerate(found or [(MISSING, "not run", MISSING, MISSING)]):
            first = {"claim": said["claim"], "why": said["why"]} if i == 0 else {"claim": "", "why": ""}
            table.append({"claim": first["claim"], "setting": setting, "ours": ours, "ratio": ratio, "holds": holds,
                          "why": first["why"]})  # fmt: skip
    return table
