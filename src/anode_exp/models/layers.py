"""Layers that the architectures share: norms and activations by name, and a module that ignores time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

MakeOdeBlock = Callable[[nn.Module], nn.Module]
"""Turns a vector field f(t, y) into a layer y ↦ y(t1)."""


def _group_norm(channels: int) -> nn.Module:
    """GroupNorm of at most 32 groups, each of at least 8 channels if there are that many."""
    return nn.GroupNorm(math.gcd(32, max(1, channels // 8), channels), channels)


class _Sum(torch.autograd.Function):
    """The sum over processes: of values in the forward pass, of gradients in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        torch.distributed.all_reduce(total)
        return total


def synchronised_batch_norm(
    y: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
) -> Tensor:
    """``functional.batch_norm`` in training, with the statistics of the whole batch, of which each process has a part.

    (y − mean) / √(var + eps) · weight + bias, with mean and var of each channel over all images and pixels; it takes
    two sums over processes, of y and of (y − mean)². ``nn.SyncBatchNorm`` does this on CUDA only.

    Args:
        y: [B, C, H, W], a part of any size of the batch.
    """
    x = y.float() if y.dtype in (torch.bfloat16, torch.float16) else y
    over, shape = (0, 2, 3), (1, -1, 1, 1)
    ones = x.new_full((1,), x.numel() // x.shape[1])
    total: Tensor = _Sum.apply(torch.cat([x.sum(over), ones]))
    n = total[-1].detach()
    mean = total[:-1] / n
    centred = x - mean.view(shape)
    summed: Tensor = _Sum.apply(centred.square().sum(over))
    var = summed / n
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.detach(), momentum)
            running_var.lerp_(summed.detach() / (n - 1), momentum)
    out = centred * (var + eps).rsqrt().view(shape)
    if weight is not None:
        out = out * weight.view(shape)
    return (out if bias is None else out + bias.view(shape)).to(y.dtype)


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm without its counter of batches, which is read only without momentum: one kernel fewer per call.

    Attributes:
        synchronised: whether several processes share a batch and use the statistics of all of it.
    """

    synchronised = False

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.num_batches_tracked = None

    def forward(self, y: Tensor) -> Tensor:
        if not (self.synchronised and self.training):
            return super().forward(y)
        mean, var = (self.running_mean, self.running_var) if self.track_running_stats else (None, None)
        assert self.momentum is not None
        return synchronised_batch_norm(y, mean, var, self.weight, self.bias, self.momentum, self.eps)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        """Omit the counter that torch would add to a state of unknown version; average statistics by time."""
        if "row_times" not in self._buffers and state_dict.pop(prefix + "row_times", None) is not None:
            weight = state_dict.pop(prefix + "row_weight", None)
            known = slice(None) if weight is None or not weight.any() else weight > 0  # times that training came near
            for name in (prefix + "running_mean", prefix + "running_var"):
                state_dict[name] = state_dict[name][known].mean(0)
        super()._load_from_state_dict(state_dict, prefix, {**local_metadata, "version": 2}, *args)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": BatchNorm,
    "group": _group_norm,
    "layer": lambda channels: nn.GroupNorm(1, channels),  # over C, H and W of each image
    "none": lambda channels: nn.Identity(),
}

# In place, because the layers before, norms and convolutions, do not keep their output for the backward pass.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True),
    "leaky_relu": lambda: nn.LeakyReLU(0.01, inplace=True),
    "softplus": nn.Softplus,
    "gelu": nn.GELU,
}


TIME_ROUNDING = 1e-6
"""Relative to the distance of two times: n h + c h and (n + c) h are the same time, also after rounding to float32."""


def interpolation(times: Sequence[float], t: float) -> list[tuple[int, float]]:
    """Places i and weights w so that Σ w x(times[i]) interpolates x at t: piecewise linear, constant outside.

    Args:
        times: in increasing order.
    """
    right = next((i for i, at in enumerate(times) if at >= t), len(times) - 1)
    left = max(right - 1, 0)
    w = 1.0 if right == left else (t - times[left]) / (times[right] - times[left])
    if w > 1.0 - TIME_ROUNDING:
        return [(right, 1.0)]
    return [(left, 1.0)] if w < TIME_ROUNDING else [(left, 1.0 - w), (right, w)]


def _interpolated(rows: Tensor, places: list[tuple[int, float]]) -> Tensor:
    """Σ w rows[i]; a view if there is one place."""
    first = rows[places[0][0]]
    return first if len(places) == 1 else torch.lerp(first, rows[places[1][0]], places[1][1])


class TimedBatchNorm(BatchNorm):
    """BatchNorm with running statistics for several times of a solve. ``Autonomous``, which contains it, sets the time.

    Along a solve the activations change. One set of running statistics is a mixture of all times, which no batch has:
    a network trained with batch statistics is then evaluated with wrong ones.

    At a time t_i that has statistics, this is BatchNorm with those. At a time between two of them, evaluation
    interpolates both linearly. Training updates both with the batch's statistics x and the interpolation weights w_i:

        first s_i ← s_i + m w_i (1 − s_i),   then x_i ← x_i + (m w_i / s_i) (x − x_i),

    with the momentum m. s_i grows from 0 towards 1: the share of x_i that is not its initial value, which the division
    removes. With momentum None x_i is the mean of all batches weighted by w_i, and s_i the sum of w_i.

    Args:
        times: those that have statistics, in increasing order.
        between: calls come at times that are not known in advance, as with adaptive steps. A time that training never
            came near then has no statistics, and evaluation interpolates between those that have.
        affine_intervals: M. Weight and bias are then piecewise linear too, over M + 1 equally spaced times of [0, 1]:
            weight(t) = 1 + weight_offset(t), bias(t) = bias_offset(t). Weight decay pulls them towards 1 and 0. None:
            all times share them.

    Attributes:
        row_times, row_weight: the times, and s of each; without ``between`` s stays 1.
        weight_offset, bias_offset: [M + 1, channels], or None.

    Source: TA-BN (Zheng et al., NeurIPS 2024), which updates with s_i = 1.
    """

    running_mean: Tensor
    running_var: Tensor
    row_weight: Tensor

    def __init__(
        self, channels: int, times: Sequence[float], between: bool = False, affine_intervals: int | None = None
    ) -> None:
        super().__init__(channels)
        self.times, self.between, self.affine_times = tuple(times), between, None
        self.register_buffer("running_mean", torch.zeros(len(times), channels))
        self.register_buffer("running_var", torch.ones(len(times), channels))
        self.register_buffer("row_times", torch.tensor(self.times))
        self.register_buffer("row_weight", torch.full((len(times),), 0.0 if between else 1.0))
        self.weight_offset = self.bias_offset = None
        if affine_intervals is not None:
            self.weight = self.bias = None  # type: ignore[assignment]
            self.affine_times = [m / affine_intervals for m in range(affine_intervals + 1)]
            self.weight_offset = nn.Parameter(torch.zeros(affine_intervals + 1, channels))
            self.bias_offset = nn.Parameter(torch.zeros(affine_intervals + 1, channels))
        self._places: list[tuple[int, float]] = []
        self._now: tuple[Tensor | None, ...] | None = None
        self._now_momentum = 1.0

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        """Statistics of other times are interpolated; a single set of statistics is used for all times."""
        times = state_dict.pop(prefix + "row_times", torch.zeros(1)).tolist()
        weight = state_dict.pop(prefix + "row_weight", torch.ones(len(times)))
        known = [i for i, s in enumerate(weight.tolist()) if s > 0]
        places = [[(i, 1.0)] for i in range(len(times))]
        differ = not torch.equal(torch.tensor(times), torch.tensor(self.times))
        if differ or (not self.between and 0 < len(known) < len(times)):  # only ``between`` can leave rows out
            weight = torch.ones(len(self.times)) if known else self.row_weight
            known = known or list(range(len(times)))
            places = [[(known[i], w) for i, w in interpolation([times[k] for k in known], t)] for t in self.times]
        for name in (prefix + "running_mean", prefix + "running_var"):
            if name in state_dict:
                rows = state_dict[name].reshape(len(times), -1)
                state_dict[name] = torch.stack([_interpolated(rows, place) for place in places])
        state_dict[prefix + "row_times"] = self.row_times
        state_dict[prefix + "row_weight"] = weight if self.between else self.row_weight
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def begin(self, t: float) -> None:
        """Choose the tensors of the next call. Reads a tensor on the host only in evaluation with ``between``."""
        mean: Tensor | None = None
        var: Tensor | None = None
        self._places, self._now_momentum = [], self.momentum or 0.0
        if self.training and self.track_running_stats:
            places = interpolation(self.times, t)
            if self.between or self.momentum is None or len(places) > 1:
                # These receive the batch's own, with which `end` updates the rows.
                mean, var = (torch.zeros_like(x[0]) for x in (self.running_mean, self.running_var))
                self._places, self._now_momentum = places, 1.0
            else:
                mean, var = (_interpolated(x, places) for x in (self.running_mean, self.running_var))
        elif self.track_running_stats:
            known = list(range(len(self.times)))
            if self.between:
                known = [i for i, s in enumerate(self.row_weight.tolist()) if s > 0] or known
            places = [(known[i], w) for i, w in interpolation([self.times[i] for i in known], t)]
            mean, var = (_interpolated(x, places) for x in (self.running_mean, self.running_var))
        weight: Tensor | None = self.weight
        bias: Tensor | None = self.bias
        if self.affine_times is not None:
            assert self.weight_offset is not None and self.bias_offset is not None
            places = interpolation(self.affine_times, t)
            # Sums, because a view of a parameter requires a gradient even where none is recorded.
            weight, bias = (
                x + _interpolated(offset, places) for x, offset in ((1.0, self.weight_offset), (0.0, self.bias_offset))
            )
        self._now = mean, var, weight, bias

    def end(self) -> None:
        """Update the rows around the call's time with the batch's statistics, if the call did not."""
        assert self._now is not None
        mean, var, *_ = self._now
        for row, w in self._places:
            assert mean is not None and var is not None
            weight = self.row_weight[row]
            share = w if self.momentum is None else w * self.momentum
            weight.add_(share) if self.momentum is None else weight.mul_(1.0 - share).add_(share)
            for rows, x in ((self.running_mean, mean), (self.running_var, var)):
                rows.data[row].lerp_(x, share / weight)  # .data keeps the version that earlier steps' graphs saved

    def forget(self) -> None:
        """Drop a call's tensors: they are part of a graph, and cannot be copied with the network."""
        self._now, self._places = None, []

    def forward(self, y: Tensor) -> Tensor:
        if self._now is None:
            raise RuntimeError("TimedBatchNorm was called without a time; call it within Autonomous.at(t)")
        mean, var, weight, bias = self._now
        by_batch = self.training or not self.track_running_stats
        if self.synchronised and by_batch:
            return synchronised_batch_norm(y, mean, var, weight, bias, self._now_momentum, self.eps)
        return functional.batch_norm(y, mean, var, weight, bias, by_batch, self._now_momentum, self.eps)


