"""Streams and captures of runs, with stand-ins for torch.cuda: which stream is current, and what is restored."""

import itertools
from contextlib import contextmanager

import pytest
import torch

from anode_exp.commands import together as train_module
from anode_exp.config.compose import jobs
from anode_exp.errors import UserError
from anode_exp.training.graphed_step import WARM_UP_STEPS, CudaCapture
from anode_exp.training.streams import MOST_STREAMS, clear_workspaces, run_streams

CUDA = torch.device("cuda")


class Stream:
    """Every stream is a new one, up to the size of torch's pool."""

    made = itertools.count()

    def __init__(self, device=None):
        self.number, self.waited_for, self.device_index = next(Stream.made) % 32, [], 0

    def __eq__(self, other):
        return self.number == other.number

    def wait_stream(self, other):
        self.waited_for.append(other)


class Cuda:
    """The streams and captures of torch.cuda: the capture's own context leaves its stream current on failure."""

    def __init__(self, monkeypatch):
        Stream.made = itertools.count()
        self.default = Stream()
        self.default.number = -1
        self.current, self.ended, self.released, self.allocating = self.default, [], [], False
        for name, value in {
            "Stream": Stream, "CUDAGraph": object, "graph_pool_handle": lambda: (0, 7), "stream": self.stream,
            "graph": self.graph, "current_stream": lambda device=None: self.current,
            "default_stream": lambda device=None: self.default,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *a: self.released.append(a), raising=False)

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph, pool, stream):
        self.current, self.allocating = stream, True
        try:
            yield
        except RuntimeError:
            raise RuntimeError("previous error during capture")  # noqa: B904
        self.current, self.allocating = self.default, False

    def end(self, *arguments):
        if not self.allocating:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.allocating = False
        self.ended.append(arguments)


def test_every_run_has_a_stream_of_its_own_behind_the_work_there_is(monkeypatch):
    cuda = Cuda(monkeypatch)
    streams = run_streams(CUDA, MOST_STREAMS)
    assert len({stream.number for stream in streams}) == MOST_STREAMS == 32
    assert all(stream.waited_for == [cuda.default] for stream in streams)
    assert run_streams(torch.device("cpu"), 100) == [None] * 100


def test_more_runs_than_streams_are_refused():
    message = "33 runs at once: a GPU takes at most 32, one stream each; give seeds=32 or fewer"
    with pytest.raises(UserError, match=message):
        run_streams(CUDA, MOST_STREAMS + 1)


def test_workspaces_are_cleared_behind_the_work_there_is(monkeypatch):
    order = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append("wait"))
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: order.append("clear"), raising=False)
    clear_workspaces(torch.device("cpu"))
    assert order == []
    clear_workspaces(CUDA)
    assert order == ["wait", "clear"]


def test_a_group_of_runs_begins_without_the_workspaces_of_others(tmp_path, monkeypatch):
    """Once, before the data and before any run: a recording that is replayed still needs its own workspaces."""
    order = []

    def noted(name):
        whole = getattr(train_module, name)
        monkeypatch.setattr(train_module, name, lambda *a, **k: order.append(name) or whole(*a, **k))

    for name in ("clear_workspaces", "build_data", "run_streams", "PeakMemory"):
        noted(name)
    settings = ["dataset=fake", "dataset.train_size=4", "dataset.test_size=4", "model=resnet4", "recipe.epochs=1",
                "runtime.device=cpu"]  # fmt: skip
    runs = [(jobs([*settings, f"seed={s}"], multirun=False).configs[0], tmp_path / str(s)) for s in (0, 1)]
    train_module.train_together(runs)
    assert order == ["clear_workspaces", "build_data", "run_streams", "PeakMemory", "PeakMemory"]


def test_what_follows_a_warm_up_that_fails_waits_for_it(monkeypatch):
    """Weights are restored on the stream that was current: this must not overtake the steps already launched."""
    cuda = Cuda(monkeypatch)
    capture = CudaCapture()

    def fails():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        capture.warm_up(fails)
    assert cuda.current is cuda.default and cuda.default.waited_for == [capture.stream]


def test_a_capture_is_on_the_runs_own_stream(monkeypatch):
    cuda = Cuda(monkeypatch)
    (own,) = run_streams(CUDA, 1)
    seen = []
    with torch.cuda.stream(own):
        capture = CudaCapture()
        capture.warm_up(lambda: seen.append(cuda.current))
        capture.record(lambda: seen.append(cuda.current))
    assert seen == [own] * (WARM_UP_STEPS + 1)
    assert CudaCapture().stream not in (own, cuda.default), "the default stream cannot be captured"


@pytest.mark.parametrize("on_own_stream", [True, False])
def test_a_capture_that_fails_puts_the_stream_back_and_frees_its_pool(monkeypatch, on_own_stream):
    cuda = Cuda(monkeypatch)
    if on_own_stream:
        cuda.current = run_streams(CUDA, 1)[0]
    before = cuda.current

    def fails():
        raise RuntimeError("not permitted")

    with pytest.raises(RuntimeError, match="previous error during capture"):
        CudaCapture().record(fails)
    assert cuda.current is before
    assert cuda.ended == cuda.released == [(0, (0, 7))]
    CudaCapture().record(lambda: None)
    assert len(cuda.released) == 1, "a graph that was recorded releases its pool itself"
