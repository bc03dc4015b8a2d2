"""What a CUDA device has to show, in one table: correctness there, and the speed the project aims at on an NVIDIA H200.

    python scripts/speed_on_a_gpu.py        about 6 minutes; needs CIFAR-10 under ANODE_DATA, or the network to fetch it

Runs the CUDA tests, then every composition below in turns within one process, and the studies of memory and of budgets
at 2 and 8 steps. Tables and JSON stay under outputs/.
"""

import json
import subprocess
import sys
from collections.abc import Callable

import torch
from tabulate import tabulate

from anode_exp.bench import run_bench
from anode_exp.composition import bench_entries, folder

SQUEEZENEXT = "model=squeezenext solver=rk2 solver.n_steps=2"
FP32, BF16 = f"{SQUEEZENEXT} runtime.precision=fp32", f"{SQUEEZENEXT} runtime.precision=bf16"
FUSED = "runtime.compile=true"
RESNET = "model=resnet18 solver=euler solver.n_steps=2 runtime.precision=bf16"
ENTRIES = [
    BF16, f"{BF16} {FUSED}", FP32, f"{FP32} {FUSED}", f"{BF16} runtime.cuda_graph=false", f"{BF16} baseline=eager",
    f"{BF16} baseline=dataloader", f"{FP32} baseline=eager", RESNET, f"{RESNET} {FUSED}", f"{BF16} seeds=5",
    f"{BF16} {FUSED} seeds=5",
]  # fmt: skip


def figures(rows: dict[str, dict[str, float]]) -> list[tuple[str, str, str, bool]]:
    """(what, goal, measured, reached) of each figure."""

    def best(label: str, key: str) -> float:
        return min(rows[label][key], rows[f"{label} {FUSED}"][key])

    table: list[tuple[str, float, float, Callable[[float, float], bool]]] = [
        ("SqueezeNext RK2 bf16: epoch, s", 1.0, best(BF16, "epoch_s"), float.__le__),
        ("SqueezeNext RK2 fp32: epoch, s", 1.5, best(FP32, "epoch_s"), float.__le__),
        ("without fusion, bf16: epoch, s", 1.0, rows[BF16]["epoch_s"], float.__le__),
        ("without fusion, fp32: epoch, s", 1.5, rows[FP32]["epoch_s"], float.__le__),
        ("times the DataLoader loop", 10.0, rows[f"{BF16} baseline=dataloader"]["epoch_s"] / best(BF16, "epoch_s"),
         float.__ge__),
        ("times the eager loop on the device", 3.0, rows[f"{BF16} baseline=eager"]["epoch_s"] / best(BF16, "epoch_s"),
         float.__ge__),
        ("ResNet-18 Euler bf16: epoch, s", 2.5, best(RESNET, "epoch_s"), float.__le__),
        ("5 seeds at once over one", 2.5, rows[f"{BF16} seeds=5"]["epoch_s"] / rows[BF16]["epoch_s"], float.__le__),
        ("fp32: GB moved a step, unfused (expected 24)", 24.0, rows[FP32]["bytes_per_step"] / 1e9, float.__le__),
        ("fp32: operators a step, unfused (expected 1,750)", 1750.0, float(rows[FP32]["operators_per_step"]),
         float.__le__),
        ("fp32: step over the floor of its bytes", 1.0, 1 / rows[FP32]["of_floor"], float.__le__),
    ]  # fmt: skip
    return [
        (what, f"{'≤' if holds is float.__le__ else '≥'} {goal:g}", f"{value:,.2f}", holds(value, goal))
        for what, goal, value, holds in table
    ]


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("no CUDA device is visible")
    tests = subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/test_cuda.py"])
    entries, rounds = bench_entries(["dataset=cifar10", "recipe.batch_size=256", f"compare={json.dumps(ENTRIES)}"])
    directory = run_bench(entries, rounds, folder([], "bench"))
    rows = {row["label"]: row for row in json.loads((directory / "bench.json").read_text())["rows"]}
    for study in ("memory", "budget"):
        settings = ["study.batch_size=256", "study.repeats=5"]
        settings += ["study.n_steps=[2,8]", "study.blocks_per_stage=[1]"] if study == "memory" else ["solver.n_steps=8"]
        subprocess.run([sys.executable, "-m", "anode_exp", "study", study, *settings], check=True)
    table = [("CUDA tests", "pass", "pass" if tests.returncode == 0 else "fail", tests.returncode == 0), *figures(rows)]
    print(tabulate([(*row[:3], "yes" if row[3] else "NO") for row in table], ["figure", "goal", "measured", "reached"]))


if __name__ == "__main__":
    main()
