"""Layers that the architectures share: norms and activations by name, and a module that ignores time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

MakeOdeBlock = Callable[[nn.Module], nn.Module]
"""Turns a vector field f(t, y) into a layer y ↦ y(t1)."""


def _group_norm(channels: int) -> nn.Module:
    """GroupNorm of at most 32 groups, each of 8 channels or more where there are as many."""
    return nn.GroupNorm(math.gcd(32, max(1, channels // 8)), channels)


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm without its count of batches, which only averages without a momentum read: a kernel less a call."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.num_batches_tracked = None

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        """Without the count that torch would add to a state of unknown version."""
        super()._load_from_state_dict(state_dict, prefix, {**local_metadata, "version": 2}, *args)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": BatchNorm,
    "group": _group_norm,
    "layer": lambda channels: nn.GroupNorm(1, channels),  # over C, H and W of each image
    "none": lambda channels: nn.Identity(),
}

# In place where the layer before keeps nothing of its output for the backward pass: norms and convolutions do not.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True),
    "leaky_relu": lambda: nn.LeakyReLU(0.01, inplace=True),
    "softplus": nn.Softplus,
    "gelu": nn.GELU,
}


class TimedBatchNorm(BatchNorm):
    """BatchNorm with running statistics for every time at which a solve evaluates f; weight and bias are shared.

    Along a solve the activations change. One set of running statistics is a mixture of all times, which no batch ever
    has: networks that train by batch statistics are then evaluated by wrong ones.

    Args:
        times: of the evaluations; a call at another time takes the nearest.

    Attributes:
        t: the time of the next call.
    """

    def __init__(self, channels: int, times: Sequence[float]) -> None:
        super().__init__(channels)
        self.times, self.t = tuple(times), times[0]
        self.register_buffer("running_mean", torch.zeros(len(times), channels))
        self.register_buffer("running_var", torch.ones(len(times), channels))
        self.register_buffer("row_times", torch.tensor(self.times))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        """Statistics of other times: each time takes the nearest; the one set of a network with no more serves all."""
        theirs = state_dict.pop(prefix + "row_times", torch.zeros(1))
        rows = [min(range(len(theirs)), key=lambda i: abs(float(theirs[i]) - t)) for t in self.times]
        for name in ("running_mean", "running_var"):
            value = state_dict.get(prefix + name)
            if value is not None:
                state_dict[prefix + name] = value.reshape(len(theirs), -1)[rows]
        state_dict[prefix + "row_times"] = self.row_times
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    @property
    def row(self) -> int:
        """Which statistics the next call takes."""
        return min(range(len(self.times)), key=lambda i: abs(self.times[i] - self.t))

    def forward(self, y: Tensor) -> Tensor:
        row = self.row
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        by_batch = self.training or not self.track_running_stats
        keep = not by_batch or self.track_running_stats
        mean, var = (self.running_mean[row], self.running_var[row]) if keep else (None, None)
        return functional.batch_norm(y, mean, var, self.weight, self.bias, by_batch, self.momentum, self.eps)


class Autonomous(nn.Sequential):
    """f(t, y) = layers(y): a vector field that does not depend on time, but for the statistics of its norms."""

    def forward(self, t: float, y: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            if isinstance(layer, TimedBatchNorm):
                layer.t = t
        return super().forward(y)

    def time_statistics(self, times: Sequence[float]) -> None:
        """Give every BatchNorm running statistics for each of these times."""
        for i, layer in enumerate(self):
            if isinstance(layer, nn.BatchNorm2d):
                self[i] = TimedBatchNorm(layer.num_features, times)


def conv_norm(
    conv: nn.Conv2d, norm: Callable[[int], nn.Module], activation: Callable[[], nn.Module] | None
) -> list[nn.Module]:
    return [conv, norm(conv.out_channels), *([activation()] if activation else [])]


def initialise(network: nn.Module) -> None:
    """Initialisation of ANODE's published code.

    Convolutions that have a bias: Xavier uniform with gain √2, bias 0. Norms: weight 1, bias 0. All else as PyTorch
    leaves it.
    """
    for m in network.modules():
        if isinstance(m, nn.Conv2d) and m.bias is not None:
            nn.init.xavier_uniform_(m.weight, gain=math.sqrt(2))
            nn.init.zeros_(m.bias)
