"""The captured step, driven by a stand-in for the CUDA graph that repeats the recorded work."""

import pytest
import torch
from conftest import make_ode_block
from torch import nn

from anode_exp.gradient import GRADIENT_MODES
from anode_exp.models import MODELS, ode_blocks, take_evaluations
from anode_exp.ode import Evaluations
from anode_exp.training.graphed_step import WARM_UP_STEPS, GraphedStep, set_learning_rate
from anode_exp.training.train_step import autocast_for, train_step


class Repeat:
    """Repeats the recorded work on the same memory: what a replay does, but by running it."""

    def __init__(self, network: nn.Module) -> None:
        self.network, self.replays = network, 0

    def warm_up(self, work):
        for _ in range(WARM_UP_STEPS):
            work()

    def record(self, work):
        self.work = work
        self.results = tuple(x.clone() for x in work())
        return self.results

    def replay(self):
        self.replays += 1
        counters = [block.field.evaluations for block in ode_blocks(self.network)]
        for block in ode_blocks(self.network):  # a device replays without the host, which counts evaluations
            block.field.evaluations = Evaluations()
        for kept, new in zip(self.results, self.work(), strict=True):
            kept.copy_(new)
        for block, counter in zip(ode_blocks(self.network), counters, strict=True):
            block.field.evaluations = counter


def trained(mode: str, graphed: bool, by_time: bool = False) -> tuple[list[torch.Tensor], list[int], int]:
    """Losses, weights, buffers and momentum after ten steps of two epochs, their evaluations, and replays."""
    torch.manual_seed(0)

    def make(f):
        if by_time:
            f.time_norms([0.0, 0.25, 0.5, 0.75], affine_intervals=2)
        return make_ode_block(mode)(f)

    network = MODELS["squeezenext"](10, make, width=0.5)
    lr = torch.tensor(0.05) if graphed else 0.05
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    autocast = autocast_for("fp32", torch.device("cpu"))
    captures = []

    def capture():
        captures.append(Repeat(network))
        return captures[-1]

    step = GraphedStep(network, optimizer, autocast, capture) if graphed else None
    generator, losses, evaluations = torch.Generator().manual_seed(1), [], []
    for epoch in range(2):
        set_learning_rate(optimizer, 0.05 / (1 + epoch))
        for size in (4, 4, 4, 4, 3):
            images = torch.randn(size, 3, 32, 32, generator=generator)
            labels = torch.arange(size)
            run = step if step is not None else lambda *b: train_step(network, optimizer, autocast, *b)
            loss, correct = run(images, labels)
            losses += [loss.clone(), correct.clone()]
            evaluations += [(e.forward, e.backward) for e in take_evaluations(network)]
    state = [s["momentum_buffer"] for s in optimizer.state.values()]
    assert len(captures) == graphed
    replays = captures[0].replays if captures else 0
    return [*losses, *network.parameters(), *network.buffers(), *state], evaluations, replays


@pytest.mark.parametrize(("mode", "by_time"), [*((mode, False) for mode in GRADIENT_MODES), ("dto_checkpoint", True)])
def test_trains_as_the_eager_step_does(mode, by_time):
    """Bit for bit: through recording, another batch size, and a change of the learning rate."""
    ours, our_evaluations, replays = trained(mode, True, by_time)
    truth, evaluations, _ = trained(mode, False, by_time)
    assert replays == 7, "all but the first step and each epoch's last"
    assert all(torch.equal(a, b) for a, b in zip(ours, truth, strict=True))
    assert our_evaluations == evaluations


def test_the_learning_rate_is_changed_in_place_where_a_recorded_step_reads_it():
    weight = nn.Parameter(torch.ones(1))
    recorded = torch.tensor(0.1)
    captured = torch.optim.SGD([weight], lr=recorded)
    set_learning_rate(captured, 0.01)
    assert captured.param_groups[0]["lr"] is recorded and float(recorded) == pytest.approx(0.01)
    eager = torch.optim.SGD([weight], lr=0.1)
    set_learning_rate(eager, 0.01)
    assert eager.param_groups[0]["lr"] == 0.01


def test_whole_batches_are_recorded_even_if_a_smaller_one_comes_second():
    network = MODELS["squeezenext"](10, make_ode_block(), width=0.25)
    optimizer = torch.optim.SGD(network.parameters(), lr=torch.tensor(0.1), momentum=0.9)
    captures = []

    def capture():
        captures.append(Repeat(network))
        return captures[-1]

    step = GraphedStep(network, optimizer, autocast_for("fp32", torch.device("cpu")), capture, batch_size=4)
    for size in (4, 3, 4, 3, 4):
        step(torch.randn(size, 3, 32, 32), torch.arange(size))
    assert len(captures) == 1 and captures[0].replays == 2
