"""Peak memory of training steps: the allocator's own figure on CUDA, counted tensor bytes elsewhere."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensorBytes(TorchDispatchMode):
    """Counts the bytes of tensor storages alive while it is active, on any device.

    Every operator's results are seen below autograd, so tensors that a graph saved count until it frees them. Memory
    inside a kernel does not count, nor does the interpreter's: that is what sets it apart from the resident set.

    Args:
        tensors: already there, and counted from the start.

    Attributes:
        now, peak: bytes alive, and the most there were.
    """

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._alive: dict[int, int] = {}
        for t in tensors:
            self._add(t)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        self._alive[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.now -= self._alive.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return out


class PeakMemory:
    """Peak bytes of a job's training steps.

    On CUDA the largest allocated (``torch.cuda.max_memory_allocated``), data set included, since the job began. On the
    CPU the live tensor bytes of the first instrumented steps, parameters, gradients and optimiser state included, the
    data set not. Two steps are instrumented: the optimiser's state is there from the second on.

    Args:
        others: bytes allocated on the device that are no part of this job, which ``alone`` takes off.
    """

    INSTRUMENTED_STEPS = 2

    def __init__(self, device: torch.device, others: int = 0) -> None:
        self.device = device
        self.others = others
        self._alone: int | None = None
        self.kind = "cuda_max_allocated" if device.type == "cuda" else "live_tensor_bytes"
        self._counted = 0
        self._steps = 0
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)

    @contextmanager
    def step(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, others: Iterable[Tensor] = ()
    ) -> Iterator[None]:
        """Wraps one training step, batch preparation included; ``others`` are tensors there besides."""
        if self.device.type == "cuda" or self._steps >= self.INSTRUMENTED_STEPS:
            yield
            return
        self._steps += 1
        there: list[Tensor] = [*network.parameters(), *network.buffers(), *others]
        there += [p.grad for p in network.parameters() if p.grad is not None]
        there += [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
        live = LiveTensorBytes(there)
        there.clear()  # or the gradients would live through the step that drops them
        try:
            with live:
                yield
        finally:
            self._counted = max(self._counted, live.peak)

    def alone(self) -> None:
        """What comes from here on shares the device with other jobs: the peak stays what it is."""
        self._alone = self.peak_bytes

    @property
    def peak_bytes(self) -> int:
        if self._alone is not None:
            return self._alone
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.others
        return self._counted

    @property
    def reserved_bytes(self) -> int | None:
        """The most the CUDA caching allocator reserved; None elsewhere, and beside other jobs."""
        if self.device.type != "cuda" or self._alone is not None:
            return None
        return torch.cuda.max_memory_reserved(self.device)
