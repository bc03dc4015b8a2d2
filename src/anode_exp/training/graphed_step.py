"""A training step captured once as a CUDA graph and replayed: no launches from the host, in every gradient mode."""

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from anode_exp.build import Assembly
from anode_exp.config.schema import TrainConfig
from anode_exp.models import ode_blocks
from anode_exp.ode import TimeGrid
from anode_exp.tasks.task import Batch, Sums, Task
from anode_exp.training.step import Step, state_tensors, train_step
from anode_exp.training.world import ALONE, World

log = logging.getLogger(__name__)

WARM_UP_STEPS = 3


class CudaCapture:
    """``torch.cuda.CUDAGraph``, recorded on the current stream, or on its own stream if that is the default stream.

    Libraries keep a workspace for every stream: graphs recorded on one stream would share it, and overwrite each
    other's data if replayed at the same time. On the run's own stream the recording needs no second workspace, and no
    second cache of freed blocks.
    """

    def __init__(self) -> None:
        self.graph = torch.cuda.CUDAGraph()
        self.pool = torch.cuda.graph_pool_handle()
        current = torch.cuda.current_stream()
        self.stream = torch.cuda.Stream() if current == torch.cuda.default_stream() else current

    def warm_up(self, work: Callable[[], object]) -> None:
        """Run the work as often as libraries need to settle, before the recording."""
        self.stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self.stream):
                for _ in range(WARM_UP_STEPS):
                    work()
        finally:  # restoring weights must not overtake a step either
            torch.cuda.current_stream().wait_stream(self.stream)

    def record(self, work: Callable[[], Any]) -> Any:
        """Record the work without running it on the device; every replay fills the tensors that it returns."""
        # torch's context waits for the device and empties the allocator's cache before it records. If it fails, its
        # stream stays current: the outer context restores the previous one.
        with torch.cuda.stream(self.stream):
            try:
                with torch.cuda.graph(self.graph, pool=self.pool, stream=self.stream):
                    return work()
            except BaseException:
                self._stop_allocating()
                raise

    def replay(self) -> None:
        self.graph.replay()

    def _stop_allocating(self) -> None:
        """Do what ``capture_end`` omits when it raises: otherwise the next ``empty_cache`` is an internal error."""
        device = self.stream.device_index
        try:
            torch._C._cuda_endAllocateToPool(device, self.pool)
        except RuntimeError:  # it has ended: the graph releases its pool itself
            return
        torch._C._cuda_releasePool(device, self.pool)


