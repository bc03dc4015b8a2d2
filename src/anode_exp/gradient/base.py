"""What every gradient mode offers: a solve whose result can be differentiated in y0 and θ."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from anode_exp.ode import ExplicitRungeKutta, Theta, TimeGrid, VectorField


class GradientMode(Protocol):
    """How a solve is differentiated. The forward values are those of ``integrate`` in every mode, bit for bit."""

    def solve(self, field: VectorField, y0: Tensor, theta: Theta, grid: TimeGrid, solver: ExplicitRungeKutta) -> Tensor:
        """y(t1) of dy/dt = f(t, y, θ), y(t0) = y0, with this mode's gradients in y0 and θ.

        Args:
            y0: initial state, any shape.
            theta: f's parameters, leaves or not; constant in time, or with a leading axis of n_steps.
        """
        ...


def current_autocast(device_type: str) -> Callable[[], torch.autocast]:
    """A factory of contexts equal to the autocast in force now: a Function's backward does not inherit it."""
    settings: dict[str, Any] = {
        "dtype": torch.get_autocast_dtype(device_type),
        "enabled": torch.is_autocast_enabled(device_type),
        "cache_enabled": torch.is_autocast_cache_enabled(),
    }
    return partial(torch.autocast, device_type, **settings)
