"""A moving average of a network's weights and running statistics."""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn


def _values(network: nn.Module) -> list[Tensor]:
    return [x for x in (*network.parameters(), *network.buffers()) if x.is_floating_point()]


class MovingAverage:
    """w̄ ← decay·w̄ + (1 − decay)·w after every step, from the first step's w on.

    ``torch.optim.swa_utils.AveragedModel`` does the same, but waits for the device in every step, and averages index
    buffers too.

    Attributes:
        network: a copy that holds w̄.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = deepcopy(network).requires_grad_(False)
        self.decay = decay
        self.steps = 0

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        if self.steps:
            torch._foreach_lerp_(self.tensors(), _values(network), 1 - self.decay)
        else:
            torch._foreach_copy_(self.tensors(), _values(network))
        self.steps += 1

    def tensors(self) -> list[Tensor]:
        return _values(self.network)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "network": self.network.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self.network.load_state_dict(state["network"])
