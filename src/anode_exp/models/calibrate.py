"""Running statistics of a trained network, estimated again."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from anode_exp.models import TimedBatchNorm, take_evaluations


@torch.no_grad()
def calibrate_norms(
    network: nn.Module, autocast: Callable[[], torch.autocast], batches: Iterable[tuple[Tensor, Tensor]]
) -> None:
    """Set every BatchNorm's running statistics to the mean over its evaluations of batch statistics in training.

    Those that leave running statistics unchanged, as in Newton's iterations and rejected steps, do not count.
    """
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [(m.momentum, m.num_batches_tracked) for m in norms]
    for m in norms:
        m.momentum = None  # the mean of all that were counted, in a buffer, so that a rejected step does not count
        if isinstance(m, TimedBatchNorm):
            m.row_weight.zero_()
        elif m.running_mean is not None:
            m.num_batches_tracked = torch.zeros((), dtype=torch.long, device=m.running_mean.device)
    network.train()
    for images, _ in batches:
        with autocast():
            network(images)
    network.eval()
    for m, (momentum, counted) in zip(norms, before, strict=True):
        m.momentum, m.num_batches_tracked = momentum, counted
        if isinstance(m, TimedBatchNorm):
            m.row_weight.clamp_(max=1.0)
    take_evaluations(network)
