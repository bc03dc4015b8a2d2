"""Train by the command line, then load the run in Python and solve with other numbers of steps.

    python examples/recorded_run.py [FOLDER]      (about 20 seconds)

If a network has learned an ODE, and not only one discretisation of it, its accuracy hardly depends on the number of
steps.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from anode_exp import TimeGrid, load_run
from anode_exp.build import assemble, build_data
from anode_exp.models import ode_blocks

SETTINGS = ["dataset=digits", "dataset.train_size=400", "model=resnet4", "recipe=modern", "recipe.epochs=3",
            "recipe.batch_size=50", "runtime.device=cpu"]  # fmt: skip


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()) / "run"
    train = [sys.executable, "-m", "anode_exp", "train", *SETTINGS, f"hydra.run.dir={folder}"]
    subprocess.run(train, check=True)

    run = load_run(folder, "last")
    print(f"losses of the epochs: {[round(line['train_loss'], 3) for line in run.metrics]}")
    data = assemble(run.config, build_data(run.config.dataset, torch.device("cpu"))).data
    for n_steps in (1, 2, 4, 8):
        for block in ode_blocks(run.network):
            block.grid = TimeGrid(n_steps)
        with torch.no_grad():
            correct = total = 0
            for images, labels in data.evaluation("test", 100):
                correct += int((run.network(images).argmax(1) == labels).sum())
                total += len(labels)
        print(f"{n_steps} steps: test accuracy {correct / total:.1%}")


if __name__ == "__main__":
    main()
