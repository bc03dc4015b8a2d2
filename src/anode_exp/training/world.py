"""The processes that train one network together."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from anode_exp.errors import OtherProcessFailed, UserError
from anode_exp.ode import SolveFailed


class World:
    """A single process: nothing is exchanged.

    A training step and the trainer call this class wherever a result depends on all processes; no other code knows
    about them.

    Attributes:
        rank: this process's number, from 0; process 0 writes records.
        size: number of processes.
    """

    rank, size = 0, 1

    def mean_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its mean over all processes."""

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over all processes."""

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return flag

    def settle(self, error: Exception | None) -> None:
        """Raise this process's error, or that another process failed: all leave a training step the same way."""
        if error is not None:
            raise error

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, by rank."""
        return [value]


class Processes(World):
    """The processes of ``torch.distributed``'s default group: NCCL between CUDA devices, gloo between CPUs.

    Gradients are averaged by one all-reduce of all of them, after the backward pass. ``DistributedDataParallel`` would
    overlap the two, but it wraps the network: state names change, its hooks fire at each parameter's first gradient,
    which a block's own backward pass gives before the others', and they are not part of a captured graph.

    Numbers for the host are exchanged between hosts, by gloo, without waiting for a device.
    """

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.hosts = dist.new_group(backend="gloo")

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        by_kind: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for x in tensors:
            by_kind.setdefault((x.dtype, x.device), []).append(x)
        for these in by_kind.values():
            bucket = torch.cat([x.detach().reshape(-1) for x in these])
            with _talking():
                dist.all_reduce(bucket)
            parts = bucket.split([x.numel() for x in these])
            with torch.no_grad():
                torch._foreach_copy_(these, [part.view(x.shape) for part, x in zip(parts, these, strict=True)])

    def mean_(self, tensors: Iterable[Tensor]) -> None:
        kept = list(tensors)
        self.sum_(kept)
        if kept:
            with torch.no_grad():
                torch._foreach_div_(kept, self.size)

    def _most(self, number: int) -> int:
        most = torch.tensor(number)
        with _talking():
            dist.all_reduce(most, dist.ReduceOp.MAX, group=self.hosts)
        return int(most)

    def any(self, flag: bool) -> bool:
        return self._most(int(flag)) > 0

    def settle(self, error: Exception | None) -> None:
        worst = self._most(0 if error is None else 1 if isinstance(error, SolveFailed) else 2)
        if error is not None:
            raise error
        if worst:
            raise (SolveFailed, OtherProcessFailed)[worst - 1]("failed in another process that trains the same network")

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        with _talking():
            dist.all_gather_object(values, value, group=self.hosts)
        return values


@contextmanager
def _talking() -> Iterator[None]:
    """A connection that ends in this context means that another process has ended."""
    try:
        yield
    except RuntimeError as error:
        raise OtherProcessFailed(
            f"the connection to another process has ended: {str(error).splitlines()[0]}"
        ) from error


ALONE = World()

LONGEST_WAIT = timedelta(minutes=30)
"""For another process that hangs; one that has ended is noticed at once."""


_joined: World | None = None


def join(cpu: bool) -> World:
    """This process among those that torchrun started.

    Args:
        cpu: train on CPUs even if there is a CUDA device.

    Raises:
        UserError: for more processes on a machine than it has CUDA devices, or if the others cannot be reached.
    """
    global _joined
    if _joined is None:
        backend = "gloo"
        if torch.cuda.is_available() and not cpu:
            local, devices = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
            here = int(os.environ.get("LOCAL_WORLD_SIZE", str(local + 1)))
            if here > devices:  # the same in all processes, so that the first one reports it
                remedy = f"torchrun --nproc-per-node={devices}, or runtime.device=cpu"
                raise UserError(f"{here} processes on this machine, which has {devices} CUDA devices; use {remedy}")
            torch.cuda.set_device(local)
            backend = "cpu:gloo,cuda:nccl"
        try:
            dist.init_process_group(backend, timeout=LONGEST_WAIT)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"the other processes cannot be reached: {str(error).splitlines()[0]}") from error
        _joined = Processes()
    return _joined