class GraphedStep:
    """``train_step`` as a graph: forward, backward and optimiser, replayed for every batch of the recorded size.

    The first step runs eagerly, because the optimiser makes its state in it. The second is recorded: warm-up and
    recording would train, so weights, buffers, momentum and counters are restored, whether recording succeeds or not.
    If it fails, a warning says why, and every step runs eagerly. A batch of another size, such as an epoch's last, runs
    eagerly too. The learning rate must be a tensor for a replay to read; ``set_learning_rate`` fills it.

    Args:
        batch_size: of the batches to record; by default that of the second batch.

    A replay counts the evaluations of f of the recorded step.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        autocast: Callable[[], torch.autocast],
        task: Task,
        new_capture: Callable[[], CudaCapture] = CudaCapture,
        batch_size: int | None = None,
        world: World = ALONE,
    ) -> None:
        self.network, self.optimizer, self.autocast, self.task = network, optimizer, autocast, task
        self.world = world
        self.new_capture, self.batch_size = new_capture, batch_size
        self._failed = False
        self.forget()

    def forget(self) -> None:
        """Drop the recording: the next step counts as the first. A recording that failed is not tried again."""
        self._capture: CudaCapture | None = None
        self._ran_eagerly = False
        self._batch: Batch = ()
        self._whole: int | None = None
        self._results: tuple[Tensor, Sums] | None = None
        self._evaluations: list[dict[str, int]] = []

    def __call__(self, batch: Batch, whole: int | None = None) -> tuple[Tensor, Sums]:
        if self._capture is None and not self._failed:
            if not self._ran_eagerly or self.batch_size not in (None, len(batch[0])):
                self._ran_eagerly = True
                return self._eager(batch, whole)
            self._whole = whole
            with sync_debug("default"):  # recording waits for the device, once
                self._record(batch)
        if self._capture is None or batch[0].shape != self._batch[0].shape or whole != self._whole:
            return self._eager(batch, whole)
        assert self._results is not None
        for mine, x in zip(self._batch, batch, strict=True):
            mine.copy_(x)
        self._capture.replay()
        for block, counts in zip(ode_blocks(self.network), self._evaluations, strict=True):
            for name, count in counts.items():
                setattr(block.field.evaluations, name, getattr(block.field.evaluations, name) + count)
        return self._results

    def _eager(self, batch: Batch, whole: int | None) -> tuple[Tensor, Sums]:
        return train_step(self.network, self.optimizer, self.autocast, self.task, batch, self.world, whole)

    def _counters(self) -> list[dict[str, int]]:
        return [asdict(block.field.evaluations) for block in ode_blocks(self.network)]

    def _record(self, batch: Batch) -> None:
        """Record, or give up for good; weights, buffers, momentum and counters are restored in either case."""
        tensors = state_tensors(self.network, self.optimizer)
        # On the host, so that the copies are not part of the device's peak.
        before = [x.detach().to("cpu", copy=True) for x in tensors]
        counted = self._counters()
        reason = None
        try:
            self._capture_step(batch)
        except Exception as error:
            reason = _root(error)
            self.forget()
            self._failed = True
            self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for x, value in zip(tensors, before, strict=True):
                x.copy_(value)
        for block, counts in zip(ode_blocks(self.network), counted, strict=True):
            for name, count in counts.items():
                setattr(block.field.evaluations, name, count)
        if reason is not None:
            gc.collect()  # frees what the attempt held
            torch.cuda.empty_cache()
            log.warning(
                f"the training step could not be captured as a CUDA graph ({reason}); it runs eagerly from here on, "
                "with the same numbers; runtime.cuda_graph=false silences this"
            )

    def _capture_step(self, batch: Batch) -> None:
        self._batch = tuple(x.clone() for x in batch)
        capture, work = self.new_capture(), partial(self._eager, self._batch, self._whole)
        capture.warm_up(work)
        self.optimizer.zero_grad(set_to_none=True)  # the recording then makes its own gradients
        start = self._counters()
        self._results = capture.record(work)
        end = self._counters()
        self._evaluations = [{k: e[k] - s[k] for k in e} for s, e in zip(start, end, strict=True)]
        self._capture = capture


def _root(error: BaseException) -> str:
    """The first error, in one line: the end of a failed capture raises another one."""
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextmanager
def sync_debug(mode: int | str) -> Iterator[None]:
    """Set what CUDA does at an operation that waits for the device: ``default`` allows it, ``error`` raises."""
    if not torch.cuda.is_available():
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def training_step(assembly: Assembly, world: World = ALONE) -> Step:
    """The step that a configuration asks for: captured on CUDA, eager elsewhere and with adaptive steps.

    Whole batches are captured, and with ``runtime.compile`` f is compiled for them; others run eagerly and uncompiled.
    """
    network, runtime = assembly.network, assembly.config.runtime
    if runtime.compile:
        for block in ode_blocks(network):
            block.field.compile(batch_size=assembly.batch_size)
    if assembly.device.type == "cuda" and runtime.cuda_graph:
        if all(isinstance(block.grid, TimeGrid) and block.solver.static for block in ode_blocks(network)):
            return GraphedStep(*assembly.stepped, batch_size=assembly.batch_size, world=world)
        log.info("steps are chosen on the host, so a CUDA graph cannot capture them: running eagerly")
    return partial(train_step, *assembly.stepped, world=world)


def capture_of(config: TrainConfig, device: torch.device) -> Callable[[], CudaCapture] | None:
    """What records the steps to be timed, or None if runs do not replay a graph."""
    return CudaCapture if device.type == "cuda" and config.runtime.cuda_graph else None
