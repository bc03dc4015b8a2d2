"""A continuous normalising flow: a density through the solve of an ODE for a sample and its log-density together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anode_exp.models.layers import ACTIVATIONS, MakeOdeBlock
from anode_exp.models.ode_block import OdeBlock
from anode_exp.ode import SOLVERS, Tolerance, VectorField, solve_forward


def _gelu_derivative(a: Tensor) -> Tensor:
    return torch.special.ndtr(a) + a * torch.exp(-0.5 * a.square()) / math.sqrt(2 * math.pi)


DERIVATIVES: dict[str, Callable[[Tensor], Tensor]] = {"softplus": torch.sigmoid, "gelu": _gelu_derivative}
"""σ' of the activations that a flow may have: the trace contains it, so its gradient contains σ''."""


class ConcatSquashLinear(nn.Module):
    """y = (W x + b) ∘ s(t) + c t with s(t) = sigmoid(w t + u), x: [..., n_in], y: [..., n_out] (FFJORD's layer)."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(n_in, n_out)
        self.gate = nn.Linear(1, n_out)
        self.shift = nn.Linear(1, n_out, bias=False)

    def gate_at(self, t: float | Tensor) -> Tensor:
        """s(t): [n_out]; for a time per row, [rows, 1], it is [rows, n_out]."""
        return torch.sigmoid(self.gate.weight[:, 0] * t + self.gate.bias)

    def forward(self, t: float | Tensor, x: Tensor, gate: Tensor) -> Tensor:
        """The layer, with s(t) as ``gate``: the caller needs it for tangents too."""
        return torch.addcmul(self.shift.weight[:, 0] * t, self.linear(x), gate)

    def tangent(self, dx: Tensor, gate: Tensor) -> Tensor:
        """(∂y/∂x) dx."""
        return F.linear(dx, self.linear.weight) * gate

    @property
    def weight(self) -> Tensor:
        return self.linear.weight


class Velocity(nn.Module):
    """v(t, z) of a sample z: [B, d]: ConcatSquash layers with an activation between them.

    Args:
        hidden: width of each hidden layer; without any, the field is affine in z.

    Raises:
        ValueError: for an activation without a continuous derivative.
    """

    def __init__(self, size: int, hidden: Sequence[int], activation: str = "softplus") -> None:
        super().__init__()
        if activation not in DERIVATIVES:
            raise ValueError(
                f"activation={activation}: the density of a flow contains the activation's derivative, which must be "
                f"continuous; choose one of {', '.join(DERIVATIVES)}"
            )
        self.size = size
        self.activation, self.derivative = ACTIVATIONS[activation](), DERIVATIVES[activation]
        self.layers = nn.ModuleList(ConcatSquashLinear(*sizes) for sizes in pairwise((size, *hidden, size)))

    def forward(self, t: float | Tensor, z: Tensor) -> Tensor:
        return self.with_tangents(t, z, None)[0]

    def with_tangents(self, t: float | Tensor, z: Tensor, dz: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """v and (∂v/∂z) dz by forward differentiation; dz: [..., B or 1, d], several tangents with leading axes."""
        for i, layer in enumerate(self.layers):
            if i > 0:
                dz = None if dz is None else self.derivative(z) * dz
                z = self.activation(z)
            gate = layer.gate_at(t)  # type: ignore[operator]
            z = layer(t, z, gate)
            dz = None if dz is None else layer.tangent(dz, gate)  # type: ignore[operator]
        return z, dz

    def with_trace(self, t: float | Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """v and tr ∂v/∂z: [B, 1], exact.

        With two hidden layers ∂v/∂z = S₃W₃E₂W₂E₁W₁ with diagonal S, E, and S₃ the same for all samples. So
        tr = e₂ᵀ (W₂ ∘ (W₁S₃W₃)ᵀ) e₁, and the trace costs about as much as v. Otherwise, and where t differs between
        samples, it takes d tangents.
        """
        if len(self.layers) != 3 or isinstance(t, Tensor):
            identity = torch.eye(self.size, dtype=z.dtype, device=z.device)[:, None]
            v, tangents = self.with_tangents(t, z, identity)
            assert tangents is not None
            return v, tangents.expand(-1, len(z), -1).diagonal(dim1=0, dim2=2).sum(1, keepdim=True)
        first, second, last = self.layers
        gates = [layer.gate_at(t) for layer in self.layers]  # type: ignore[operator]
        a1 = first(t, z, gates[0])
        a2 = second(t, self.activation(a1), gates[1])
        v = last(t, self.activation(a2), gates[2])
        outer = first.weight @ (gates[2][:, None] * last.weight)  # [h₁, h₂]
        e1, e2 = self.derivative(a1) * gates[0], self.derivative(a2) * gates[1]
        return v, (e2 * F.linear(e1, second.weight * outer.T)).sum(1, keepdim=True)


class FlowField(nn.Module):
    """d/dt [z, ℓ] = [v(t, z), −tr ∂v/∂z], or with noise e in the state d/dt [z, ℓ, e] = [v, −eᵀ(∂v/∂z)e, 0].

    The second is Hutchinson's estimate of the trace, whose expectation is exact if E[eeᵀ] = I. Each solve has its own
    noise: as part of the state it is the same in all evaluations of the solve, including those of a gradient mode.

    State: [B, d + 1], or [B, 2d + 1] with noise.

    Source: FFJORD (arXiv 1810.01367).
    """

    def __init__(self, size: int, hidden: Sequence[int], activation: str = "softplus") -> None:
        super().__init__()
        self.velocity = Velocity(size, hidden, activation)

    def forward(self, t: float | Tensor, y: Tensor) -> Tensor:
        size = self.velocity.size
        if y.shape[1] == size + 1:
            v, trace = self.velocity.with_trace(t, y[:, :size])
            return torch.cat([v, -trace], 1)
        z, _, noise = y.split([size, 1, size], 1)
        v, tangent = self.velocity.with_tangents(t, z, noise)
        return torch.cat([v, -(tangent * noise).sum(1, keepdim=True), torch.zeros_like(noise)], 1)


ACCURATE = Tolerance(rtol=1e-5, atol=1e-5, max_evaluations=10_000)
"""For likelihoods that are reported, by Dormand–Prince steps: training can exploit the errors of coarse steps."""

REVERSIBLE = Tolerance(rtol=1e-7, atol=1e-7, max_evaluations=10_000)
"""For samples: mapped back to the normals they came from, the worst entry is within 1e-4 in float32.

