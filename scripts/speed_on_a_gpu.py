"""Check a CUDA device with one command: correctness, and the speed aimed at on an NVIDIA H200.

    python scripts/speed_on_a_gpu.py [SETTING…]        at most 8 minutes; needs no data and no network

Runs the CUDA tests, bench on the compositions below, and the studies of memory (2 and 8 steps) and budgets (4 steps):
each in its own process, with its own time limit. A part that fails or takes too long is reported, and the rest still
runs; for the last parts no time may be left. All results are in one folder, outputs/DATE/TIME-gpu, of about a megabyte:
a log and results for each part, and summary.txt.

Settings are added to every bench, and those outside recipe also to every study. A rehearsal without a GPU:

    python scripts/speed_on_a_gpu.py runtime.device=cpu recipe.batch_size=2 dataset.train_size=8
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch
from tabulate import tabulate

TOTAL_S = 480
EPOCH_STEPS = 196  # of CIFAR-10 at batch 256; random images take the same time

SQUEEZENEXT = "model=squeezenext solver=rk2 solver.n_steps=2"
FP32, BF16 = f"{SQUEEZENEXT} runtime.precision=fp32", f"{SQUEEZENEXT} runtime.precision=bf16"
FUSED, CUDNN, CONTIGUOUS = "runtime.compile=true", "runtime.cudnn_benchmark=true", "runtime.channels_last=false"
RESNET = "model=resnet18 solver=euler solver.n_steps=2 runtime.precision=bf16"
RESNET_FP32 = "model=resnet18 solver=euler solver.n_steps=2 runtime.precision=fp32"
ENTRIES = {
    "step": [
        BF16, FP32, RESNET, RESNET_FP32, f"{BF16} {CONTIGUOUS}", f"{FP32} {CONTIGUOUS}", f"{RESNET_FP32} {CONTIGUOUS}",
        f"{BF16} runtime.cuda_graph=false", f"{BF16} seeds=5", f"{BF16} baseline=eager", f"{FP32} baseline=eager",
        f"{BF16} baseline=dataloader",
    ],
    "fused": [f"{BF16} {FUSED}"],
    "cudnn_benchmark": [
        f"{entry} {CUDNN}"
        for entry in (BF16, FP32, RESNET, RESNET_FP32, f"{FP32} {CONTIGUOUS}", f"{RESNET_FP32} {CONTIGUOUS}")
    ],
    "fused_fp32": [f"{FP32} {FUSED}"],
    "fused_resnet18": [f"{RESNET} {FUSED}"],
    "fused_seeds": [f"{BF16} {FUSED} seeds=5"],
}  # fmt: skip


@dataclass
class Part:
    """A command, and its time limit in seconds."""

    name: str
    command: list[str]
    limit_s: float


def parts(settings: list[str]) -> list[Part]:
    run = [sys.executable, "-m", "anode_exp"]
    bench = [*run, "bench", "dataset=fake", "dataset.train_size=50000", "recipe.batch_size=256"]
    study = ["study.batch_size=256", "study.repeats=3"]
    study += [setting for setting in settings if not setting.startswith("recipe.")]
    memory = ["study.n_steps=[2,8]", "study.blocks_per_stage=[1]"]
    steps = {name: [*bench, f"compare={json.dumps(entries)}", *settings] for name, entries in ENTRIES.items()}
    return [
        Part("tests", [sys.executable, "-m", "pytest", "-q", "--durations=5", "tests/test_cuda.py"], 160),
        Part("step", steps.pop("step"), 80),
        Part("fused", steps.pop("fused"), 70),
        Part("memory", [*run, "study", "memory", *study, *memory], 50),
        Part("budget", [*run, "study", "budget", *study, "solver.n_steps=4"], 50),
        *(Part(name, command, 60) for name, command in steps.items()),
    ]


def take(part: Part, folder: Path, limit_s: float) -> str:
    """Run a part, save its log and results in the folder, and return the outcome."""
    log, results = folder / f"{part.name}.log", Path("outputs")
    before = set(results.glob("*/*"))
    with log.open("w") as file:
        process = subprocess.Popen(part.command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(limit_s)
        except BaseException as error:  # workers too, because the next part needs the device
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            code = None
    for left in set(results.glob("*/*")) - before:  # includes what a stopped study had written
        shutil.copytree(left, folder / part.name, dirs_exist_ok=True)
    return "passed" if code == 0 else f"stopped after {limit_s:.0f} s" if code is None else f"failed, exit code {code}"


def figures(rows: dict[str, dict[str, float]]) -> list[tuple[str, str, str, str]]:
    """(what, goal, measured, reached) of each figure; without a measurement, measured is "not measured"."""

    def epoch(*labels: str) -> float:
        """Seconds per epoch of the fastest of these that were measured."""
        return min(rows[label]["step_s"] for label in labels if label in rows) * EPOCH_STEPS

    def best(label: str) -> float:
        return epoch(label, f"{label} {FUSED}", f"{label} {CUDNN}", f"{label} {CONTIGUOUS}")

    def over(ours: str, other: str) -> float:
        return rows[ours]["step_s"] / rows[other]["step_s"]

    at_most, at_least = float.__le__, float.__ge__
    table: list[tuple[str, float | None, Callable[[], float], Callable[[float, float], bool]]] = [
        ("SqueezeNext RK2 bf16: epoch, s", 1.0, lambda: best(BF16), at_most),
        ("SqueezeNext RK2 fp32: epoch, s", 1.5, lambda: best(FP32), at_most),
        ("without fusion, bf16: epoch, s", 1.0, lambda: epoch(BF16), at_most),
        ("without fusion, fp32: epoch, s", 1.5, lambda: epoch(FP32), at_most),
        ("speedup over the DataLoader loop", 10.0, lambda: epoch(f"{BF16} baseline=dataloader") / best(BF16), at_least),
        ("speedup over the eager loop on device", 3.0, lambda: epoch(f"{BF16} baseline=eager") / best(BF16), at_least),
        ("ResNet-18 Euler bf16: epoch, s", 2.5, lambda: best(RESNET), at_most),
        ("5 seeds at once over one", 2.5, lambda: over(f"{BF16} seeds=5", BF16), at_most),
        ("fp32: GB moved per step, unfused (expected 24)", 24.0, lambda: rows[FP32]["bytes_per_step"] / 1e9, at_most),
        ("fp32: operators per step, unfused (expected 1,750)", 1750.0,
         lambda: float(rows[FP32]["operators_per_step"]), at_most),
        ("fp32: step time over its floor", 1.0, lambda: 1 / rows[FP32]["of_floor"], at_most),
        ("bf16: captured over eager step", None, lambda: over(BF16, f"{BF16} runtime.cuda_graph=false"), at_most),
        *(
            (f"{name}: {choice} over default", None,
             lambda label=label, choice=choice: over(f"{label} {choice}", label), at_most)
            for name, label in (("bf16", BF16), ("fp32", FP32), ("ResNet-18 fp32", RESNET_FP32))
            for choice in (CONTIGUOUS, CUDNN, f"{CONTIGUOUS} {CUDNN}", FUSED)
            if any(f"{label} {choice}" in entries for entries in ENTRIES.values())
        ),
    ]  # fmt: skip
    shown = []
    for what, goal, measured, holds in table:
        aim = "" if goal is None else f"{'≤' if holds is at_most else '≥'} {goal:g}"
        try:
            value = measured()
        except (KeyError, ValueError):
            shown.append((what, aim, "not measured", ""))
        else:
            shown.append((what, aim, f"{value:,.2f}", "" if goal is None else "yes" if holds(value, goal) else "NO"))
    return shown


def measured_rows(folder: Path) -> dict[str, dict[str, float]]:
    """Every row of every bench, by its label."""
    files = [folder / name / "bench.json" for name in ENTRIES]
    return {row["label"]: row for f in files if f.exists() for row in json.loads(f.read_text())["rows"]}


def summarise(folder: Path, outcomes: list[tuple[str, str, str]]) -> str:
    text = tabulate(outcomes, ["part", "outcome", "seconds"])
    text += "\n\n" + tabulate(figures(measured_rows(folder)), ["figure", "goal", "measured", "reached"])
    (folder / "summary.txt").write_text(text + "\n")
    return text


def examine(folder: Path, todo: list[Part], total_s: float = TOTAL_S) -> bool:
    """Run every part in turn within the total time, and update the summary after each; return whether all passed."""
    started = time.monotonic()
    outcomes: list[tuple[str, str, str]] = []
    for part in todo:
        print(f"{part.name} …", flush=True)
        since = time.monotonic()
        left = total_s - (since - started)
        outcome = take(part, folder, min(part.limit_s, left)) if left > 5 else "no time left"
        outcomes.append((part.name, outcome, f"{time.monotonic() - since:.0f}"))
        text = summarise(folder, outcomes)
    print(text)
    return all(outcome == "passed" for _, outcome, _ in outcomes)


def main() -> None:
    settings = sys.argv[1:]
    if not torch.cuda.is_available() and "runtime.device=cpu" not in settings:
        sys.exit("no CUDA device is visible; for a rehearsal without one see the top of this script")
    os.chdir(Path(__file__).parents[1])
    folder = Path("outputs") / f"{datetime.now():%Y-%m-%d/%H-%M-%S}-gpu"
    folder.mkdir(parents=True)
    smi = shutil.which("nvidia-smi")
    machine = subprocess.run([smi, "-q"], capture_output=True, text=True).stdout if smi else ""
    (folder / "machine.txt").write_text(f"torch {torch.__version__}\n{torch.__config__.show()}\n{machine}")
    passed = examine(folder, parts(settings))
    print(f"\n{folder}")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
