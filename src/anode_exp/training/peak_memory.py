"""Peak memory of training steps: the allocator's own figure on CUDA, counted tensor bytes elsewhere."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from anode_exp.training.step import state_tensors


class LiveTensorBytes(TorchDispatchMode):
    """Counts the bytes of tensor storages alive while it is active, on any device.

    Every operator's results are seen below autograd, so tensors that a graph saved count until it frees them. Unlike
    the resident set, it does not count memory inside a kernel, nor the interpreter's.

    Args:
        tensors: those that exist already, counted from the start.

    Attributes:
        now, peak: bytes alive now, and the most so far.
    """

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
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


class CudaAllocator:
    """Torch's caching allocator of a CUDA device. Peaks count from the last reset."""

    def __init__(self, device: torch.device) -> None:
        self.allocated = partial(torch.cuda.memory_allocated, device)
        self.most_allocated = partial(torch.cuda.max_memory_allocated, device)
        self.most_reserved = partial(torch.cuda.max_memory_reserved, device)
        self.reset_peaks = partial(torch.cuda.reset_peak_memory_stats, device)
        self.empty_cache = torch.cuda.empty_cache


def allocator_of(device: torch.device) -> CudaAllocator | None:
    """The device's allocator; None without CUDA."""
    return CudaAllocator(device) if device.type == "cuda" else None


def peak_while(work: Callable[[], object], own: Callable[[], Iterable[Tensor]], allocator: CudaAllocator | None) -> int:
    """Peak bytes during the work: of its own tensors, which exist before, and of what it allocates; not of others.

    The allocator's figure, or live tensor bytes without one. ``own`` is called once: keeping the list would keep
    gradients alive.
    """
    if allocator is None:
        with LiveTensorBytes(own()) as live:
            work()
        return live.peak
    allocator.reset_peaks()
    others = allocator.allocated() - sum(x.nbytes for x in own())
    work()
    return allocator.most_allocated() - others


class PeakMemory:
    """Peak bytes of a run's training steps.

    On CUDA the most bytes allocated (``torch.cuda.max_memory_allocated``) during training steps, including the data
    set. On the CPU the live tensor bytes of the first steps, including parameters, gradients and optimiser state, but
    not the data set. Two steps are instrumented, because the optimiser's state exists from the second step on.

    Args:
        shared: bytes on the device that all runs share, the data set's. All other bytes there now belong to others.
    """

    INSTRUMENTED_STEPS = 2

    def __init__(self, device: torch.device, shared: int = 0) -> None:
        self.allocator = allocator_of(device)
        self.kind = "live_tensor_bytes" if self.allocator is None else "cuda_max_allocated"
        self.others = 0 if self.allocator is None else self.allocator.allocated() - shared
        self._alone: int | None = None
        self.restart()

    def restart(self) -> None:
        """Forget the steps so far."""
        self._peak = self._steps = 0
        self._reserved: int | None = None
        if self.allocator is not None:
            self.allocator.empty_cache()
            self.allocator.reset_peaks()

    @contextmanager
    def step(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, others: Iterable[Tensor] = ()
    ) -> Iterator[None]:
        """Wraps one training step, batch preparation included; ``others`` are further tensors that exist."""
        if self.allocator is not None or self._steps >= self.INSTRUMENTED_STEPS:
            yield
            return
        self._steps += 1
        there = [*state_tensors(network, optimizer), *others]
        there += [p.grad for p in network.parameters() if p.grad is not None]
        live = LiveTensorBytes(there)
        there.clear()  # otherwise gradients would live through the step that drops them
        try:
            with live:
                yield
        finally:
            self._peak = max(self._peak, live.peak)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Work in this context does not count as a training step: an evaluation has larger batches."""
        if self.allocator is None:
            yield
            return
        self._peak, self._reserved = self.peak_bytes, self.reserved_bytes
        try:
            yield
        finally:
            self.allocator.reset_peaks()

    def alone(self) -> None:
        """From here on other jobs share the device: the peak so far is kept."""
        self._alone = self.peak_bytes

    @property
    def peak_bytes(self) -> int:
        if self._alone is not None:
            return self._alone
        if self.allocator is not None:
            return max(self._peak, self.allocator.most_allocated() - self.others)
        return self._peak

    @property
    def reserved_bytes(self) -> int | None:
        """The most bytes that the CUDA caching allocator reserved up to the first pause, whose blocks it keeps.

        None without CUDA, and next to other jobs.
        """
        if self.allocator is None or self._alone is not None:
            return None
        return self.allocator.most_reserved() if self._reserved is None else self._reserved
