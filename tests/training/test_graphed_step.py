"""The captured step, driven by a stand-in for the CUDA graph that repeats the recorded work."""

import logging
from functools import cache

import pytest
import torch
from conftest import IMAGE_MODES, Repeat, make_ode_block
from torch import nn

from anode_exp.build import autocast_for
from anode_exp.models import MODELS, take_evaluations
from anode_exp.tasks.classification import Classification
from anode_exp.training.graphed_step import GraphedStep
from anode_exp.training.step import set_learning_rate, train_step


class FailsToWarmUp(Repeat):
    """Two steps of the warm-up succeed; the third runs out of memory."""

    def warm_up(self, work):
        work()
        work()
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has …")


class FailsToRecord(Repeat):
    """The step has an operation that cannot be captured; then the end of the capture also raises, as in torch."""

    def record(self, work):
        try:
            work()
            raise RuntimeError("operation not permitted when stream is capturing")
        except RuntimeError:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")  # noqa: B904


def trained(
    mode: str, graphed: bool, by_time: bool = False, kind: type = Repeat
) -> tuple[list[torch.Tensor], list[int], int]:
    """Losses, weights, buffers and momentum after ten steps of two epochs, their evaluations, and replays."""
    torch.manual_seed(0)

    def make(f):
        if by_time:
            f.time_norms([0.0, 0.25, 0.5, 0.75], affine_intervals=2)
        return make_ode_block(mode)(f)

    network = MODELS["resnet4"](10, make)
    lr = torch.tensor(0.05) if graphed else 0.05
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    autocast = autocast_for("fp32", torch.device("cpu"))
    captures = []

    def capture():
        captures.append(kind(network))
        return captures[-1]

    step = GraphedStep(network, optimizer, autocast, Classification(), capture) if graphed else None
    generator, losses, evaluations = torch.Generator().manual_seed(1), [], []
    for epoch in range(2):
        set_learning_rate(optimizer, 0.05 / (1 + epoch))
        for size in (2, 2, 2, 2, 1):
            images = torch.randn(size, 3, 32, 32, generator=generator)
            labels = torch.arange(size)
            run = step if step is not None else lambda b: train_step(network, optimizer, autocast, Classification(), b)
            loss, sums = run((images, labels))
            losses += [loss.clone(), sums["correct"].clone()]
            evaluations += [(e.forward, e.backward) for e in take_evaluations(network)]
    state = [s["momentum_buffer"] for s in optimizer.state.values()]
    assert len(captures) == graphed
    replays = captures[0].replays if captures else 0
    return [*losses, *network.parameters(), *network.buffers(), *state], evaluations, replays


@cache
def eager(mode: str, by_time: bool = False) -> tuple[list[torch.Tensor], list[int], int]:
    return trained(mode, False, by_time)


@pytest.mark.parametrize(("mode", "by_time"), [*((mode, False) for mode in IMAGE_MODES), ("dto_checkpoint", True)])
def test_trains_as_the_eager_step_does(mode, by_time):
    """Bit for bit: through recording, another batch size, and a change of the learning rate."""
    ours, our_evaluations, replays = trained(mode, True, by_time)
    truth, evaluations, _ = eager(mode, by_time)
    assert replays == 7, "all but the first step and each epoch's last"
    assert all(torch.equal(a, b) for a, b in zip(ours, truth, strict=True))
    assert our_evaluations == evaluations


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (FailsToWarmUp, "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB."),
        (FailsToRecord, "RuntimeError: operation not permitted when stream is capturing"),
    ],
)
def test_a_capture_that_fails_leaves_an_eager_run(kind, reason, caplog):
    """Bit for bit the eager run, with one warning that names the first error; recording is not tried again."""
    with caplog.at_level(logging.WARNING):
        ours, our_evaluations, replays = trained("dto_checkpoint", graphed=True, kind=kind)
    truth, evaluations, _ = eager("dto_checkpoint", False)
    assert replays == 0
    assert all(torch.equal(a, b) for a, b in zip(ours, truth, strict=True))
    assert our_evaluations == evaluations
    (warning,) = caplog.messages
    assert reason in warning and "runtime.cuda_graph=false silences this" in warning and "\n" not in warning


def test_an_eager_step_that_fails_is_an_error():
    """Only errors of the recording are caught: a first step that runs out of memory is not tried again."""
    network = MODELS["resnet4"](10, make_ode_block())
    optimizer = torch.optim.SGD(network.parameters(), lr=torch.tensor(0.1), momentum=0.9)
    network.register_forward_hook(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")))
    step = GraphedStep(
        network, optimizer, autocast_for("fp32", torch.device("cpu")), Classification(), lambda: Repeat(network)
    )
    with pytest.raises(torch.OutOfMemoryError):
        step((torch.randn(2, 3, 32, 32), torch.arange(2)))


def test_a_recording_can_be_forgotten():
    network = MODELS["resnet4"](10, make_ode_block())
    optimizer = torch.optim.SGD(network.parameters(), lr=torch.tensor(0.1), momentum=0.9)
    captures = []

    def capture():
        captures.append(Repeat(network))
        return captures[-1]

    step = GraphedStep(network, optimizer, autocast_for("fp32", torch.device("cpu")), Classification(), capture)
    for times in (1, 2):
        for _ in range(3):
            step((torch.randn(2, 3, 32, 32), torch.arange(2)))
        assert len(captures) == times and captures[-1].replays == 2
        step.forget()


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
    network = MODELS["resnet4"](10, make_ode_block())
    optimizer = torch.optim.SGD(network.parameters(), lr=torch.tensor(0.1), momentum=0.9)
    captures = []

    def capture():
        captures.append(Repeat(network))
        return captures[-1]

    step = GraphedStep(
        network, optimizer, autocast_for("fp32", torch.device("cpu")), Classification(), capture, batch_size=4
    )
    for size in (4, 3, 4, 3, 4):
        step((torch.randn(size, 3, 32, 32), torch.arange(size)))
    assert len(captures) == 1 and captures[0].replays == 2
