"""Count the channels that a trained network uses: those that enter an ODE block, and those that the block changes.

    python examples/live_channels.py FOLDER [FOLDER ...]      (runs of image data; about a second per kept epoch)

A channel after a ReLU can die: it is 0 for every image, so its gradient is 0 too, and it rarely comes back. A wrong
gradient can do this to a whole block: trained by the reverse-time adjoint for the paper's 350 epochs, the block of
ResNet-4 ends by returning its input. A run with runtime.keep_every=10 shows when.
"""

import sys
from pathlib import Path

import torch

from anode_exp import load_run
from anode_exp.build import assemble, build_data
from anode_exp.errors import UserError
from anode_exp.models import ode_blocks
from anode_exp.records.checkpoints import Checkpoints


def live(x: torch.Tensor, scale: torch.Tensor) -> int:
    """How many channels of x [B, C, H, W] have a value above 1e-6 scale."""
    return int((x.abs().amax((0, 2, 3)) > 1e-6 * scale).sum())


def show(folder: Path, n_images: int = 2000) -> None:
    kept = [str(epoch) for epoch in Checkpoints(folder / "checkpoints").epochs()] or ["last"]
    config = load_run(folder, kept[-1]).config
    data = assemble(config, build_data(config.dataset, torch.device("cpu"))).data
    images, _ = next(iter(data.evaluation("test", n_images)))
    print(f"{folder}, {len(images)} test images")
    for checkpoint in kept:
        run = load_run(folder, checkpoint)
        solves: list[tuple[torch.Tensor, torch.Tensor]] = []
        for block in ode_blocks(run.network):
            block.register_forward_hook(lambda _, y0, y1, solves=solves: solves.append((y0[0], y1)))
        with torch.no_grad():
            run.network(images)
        if not solves:
            raise UserError(f"{folder}: the network has no ODE blocks; give a run with model.block=ode")
        for number, (y0, y1) in enumerate(solves, 1):
            change, scale = y1 - y0, y0.abs().max()
            print(
                f"epoch {run.epoch:3}, block {number}: of {y0.shape[1]} channels {live(y0, scale)} enter, "
                f"{live(change, scale)} change; |y(1) - y(0)| / |y(0)| = {change.norm() / y0.norm():.3f}"
            )


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit("give the folders of one or more runs, such as outputs/DATE/TIME")
    try:
        for name in sys.argv[1:]:
            show(Path(name))
    except UserError as mistake:
        sys.exit(str(mistake))
