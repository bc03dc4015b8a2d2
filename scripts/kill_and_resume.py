"""Kill runs with SIGKILL at random moments, resume each, and compare its end with that of a run never killed.

    python scripts/kill_and_resume.py [KILLS]      (20 take about 6 minutes on 2 cores)

Each run trains SqueezeNext on augmented digits for four epochs. Its last weights, momentum and buffers must equal the
unkilled run's bit for bit, and its curves must contain every epoch once. Exits with 1 if any differs.
"""

import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

SETTINGS = [
    "dataset=digits", "dataset.train_size=160", "dataset.test_size=50", "dataset.crop_padding=4", "dataset.flip=true",
    "model=squeezenext", "solver=rk2", "recipe.batch_size=32", "recipe.epochs=4", "runtime.device=cpu",
]  # fmt: skip
TRAIN = [sys.executable, "-m", "anode_exp", "train"]


def end(run: Path) -> list[torch.Tensor]:
    state = torch.load(run / "checkpoints" / "last.pt", weights_only=True)
    momentum = [s["momentum_buffer"] for _, s in sorted(state["optimizer"]["state"].items())]
    return [*state["network"].values(), *momentum]


def curve(run: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(m["epoch"], m["step_losses"], m["test_accuracy"]) for m in lines]


def main() -> None:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    chance = random.Random(0)
    folder = Path(tempfile.mkdtemp())
    started = time.monotonic()
    subprocess.run([*TRAIN, *SETTINGS, f"hydra.run.dir={folder / 'truth'}"], check=True, stdout=subprocess.DEVNULL)
    whole = time.monotonic() - started
    print(f"never killed: {whole:.1f} s")
    truth, truth_curve = end(folder / "truth"), curve(folder / "truth")
    differing = 0
    for i in range(kills):
        run = folder / f"run{i}"
        process = subprocess.Popen([*TRAIN, *SETTINGS, f"hydra.run.dir={run}"], stdout=subprocess.DEVNULL)
        while not (run / "config.yaml").exists():  # before this there is no run to resume
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.45 * whole))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        code = process.wait()
        left = sorted(f.name for f in (run / "checkpoints").iterdir())
        epochs = len(curve(run)) if (run / "metrics.jsonl").exists() else 0
        if not (run / "results.json").exists():
            subprocess.run([*TRAIN, f"resume={run}"], check=True, stdout=subprocess.DEVNULL)
        same = all(torch.equal(a, b) for a, b in zip(end(run), truth, strict=True)) and curve(run) == truth_curve
        differing += not same
        ending = "killed" if code == -signal.SIGKILL else f"ended with {code} before the kill"
        print(f"{i + 1:3d}  {ending} with {epochs} epochs recorded, {left or 'no checkpoint'}: "
              f"{'bit-identical' if same else 'DIFFERS'}", flush=True)  # fmt: skip
    print(f"{kills - differing} of {kills} bit-identical")
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
