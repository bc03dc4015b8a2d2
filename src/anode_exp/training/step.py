"""A training step, a moving average of its weights, an evaluation: none reads a tensor on the host inside its loop."""

from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from anode_exp.tasks.task import Batch, Sums, Task
from anode_exp.training.world import ALONE, World

Step = Callable[..., tuple[Tensor, Sums]]
"""(batch, size of the batch of all processes) → (mean loss, sums): one training step. The size is optional."""


def train_step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    autocast: Callable[[], torch.autocast],
    task: Task,
    batch: Batch,
    world: World = ALONE,
    whole: int | None = None,
) -> tuple[Tensor, Sums]:
    """Forward, backward, optimiser.

    Args:
        batch: this process's part of the batch.
        whole: size of the batch of all processes, by default this part's size times their number. The loss of a part
            is weighted by its size, so that the mean over processes is that of the whole batch.

    Returns:
        The mean loss and the task's sums, scalars on the device, with the weights before the update. With several
        processes, those of the whole batch are the mean and the sums of these over processes.
    """
    optimizer.zero_grad(set_to_none=True)
    try:
        with autocast():
            loss, output = task.loss(network, batch)
        if whole is not None and (weight := len(batch[0]) * world.size / whole) != 1.0:
            loss = loss * weight
        loss.backward()
    except Exception as error:
        world.settle(error)
        raise
    world.settle(None)
    world.mean_(p.grad for p in network.parameters() if p.grad is not None)
    optimizer.step()
    return loss.detach(), task.sums(output.detach(), batch)


@torch.no_grad()
def evaluate(
    network: nn.Module,
    autocast: Callable[[], torch.autocast],
    task: Task,
    batches: Iterable[Batch],
    world: World = ALONE,
) -> dict[str, float]:
    """The task's metrics over all batches of all processes, in evaluation mode; one host read at the end."""
    was_training = network.training
    network.eval()
    totals: dict[str, Tensor | float] = {}
    n = 0
    try:
        for batch in batches:
            with autocast():
                sums = task.evaluation_sums(network, batch)
            totals = {name: totals.get(name, 0.0) + value for name, value in sums.items()}
            n += len(batch[0])
    except Exception as error:
        world.settle(error)
        raise
    world.settle(None)
    network.train(was_training)
    summed = torch.tensor([float(n), *(float(total) for total in totals.values())], dtype=torch.float64)
    world.sum_([summed])
    count, *values = summed.tolist()
    return task.metrics(dict(zip(totals, values, strict=True)), int(count))


def state_tensors(network: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors that exist between training steps: parameters, buffers and the optimiser's state, no gradients."""
    state = [x for s in optimizer.state.values() for x in s.values() if isinstance(x, Tensor)]
    return [*network.parameters(), *network.buffers(), *state]


def restart_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Set momentum to zero, as in an optimiser's first step; in place, as a recorded step requires."""
    for state in optimizer.state.values():
        if state.get("momentum_buffer") is not None:
            state["momentum_buffer"].zero_()


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate, times a group's ``lr_factor``; in place if it is a tensor, which a recorded step reads."""
    for group in optimizer.param_groups:
        rate = lr * group.get("lr_factor", 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _values(network: nn.Module) -> list[Tensor]:
    return [x for x in (*network.parameters(), *network.buffers()) if x.is_floating_point()]


class MovingAverage:
    """w̄ ← decay·w̄ + (1 − decay)·w after every step, starting from the first step's w.

    ``torch.optim.swa_utils.AveragedModel`` does the same, but waits for the device in every step, and averages index
    buffers too.

    Attributes:
        network: a copy that holds w̄.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network, self.decay, self.steps = deepcopy(network).requires_grad_(False), decay, 0

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        if self.steps:
            torch._foreach_lerp_(self.tensors(), _values(network), 1 - self.decay)
        else:
            torch._foreach_copy_(self.tensors(), _values(network))
        self.steps += 1

    def tensors(self) -> list[Tensor]:
        return _values(self.network)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "network": self.network.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self.network.load_state_dict(state["network"])
