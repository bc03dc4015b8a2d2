import gc

import pytest
import torch
from conftest import make_ode_block
from torch import nn

from anode_exp.build import autocast_for
from anode_exp.commands.together import train, train_together
from anode_exp.config.compose import jobs
from anode_exp.models import MODELS
from anode_exp.tasks.classification import Classification
from anode_exp.training import graphed_step, peak_memory
from anode_exp.training import trainer as fit
from anode_exp.training.peak_memory import LiveTensorBytes, PeakMemory
from anode_exp.training.step import train_step

MB = 1_000_000


def test_counts_what_is_alive_and_the_most_there_was():
    there = torch.zeros(MB, dtype=torch.uint8)
    with LiveTensorBytes([there]) as live:
        assert live.now == MB
        a = torch.zeros(2 * MB, dtype=torch.uint8)
        view = a[10:]  # a view has no own bytes
        assert live.now == 3 * MB
        del a
        assert live.now == 3 * MB, "the view keeps the storage alive"
        del view
        assert live.now == MB
        torch.zeros(4 * MB, dtype=torch.uint8)
        assert (live.now, live.peak) == (MB, 5 * MB)


def test_counts_what_a_graph_saved_until_it_is_freed():
    x = torch.ones(MB // 4, requires_grad=True)
    with LiveTensorBytes([x]) as live:
        y = x.exp()  # saves its result
        z = y.sin()  # saves y
        total = z.sum()
        del y, z
        gc.collect()
        assert live.now == 2 * MB + 4  # x, y saved twice over, the sum; sin's result is not saved
        total.backward()
        assert live.now == 2 * MB + 4  # x, its gradient, the sum
        assert live.peak == pytest.approx(4 * MB, rel=0.01)  # x, y, and two gradients on the way


def test_steps_of_the_checkpointed_mode_hold_less_and_grow_with_n_steps():
    def peak(mode, n_steps):
        torch.manual_seed(0)
        network = MODELS["squeezenext"](10, make_ode_block(mode, "rk2", n_steps), width=0.5)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        memory = PeakMemory(torch.device("cpu"))
        assert memory.kind == "live_tensor_bytes" and memory.reserved_bytes is None
        for _ in range(2):
            with memory.step(network, optimizer):
                images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
                train_step(
                    network, optimizer, autocast_for("fp32", torch.device("cpu")), Classification(), (images, labels)
                )
                del images
        return memory.peak_bytes

    full, checkpointed, reverse = (peak(m, 4) for m in ("full_backprop", "dto_checkpoint", "reverse_adjoint"))
    assert reverse < checkpointed < 0.75 * full
    assert peak("full_backprop", 8) > 1.5 * full
    assert peak("reverse_adjoint", 8) == pytest.approx(reverse, rel=0.01), "flat in the number of steps"


def test_the_optimisers_state_counts():
    network = nn.Linear(1000, 1000, bias=False)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    memory = PeakMemory(torch.device("cpu"))
    for _ in range(2):
        with memory.step(network, optimizer):
            optimizer.zero_grad()
            network(torch.ones(1, 1000)).sum().backward()
            optimizer.step()
    assert memory.peak_bytes >= 3 * 4 * MB  # weights, gradient, momentum


class StandIn:
    """An allocator that is told what is allocated. Freed blocks stay reserved."""

    def __init__(self, now: int = 0) -> None:
        self.now = self.most = self.kept = now

    def use(self, n_bytes: int, keep: bool = False) -> None:
        self.most, self.kept = max(self.most, self.now + n_bytes), max(self.kept, self.now + n_bytes)
        self.now += n_bytes if keep else 0

    def allocated(self) -> int:
        return self.now

    def most_allocated(self) -> int:
        return self.most

    def most_reserved(self) -> int:
        return self.kept

    def reset_peaks(self) -> None:
        self.most = self.now

    def empty_cache(self) -> None:
        self.kept = self.now


@pytest.fixture
def allocator(monkeypatch) -> StandIn:
    there = StandIn(now=100 * MB)  # an earlier run's workspaces, and the data set
    monkeypatch.setattr(peak_memory, "allocator_of", lambda device: there)
    return there


def test_a_pause_does_not_count(allocator):
    memory = PeakMemory(torch.device("cpu"), shared=30 * MB)
    assert memory.kind == "cuda_max_allocated"
    allocator.use(5 * MB)
    with memory.paused():
        assert memory.peak_bytes == 35 * MB, "the data set and its own, nothing of others"
        allocator.use(50 * MB)
    assert (memory.peak_bytes, memory.reserved_bytes) == (35 * MB, 105 * MB)
    allocator.use(7 * MB)
    assert (memory.peak_bytes, memory.reserved_bytes) == (37 * MB, 105 * MB)
    memory.restart()
    assert (memory.peak_bytes, memory.reserved_bytes) == (30 * MB, 100 * MB)
    memory.alone()
    allocator.use(MB)
    assert (memory.peak_bytes, memory.reserved_bytes) == (30 * MB, None)


def test_runs_are_charged_with_their_own_training(tmp_path, allocator, monkeypatch):
    """Not with evaluations, nor with what other runs of the process hold or left behind."""
    small = ["dataset=fake", "dataset.train_size=24", "dataset.test_size=8", "model=resnet4", "recipe.batch_size=8",
             "recipe.epochs=2", "runtime.device=cpu"]  # fmt: skip
    configs = [jobs([*small, f"seed={seed}"], multirun=False).configs[0] for seed in (0, 1, 2)]

    def spending(function, n_bytes, keep=0):
        def spends(*args, **kwargs):
            allocator.use(keep, keep=True)
            allocator.use(n_bytes)
            return function(*args, **kwargs)

        return spends

    monkeypatch.setattr(graphed_step, "train_step", spending(graphed_step.train_step, 6 * MB, keep=MB))
    monkeypatch.setattr(fit, "evaluate", spending(fit.evaluate, 500 * MB))
    first = train(configs[0], tmp_path / "first")
    own = first["dataset_bytes"] + 6 * MB + 6 * MB  # six steps, each of which leaves something
    assert first["peak_memory_bytes"] == own
    assert first["reserved_memory_bytes"] == 100 * MB + 3 * MB + 6 * MB, "of the epoch before the first evaluation"
    together = train_together([(c, tmp_path / str(c.seed)) for c in configs[1:]])
    for results in together:  # their first three steps, which they take alone
        assert results["peak_memory_bytes"] == first["dataset_bytes"] + 3 * MB + 6 * MB
        assert results["reserved_memory_bytes"] is None
