"""Relative error of a gradient mode against full backpropagation in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def flat_gradient(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """∂J/∂θ of the cross entropy over all parameters, as one vector, in training mode."""
    network.train()
    network.zero_grad()
    F.cross_entropy(network(images), labels).backward()
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


def relative_error(network: nn.Module, exact: nn.Module, images: Tensor, labels: Tensor) -> float:
    """‖g − g_exact‖₂ / ‖g_exact‖₂ of two networks of equal weights, in the precision of the images."""
    g, truth = flat_gradient(network, images, labels), flat_gradient(exact, images, labels)
    return float((g - truth).norm() / truth.norm())
