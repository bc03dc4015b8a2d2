"""Running statistics of a trained network, estimated again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from anode_exp.models import TimedBatchNorm, take_evaluations


@torch.no_grad()
def calibrate_norms(
    network: nn.Module, autocast: Callable[[], torch.autocast], batches: Iterable[tuple[Tensor, Tensor]]
) -> None:
    """Set every BatchNorm's running statistics to the mean over its evaluations of batch statistics in training."""
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [m.momentum for m in norms]
    calls: Counter[nn.Module] = Counter()

    def weigh(norm: nn.Module, _: Any) -> None:
        calls[norm] += 1
        norm.momentum = 1 / calls[norm]  # type: ignore[assignment]

    hooks = [m.register_forward_pre_hook(weigh) for m in norms if not isinstance(m, TimedBatchNorm)]
    timed = [m for m in norms if isinstance(m, TimedBatchNorm)]
    for m in timed:
        m.momentum = None
        m.row_weight.zero_()
    network.train()
    for images, _ in batches:
        with autocast():
            network(images)
    network.eval()
    for hook in hooks:
        hook.remove()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    for m in timed:
        m.row_weight.clamp_(max=1.0)
    take_evaluations(network)
