"""One training step, and the evaluation of a split. Neither reads a tensor on the host inside its loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anode_exp.config.schema import RuntimeConfig


def autocast_for(precision: str, device: torch.device) -> Callable[[], torch.autocast]:
    """A factory of forward contexts: bfloat16 autocast for ``bf16``, nothing for ``fp32`` and ``tf32``."""
    return lambda: torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def set_backends(runtime: RuntimeConfig) -> None:
    """The process's settings of CUDA's libraries.

    Precision ``tf32`` lets CUDA round float32 factors to TF32; ``fp32`` and ``bf16`` keep float32 operations exact.
    ``cudnn_benchmark`` lets cuDNN time its algorithms where a shape is new, in eager steps before any recording. What
    it finds is kept for the process, whatever the setting is later.
    """
    allow = runtime.precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = allow
    torch.backends.cudnn.allow_tf32 = allow
    torch.backends.cudnn.benchmark = runtime.cudnn_benchmark


def train_step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    autocast: Callable[[], torch.autocast],
    images: Tensor,
    labels: Tensor,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Forward, backward, optimiser.

    Args:
        images: [B, 3, H, W]; labels: [B].
        label_smoothing: share of each target that is spread over all classes.

    Returns:
        Mean cross entropy and number of correct predictions, both scalars on the device, of the weights before the
        update.
    """
    optimizer.zero_grad(set_to_none=True)
    with autocast():
        logits = network(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    loss.backward()
    optimizer.step()
    return loss.detach(), (logits.detach().argmax(1) == labels).sum()


@torch.no_grad()
def evaluate(
    network: nn.Module,
    autocast: Callable[[], torch.autocast],
    batches: Iterable[tuple[Tensor, Tensor]],
) -> tuple[float, float]:
    """Mean cross entropy and accuracy in [0, 1] over all images, in evaluation mode; one host read at the end."""
    was_training = network.training
    network.eval()
    loss_sum: Tensor | float = 0.0
    correct: Tensor | int = 0
    n = 0
    for images, labels in batches:
        with autocast():
            logits = network(images)
            loss_sum = loss_sum + F.cross_entropy(logits, labels, reduction="sum")
        correct = correct + (logits.argmax(1) == labels).sum()
        n += len(labels)
    network.train(was_training)
    return float(loss_sum) / n, int(correct) / n
