"""How far evolving weights move, and in which direction."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from anode_exp.config.schema import StudyConfig, TrainConfig
from anode_exp.models import Evolution, ReactionDiffusionAdvection, ode_blocks
from anode_exp.records.reading import Row
from anode_exp.runs import load_run

TIMES = 6
"""Times shown, from 0 to 1."""


@torch.no_grad()
def kernels_over_time(network: nn.Module) -> Iterator[tuple[Row, Tensor]]:
    """For every evolving convolution its coefficients and movement, and the kernel that moves most.

    Yields:
        Row: block, convolution, kernel size, root mean square of each coefficient, and for each of ``TIMES`` equally
        spaced times ‖w(t) − w0‖/‖w0‖ (``moved``) and the cosine between w(t) and w0 (``cosine``), which scaling
        leaves at 1. Kernel: [TIMES, k, k] of the pair of channels for which ‖w(1) − w0‖ is largest.
    """
    for i, block in enumerate(ode_blocks(network)):
        evolution = block.evolution
        if not isinstance(evolution, Evolution):
            continue
        weights = list(block.f.parameters())
        for j, (place, flow) in enumerate(zip(evolution.places, evolution.flows, strict=True)):
            assert isinstance(flow, ReactionDiffusionAdvection)
            w0 = weights[place]
            w = flow.evolve(w0, 0.0, 1 / (TIMES - 1), TIMES, evolution.n_steps)
            moved = (w - w0).flatten(1).norm(dim=1) / w0.norm()
            cosine = torch.nn.functional.cosine_similarity(w.flatten(1), w0.flatten()[None], dim=1)
            most = (w[-1] - w0).flatten(2).norm(dim=2).argmax()
            row = {"block": i, "convolution": j, "kernel": list(w0.shape[2:])}
            row |= {name: p.square().mean().sqrt().item() for name, p in flow.named_parameters()}
            row |= {"moved": moved.tolist(), "cosine": cosine.tolist()}
            yield row, w.flatten(1, 2)[:, most]


def rows(config: TrainConfig, study: StudyConfig, outputs: int, batch: None, directory: Path) -> Iterator[Row]:
    assert study.run is not None
    kernels = {}
    for row, kernel in kernels_over_time(load_run(study.run, study.checkpoint).network):
        kernels[f"{row['block']}.{row['convolution']}"] = kernel.numpy()
        yield row
    np.savez_compressed(directory / "kernels.npz", **kernels)  # type: ignore[arg-type]
