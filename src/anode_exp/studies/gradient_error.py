"""Gradients of a network as one vector, and how far one is from another."""

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


def relative_error(g: Tensor, exact: Tensor) -> float:
    """‖g − g_exact‖₂ / ‖g_exact‖₂."""
    return float((g - exact).norm() / exact.norm())


def split_error(reverse: Tensor, stored: Tensor, exact: Tensor) -> dict[str, float]:
    """The reverse-time adjoint's error as the sum of two vectors, each relative to the exact gradient's norm.

    g_reverse − g_exact = (g_reverse − g_stored) + (g_stored − g_exact): what comes of not retracing the trajectory,
    and what is left on the stored one, where the continuous adjoint does not belong to the discrete solve. The norms do
    not add up where the two point apart.

    Source: the two faults of ANODE (arXiv 1902.10298), Sec. III and IV.
    """
    norm = exact.norm()
    return {
        "reversal_error": float((reverse - stored).norm() / norm),
        "inconsistency_error": float((stored - exact).norm() / norm),
    }
