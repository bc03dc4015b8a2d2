"""A training step, a moving average of its weights, an evaluation: none reads a tensor on the host inside its loop."""

from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from anode_exp.tasks.task import Batch, Sums, Task
from anode_exp.training.world import ALONE, World

Step = Callable[[Batch], tuple[Tensor, Sums]]
"""batch → (mean loss, sums): one training step."""


def train_step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    autocast: Callable[[], torch.autocast],
    task: Task,
    batch: Batch,
    world: World = ALONE,
) -> tuple[Tensor, Sums]:
    """Forward, backward, optimiser.

    Returns:
        The mean loss and the task's sums, scalars on the device, of the weights before the update.
    """
    optimizer.zero_grad(set_to_none=True)
    with autocast():
        loss, output = task.loss(network, batch)
    loss.backward()
    world.mean_(p.grad for p in network.parameters() if p.grad is not None)
    optimizer.step()
    return loss.detach(), task.sums(output.detach(), batch)


@torch.no_grad()
def evaluate(
    network: nn.Module, autocast: Callable[[], torch.autocast], task: Task, batches: Iterable[Batch]
) -> dict[str, float]:
    """The task's metrics over all batches, in evaluation mode; one host read at the end."""
    was_training = network.training
    network.eval()
    totals: dict[str, Tensor | float] = {}
    n = 0
    for batch in batches:
        with autocast():
            sums = task.evaluation_sums(network, batch)
        totals = {name: totals.get(name, 0.0) + value for name, value in sums.items()}
        n += len(batch[0])
    network.train(was_training)
    return task.metrics({name: float(total) for name, total in totals.items()}, n)


def state_tensors(network: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What lives between training steps: parameters, buffers and the optimiser's state, gradients not."""
    state = [x for s in optimizer.state.values() for x in s.values() if isinstance(x, Tensor)]
    return [*network.parameters(), *network.buffers(), *state]


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


def _values(network: nn.Module) -> list[Tensor]:
    return [x for x in (*network.parameters(), *network.buffers()) if x.is_floating_point()]


class MovingAverage:
    """w̄ ← decay·w̄ + (1 − decay)·w after every step, from the first step's w on.

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