At 1e-6 it was not: the tolerance is for the batch's root mean square, which the worst sample exceeds.
"""


class NormalizingFlow(nn.Module):
    """log p(x) = log N(z(1); 0, I) − ℓ(1), where [z, ℓ] is solved from [x, 0] at t = 0 through every block.

    Args:
        blocks: each over t in [0, 1], with a ``FlowField`` as f.

    Source: FFJORD (arXiv 1810.01367); PNODE (arXiv 2206.01298) Sec. V.
    """

    def __init__(self, blocks: Sequence[OdeBlock]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """log p(x): [B] of x: [B, d], with each block's own solver and steps, differentiable by its gradient mode.

        Args:
            noise: [B, d], independent entries of mean 0 and variance 1, for an estimate of the trace; by default the
                trace is exact.
        """
        y = _state(x, noise)
        for block in self.blocks:
            y = block(y)
        return _log_density(y, x.shape[1])

    @torch.no_grad()
    def log_prob(self, x: Tensor, tolerance: Tolerance = ACCURATE) -> Tensor:
        """log p(x): [B] of x: [B, d], by adaptive Dormand–Prince steps with the exact trace; without a gradient.

        Raises:
            SolveFailed: if the tolerance cannot be met.
        """
        y = _state(x, None)
        for block in self.blocks:
            field = VectorField(block.f)  # type: ignore[arg-type]  # a new one: the block's own counts the run's steps
            y, _ = solve_forward(field, y, field.theta, tolerance, SOLVERS["dopri5"]())
        return _log_density(y, x.shape[1])

    @torch.no_grad()
    def normals(self, x: Tensor, tolerance: Tolerance = REVERSIBLE) -> Tensor:
        """z(1) of x, both [B, d]: normally distributed where x has the flow's density."""
        for block in self.blocks:
            x = self._carry(block, x, tolerance)  # type: ignore[arg-type]
        return x

    @torch.no_grad()
    def sample(self, normals: Tensor, tolerance: Tolerance = REVERSIBLE) -> Tensor:
        """Samples x of the flow's density from normally distributed z(1), both [B, d]: the inverse of ``normals``.

        Raises:
            SolveFailed: if the tolerance cannot be met.
        """
        backwards = replace(tolerance, t0=tolerance.t1, t1=tolerance.t0)
        for block in reversed(self.blocks):
            normals = self._carry(block, normals, backwards)  # type: ignore[arg-type]
        return normals

    def _carry(self, block: OdeBlock, z: Tensor, tolerance: Tolerance) -> Tensor:
        field = VectorField(block.f.velocity)  # type: ignore[arg-type]
        return solve_forward(field, z, field.theta, tolerance, SOLVERS["dopri5"]())[0]


def _state(x: Tensor, noise: Tensor | None) -> Tensor:
    return torch.cat([x, x.new_zeros(len(x), 1), *([] if noise is None else [noise])], 1)


def _log_density(y: Tensor, size: int) -> Tensor:
    z, change = y[:, :size], y[:, size]
    return -0.5 * (z.square().sum(1) + size * math.log(2 * math.pi)) - change


def flow(
    size: int,
    make_ode_block: MakeOdeBlock,
    hidden: Sequence[int],
    activation: str = "softplus",
    blocks_per_stage: int = 1,
) -> NormalizingFlow:
    """A flow of ``blocks_per_stage`` blocks, one after another, each with a ``FlowField`` of its own."""
    blocks = [make_ode_block(FlowField(size, hidden, activation)) for _ in range(blocks_per_stage)]
    return NormalizingFlow(cast(list[OdeBlock], blocks))
