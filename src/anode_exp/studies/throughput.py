"""Training steps of several contestants in turn, and what the device could do at best, measured in the same run."""

import gc
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from anode_exp.training.peak_memory import allocator_of, peak_while
from anode_exp.training.streams import seconds_of, wait

LEAST_ROUND_S = 0.05
"""A contestant's turn takes as many steps as fill this time, so that waiting for a device at its end costs little."""


@dataclass
class Contestant:
    """A training step to be timed.

    Attributes:
        step: takes the next batch and trains on it.
        counted: the same without a recorded graph, whose replay would show neither operators nor allocations.
        images: number per step.
        epoch_steps: steps of one pass over the data set.
        own: tensors held between steps, including gradients, for the count of its bytes.
        dtype: of its matrix products.
        alone: timed after all others, not in turn with them: its worker processes would slow them, and prefetch while
            they run.
    """

    label: str
    step: Callable[[], object]
    counted: Callable[[], object]
    images: int
    epoch_steps: int
    own: Callable[[], list[Tensor]]
    dtype: torch.dtype = torch.float32
    alone: bool = False


class Traffic(TorchDispatchMode):
    """Counts operators, the bytes that each would read and write if nothing stayed in a cache, and their arithmetic.

    ``FlopCounterMode`` counts the same arithmetic, but not under a backward pass that calls autograd itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators, self.bytes, self.flops = 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.operators += 1
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
            self.bytes += sum(x.numel() * x.element_size() for x in tensors)
            if func._overloadpacket in flop_registry:
                self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def _best_seconds(run: Callable[[], object], device: torch.device) -> float:
    run()
    return min(seconds_of(run, device) for _ in range(7))


def device_limits(device: torch.device, dtypes: Iterable[torch.dtype]) -> tuple[float, dict[torch.dtype, float]]:
    """Bytes per second of a copy (read and written), and floating-point operations per second of a matrix product."""
    on_cuda = device.type == "cuda"
    source = torch.zeros(2**30 if on_cuda else 2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    n = 8192 if on_cuda else 1024
    a = torch.randn(n, n, device=device)
    copies = 2 * source.nbytes / _best_seconds(lambda: target.copy_(source), device)
    return copies, {d: 2 * n**3 / _best_seconds(partial(torch.mm, a.to(d), a.to(d)), device) for d in dtypes}


def kernels_per_step(contestant: Contestant, device: torch.device) -> int | None:
    """CUDA kernels launched by one step; None without CUDA."""
    if device.type != "cuda":
        return None
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        contestant.step()
        wait(device)
    return sum(e.count for e in profile.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA)


def _inspect(c: Contestant, device: torch.device) -> tuple[dict[str, Any], int]:
    """A contestant's counts, and the number of steps in a turn; after a warm-up that makes the optimiser's state."""
    for _ in range(2):
        c.counted()
    gc.collect()
    traffic = Traffic()
    with traffic:
        c.counted()
    peak = peak_while(c.counted, c.own, allocator_of(device))
    for _ in range(2):
        c.step()  # the second of these records, where a graph is recorded
    turn = max(1, round(LEAST_ROUND_S / seconds_of(c.step, device)))
    counts = {f"{name}_per_step": getattr(traffic, name) for name in ("operators", "bytes", "flops")}
    return {"label": c.label, "peak_bytes": peak, **counts}, turn


def time_in_turn(
    contestants: list[Contestant], device: torch.device, rounds: int, tick: Callable[[], object]
) -> tuple[list[dict[str, Any]], float, dict[torch.dtype, float]]:
    """A row for each contestant, and the device's limits: bytes per second, operations per second by precision.

    Contestants take turns, ``rounds`` of them; ``ratio`` is the median over turns of their time over the first one's
    (the ratio of medians for those timed alone).
    ``floor_s`` is the larger of bytes over copy bandwidth and operations over matrix rate, and ``of_floor`` its share
    of the measured step.
    """
    bandwidth, rates = device_limits(device, dict.fromkeys(c.dtype for c in contestants))
    rows: dict[str, dict[str, Any]] = {}
    seconds: dict[str, list[float]] = {c.label: [] for c in contestants}
    together = [c for c in contestants if not c.alone]
    for group in [together, *([c] for c in contestants if c.alone)]:
        turn: dict[str, int] = {}
        for c in group:
            rows[c.label], turn[c.label] = _inspect(c, device)
            tick()
        for _ in range(rounds):
            for c in group:
                seconds[c.label].append(seconds_of(c.step, device, turn[c.label]) / turn[c.label])
                tick()
    first = seconds[contestants[0].label]
    for c in contestants:
        row, mine = rows[c.label], seconds[c.label]
        row["kernels_per_step"] = kernels_per_step(c, device)  # after all timing, which a profiler may slow
        low, _, high = statistics.quantiles(mine, n=4) if len(mine) > 1 else mine * 3
        median = statistics.median(mine)
        ratio = median / statistics.median(first)
        if not c.alone:
            ratio = statistics.median(a / b for a, b in zip(mine, first, strict=True))
        row |= {"step_s": median, "step_s_quartiles": [low, high], "ratio": ratio}
        row |= {"images_per_s": c.images / median, "epoch_s": c.epoch_steps * median}
        copying, computing = row["bytes_per_step"] / bandwidth, row["flops_per_step"] / rates[c.dtype]
        row |= {"bandwidth_share": copying / median, "matrix_share": computing / median}
        row |= {"floor_s": max(copying, computing), "of_floor": max(copying, computing) / median}
    return [rows[c.label] for c in contestants], bandwidth, rates
