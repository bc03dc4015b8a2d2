"""A CUDA stream for each run, the workspaces that libraries keep for every stream, and waiting for the device."""

import gc
import time
from collections.abc import Callable

import torch

from anode_exp.errors import UserError

MOST_STREAMS = 32
"""The size of torch's pool: one more stream would be the first one again, and two runs would share a workspace."""


def run_streams(device: torch.device, count: int) -> list[torch.cuda.Stream | None]:
    """A stream for each of several runs at once, after the work queued so far; None for each without CUDA.

    A run stays on its stream: memory freed there is used again there, and its graph is recorded there. So its memory is
    cached once, and libraries keep one workspace for it.

    Raises:
        UserError: for more runs than there are streams.
    """
    if device.type != "cuda":
        return [None] * count
    if count > MOST_STREAMS:
        remedy = f"give seeds={MOST_STREAMS} or fewer, and run the others afterwards"
        raise UserError(f"{count} runs at once: a GPU takes at most {MOST_STREAMS}, one stream each; {remedy}")
    streams = [torch.cuda.Stream(device) for _ in range(count)]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream(device))
    return list(streams)


def clear_workspaces(device: torch.device) -> None:
    """Free what earlier runs of this process left on the device: garbage, and cuBLAS's workspaces.

    cuBLAS keeps one of 32 MiB (NVIDIA H100, H200) for every handle and stream, and never frees it. A graph that was
    recorded with them must not be replayed afterwards.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch._C._cuda_clearCublasWorkspaces()


def wait(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Seconds that ``repeats`` runs of the work take, from an idle device to an idle device."""
    wait(device)
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    wait(device)
    return time.perf_counter() - started
