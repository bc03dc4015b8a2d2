"""Draw docs/overview.png, the picture of the README, from the recorded studies in docs/studies.

python scripts/overview_picture.py
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parents[1] / "docs"
MEMORY = {  # gradient mode in the study: (folder, name in the picture, line)
    "full_backprop": ("memory", "full_backprop", "o-C3"),
    "dto_checkpoint": ("memory", "dto_checkpoint (ANODE)", "s-C0"),
    "step_checkpoint keep": ("memory", "step_checkpoint (ACA)", "^-C1"),
    "stage_checkpoint rebuild": ("memory", "stage_checkpoint (PNODE)", "v-C2"),
    "reverse_adjoint": ("memory", "reverse_adjoint (Neural ODE)", "x:k"),
    "alf reversible": ("memory_reversible", "reversible, solver=alf (MALI)", "D-C4"),
}
ERRORS = {
    ("reverse_adjoint", "fp64"): ("reverse_adjoint (Neural ODE)", "x:k"),
    ("full_backprop", "fp32"): ("every exact mode, in float32", "o--C7"),
    ("stage_checkpoint", "fp64"): ("stage_checkpoint (PNODE)", "v-C2"),
    ("step_checkpoint", "fp64"): ("step_checkpoint (ACA)", "^-C1"),
    ("dto_checkpoint", "fp64"): ("dto_checkpoint (ANODE)", "s-C0"),
}
STEPS = (1, 2, 4, 8, 16)
SMALLEST = 1e-17  # drawn where the error is 0


def rows(folder: str) -> list[dict]:
    return [json.loads(line) for line in (DOCS / "studies" / folder / "study.jsonl").read_text().splitlines()]


def main() -> None:
    figure, (memory, error) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for mode, (folder, label, line) in MEMORY.items():
        found = {r["n_steps"]: r for r in rows(folder) if r["gradient"] == mode and r["blocks_per_stage"] == 1}
        memory.plot(STEPS, [found[n]["counted_bytes"] / 1e6 for n in STEPS], line, label=label)
    memory.set(ylabel="peak memory of a training step, MB", title="Memory (SqueezeNext, RK2, batch 32)")
    for (mode, precision), (label, line) in ERRORS.items():
        found = {
            r["n_steps"]: max(r["relative_error"], SMALLEST)
            for r in rows("gradient_error")
            if (r["solver"], r["gradient"], r["precision"], r["tolerance"]) == ("rk4", mode, precision, None)
        }
        error.plot(STEPS, [found[n] for n in STEPS], line, label=label)
    error.set(ylabel="distance from full backpropagation, float64", title="Error of the gradient (SqueezeNext, RK4)")
    for axes in (memory, error):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(STEPS, [str(n) for n in STEPS])
        axes.set_xlabel("steps of each ODE solve")
        axes.grid(alpha=0.3)
    memory.legend(fontsize=8)
    error.legend(fontsize=8, loc="center right")
    figure.savefig(DOCS / "overview.png", dpi=110)


if __name__ == "__main__":
    main()
