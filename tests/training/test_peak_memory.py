import gc

import pytest
import torch
from conftest import make_ode_block
from torch import nn

from anode_exp.models import MODELS
from anode_exp.training.peak_memory import LiveTensorBytes, PeakMemory
from anode_exp.training.train_step import autocast_for, train_step

MB = 1_000_000


def test_counts_what_is_alive_and_the_most_there_was():
    there = torch.zeros(MB, dtype=torch.uint8)
    with LiveTensorBytes([there]) as live:
        assert live.now == MB
        a = torch.zeros(2 * MB, dtype=torch.uint8)
        view = a[10:]  # a view has no bytes of its own
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
        for _ in range(3):
            with memory.step(network, optimizer):
                images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
                train_step(network, optimizer, autocast_for("fp32", torch.device("cpu")), images, labels)
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