class Autonomous(nn.Sequential):
    """f(t, y) = layers(y): depends on time only through the statistics, weights and biases of its norms, if at all."""

    def forward(self, t: float, y: Tensor) -> Tensor:  # type: ignore[override]
        if torch.compiler.is_compiling():  # compiled code does not get t: tensors that depend on it are inputs
            return super().forward(y)
        with self.at(t):
            return super().forward(y)

    @contextmanager
    def at(self, t: float) -> Iterator[None]:
        """In this context, the norms are those of time t, for one evaluation of the layers."""
        norms = [layer for layer in self if isinstance(layer, TimedBatchNorm)]
        for norm in norms:
            norm.begin(t)
        try:
            yield
            for norm in norms:
                norm.end()
        finally:
            for norm in norms:
                norm.forget()

    def time_norms(self, times: Sequence[float], between: bool = False, affine_intervals: int | None = None) -> None:
        """Make every BatchNorm a ``TimedBatchNorm``."""
        for i, layer in enumerate(self):
            if isinstance(layer, nn.BatchNorm2d):
                self[i] = TimedBatchNorm(layer.num_features, times, between, affine_intervals)


def synchronise_norms(network: nn.Module) -> None:
    """Let every BatchNorm in training mode use the statistics of the whole batch of all processes."""
    for m in network.modules():
        if isinstance(m, BatchNorm):
            m.synchronised = True


def conv_norm(
    conv: nn.Conv2d, norm: Callable[[int], nn.Module], activation: Callable[[], nn.Module] | None
) -> list[nn.Module]:
    return [conv, norm(conv.out_channels), *([activation()] if activation else [])]


def initialise(network: nn.Module) -> None:
    """Initialisation of ANODE's published code.

    Convolutions that have a bias: Xavier uniform with gain √2, bias 0. Norms: weight 1, bias 0. Everything else as
    in PyTorch.
    """
    for m in network.modules():
        if isinstance(m, nn.Conv2d) and m.bias is not None:
            nn.init.xavier_uniform_(m.weight, gain=math.sqrt(2))
            nn.init.zeros_(m.bias)
