"""A training step captured once as a CUDA graph and replayed: no launches from the host, whatever the gradient mode."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from anode_exp.config import RuntimeConfig
from anode_exp.models import ode_blocks
from anode_exp.ode import TimeGrid
from anode_exp.training.train_step import train_step

log = logging.getLogger(__name__)

WARM_UP_STEPS = 3

Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(images, labels) → (loss, correct): one training step."""


class Capture(Protocol):
    """What records a function's work on a device, to be repeated on the same memory."""

    def warm_up(self, work: Callable[[], object]) -> None:
        """Run it as often as libraries need to settle, outside of the recording."""
        ...

    def record(self, work: Callable[[], Any]) -> Any:
        """Record it, without running it on the device; what it returns is filled by every replay."""
        ...

    def replay(self) -> None: ...


class CudaCapture:
    """``torch.cuda.CUDAGraph``, recorded on a stream of its own.

    Libraries keep a workspace for every stream: graphs recorded on one stream would share it, and replayed side by side
    overwrite each other's.
    """

    def __init__(self) -> None:
        self.graph = torch.cuda.CUDAGraph()
        self.stream = torch.cuda.Stream()

    def warm_up(self, work: Callable[[], object]) -> None:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UP_STEPS):
                work()
        torch.cuda.current_stream().wait_stream(self.stream)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what the other stream held is of no use to the recording

    def record(self, work: Callable[[], Any]) -> Any:
        with torch.cuda.graph(self.graph, stream=self.stream):
            return work()

    def replay(self) -> None:
        self.graph.replay()


class GraphedStep:
    """``train_step`` as a graph: forward, backward and optimiser, replayed for every batch of the recorded size.

    The first step runs eagerly, for the optimiser makes its state in it. The second records: warm-up and recording
    would train, so weights, buffers and momentum are put back before the first replay. A batch of another size, such as
    an epoch's last, runs eagerly. The learning rate must be a tensor for a replay to read; ``set_learning_rate`` fills
    it.

    Args:
        batch_size: of the batches to record; by default that of the second.

    Evaluations of f are counted as the recorded step counted them.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        autocast: Callable[[], torch.autocast],
        new_capture: Callable[[], Capture] = CudaCapture,
        label_smoothing: float = 0.0,
        batch_size: int | None = None,
    ) -> None:
        self.label_smoothing, self.batch_size = label_smoothing, batch_size
        self.network, self.optimizer, self.autocast, self.new_capture = network, optimizer, autocast, new_capture
        self._capture: Capture | None = None
        self._ran_eagerly = False
        self._images = self._labels = torch.empty(0)
        self._results: tuple[Tensor, Tensor] | None = None
        self._evaluations: list[dict[str, int]] = []

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if self._capture is None:
            if not self._ran_eagerly or self.batch_size not in (None, len(labels)):
                self._ran_eagerly = True
                return self._eager(images, labels)
            self._record(images, labels)
        if images.shape != self._images.shape:
            return self._eager(images, labels)
        assert self._capture is not None and self._results is not None
        self._images.copy_(images)
        self._labels.copy_(labels)
        self._capture.replay()
        for block, counts in zip(ode_blocks(self.network), self._evaluations, strict=True):
            for name, count in counts.items():
                setattr(block.field.evaluations, name, getattr(block.field.evaluations, name) + count)
        return self._results

    def _eager(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return train_step(self.network, self.optimizer, self.autocast, images, labels, self.label_smoothing)

    def _tensors(self) -> list[Tensor]:
        state = [x for s in self.optimizer.state.values() for x in s.values() if isinstance(x, Tensor)]
        return [*self.network.parameters(), *self.network.buffers(), *state]

    def _record(self, images: Tensor, labels: Tensor) -> None:
        with _syncing_allowed():
            self._record_syncing(images, labels)

    def _record_syncing(self, images: Tensor, labels: Tensor) -> None:
        # On the host, so that the copies are no part of the device's peak.
        before = [x.detach().to("cpu", copy=True) for x in self._tensors()]
        self._images, self._labels = images.clone(), labels.clone()
        capture = self.new_capture()

        def work() -> tuple[Tensor, Tensor]:
            return self._eager(self._images, self._labels)

        counted = [asdict(block.field.evaluations) for block in ode_blocks(self.network)]
        capture.warm_up(work)
        self.optimizer.zero_grad(set_to_none=True)  # the recording then makes gradients of its own
        start = [asdict(block.field.evaluations) for block in ode_blocks(self.network)]
        self._results = capture.record(work)
        end = [asdict(block.field.evaluations) for block in ode_blocks(self.network)]
        self._evaluations = [{k: e[k] - s[k] for k in e} for s, e in zip(start, end, strict=True)]
        for block, counts in zip(ode_blocks(self.network), counted, strict=True):
            for name, count in counts.items():
                setattr(block.field.evaluations, name, count)
        with torch.no_grad():
            for x, value in zip(self._tensors(), before, strict=True):
                x.copy_(value)
        self._capture = capture


@contextmanager
def _syncing_allowed() -> Iterator[None]:
    """Recording waits for the device, once; ``runtime.sync_debug`` is about the steps after it."""
    if not torch.cuda.is_available():
        yield
        return
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def training_step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    autocast: Callable[[], torch.autocast],
    runtime: RuntimeConfig,
    device: torch.device,
    batch_size: int,
    label_smoothing: float = 0.0,
) -> Step:
    """The step that a configuration asks for: captured on CUDA, eager elsewhere and with adaptive steps; f compiled."""
    if runtime.compile:
        for block in ode_blocks(network):
            block.field.compile()
    if device.type == "cuda" and runtime.cuda_graph:
        if all(isinstance(block.grid, TimeGrid) for block in ode_blocks(network)):
            return GraphedStep(network, optimizer, autocast, label_smoothing=label_smoothing, batch_size=batch_size)
        log.info("adaptive steps are chosen on the host, so no CUDA graph can capture them: running eagerly")
    return partial(train_step, network, optimizer, autocast, label_smoothing=label_smoothing)


def restart_momentum(optimizer: torch.optim.Optimizer) -> None:
    """In place, as a recorded step asks: a momentum of zero is that of an optimiser's first step."""
    for state in optimizer.state.values():
        if state.get("momentum_buffer") is not None:
            state["momentum_buffer"].zero_()


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """In place where it is a tensor: a recorded step reads that very one. A group's ``lr_factor`` multiplies it."""
    for group in optimizer.param_groups:
        rate = lr * group.get("lr_factor", 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
