"""Weights that evolve in time (ANODEV2): θ(t) of an ODE block's convolutions from learned w0 and p."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from anode_exp.ode import TABLEAUX, ExplicitRungeKutta, Theta, TimeGrid, VectorField, integrate

COUPLINGS = ("joint", "first")
SHARINGS = ("layer", "channel", "kernel")
EVOLUTION_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "none": None,
    "tanh": torch.tanh,
}


def _exponential(t: Tensor, growth: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of exp(t (growth + i turn))."""
    factor, angle = (t * growth).exp_(), t * turn
    return factor * angle.cos(), factor * angle.sin_()


class _Flow(torch.autograd.Function):
    """Weights at several times from growth and turn of every mode, w + synthesis ((z − 1) ⊙ analysis w), z = e^{t s}.

    It keeps only its arguments. Autograd would keep up to 16 times the weights in every block, from the forward to the
    backward pass.
    """

    @staticmethod
    def forward(ctx: Any, t: Tensor, growth: Tensor, turn: Tensor, w: Tensor, *bases: Tensor) -> Tensor:
        ctx.save_for_backward(t, growth, turn, w, *bases)
        analysis, synthesis = bases
        modes, reflected = (analysis @ w).chunk(2, dim=-2)
        cosine, sine = _exponential(t, growth, turn)
        change = cosine.sub_(1).mul(modes) - sine.mul(reflected)
        # Added to w, so that constant weights are w itself.
        return w + synthesis @ change

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        t, growth, turn, w, analysis, synthesis = ctx.saved_tensors
        modes, reflected = (analysis @ w).chunk(2, dim=-2)
        cosine, sine = _exponential(t, growth, turn)
        of_change = synthesis.T @ gradient
        of_modes = torch.cat([(of_change * (cosine - 1)).sum(0), (of_change * sine).sum(0).neg_()], dim=-2)
        of_w = (analysis.T @ of_modes).add_(gradient.sum(0))
        shape = (len(t), *growth.shape)
        along = (of_change * modes).sum_to_size(shape).mul_(t)
        across = of_change.mul_(reflected).sum_to_size(shape).mul_(t)
        of_growth = (along * cosine - across * sine).sum(0)
        of_turn = (along * sine + across * cosine).sum(0).neg_()
        return None, of_growth, of_turn, of_w, None, None


class ReactionDiffusionAdvection(nn.Module):
    """∂w/∂t = σ(τ Δw + υ·∇w + ρ w) over the spatial grid of one convolution's kernels, periodic, of spacing 1.

    With σ the identity each Fourier mode ω is multiplied by exp(t (ρ − τ|ω|² + i υ·ω)), exactly, at any t. In the
    real Hartley basis cas(ω·x) = cos(ω·x) + sin(ω·x), H(ω) = Σ_x w0(x) cas(ω·x), that is

        w(t, x) = (1/K) Σ_ω exp(t (ρ − τ|ω|²)) (cos(t υ·ω) H(ω) − sin(t υ·ω) H(−ω)) cas(ω·x)

    over the K points x of the kernel. Otherwise σ(Lw), with L the same operator, is solved by classic Runge–Kutta
    steps. A norm after the convolution removes the scale of an output channel's weights, and so the effect of a ρ that
    they share. All coefficients start at 0, where the weights are constant in time, bit for bit, and where every
    coefficient has a gradient. τ stays non-negative by projection before each use.

    Args:
        shape: of the weight, [c_out, c_in, k, …].
        sharing: ``layer``, one set of coefficients; ``channel``, one for every output channel; ``kernel``, one for
            every pair of an output and an input channel.
        activation: σ, a name in ``EVOLUTION_ACTIVATIONS``.

    Attributes, with [sets] = [1, 1], [c_out, 1] or [c_out, c_in]:
        tau: diffusion, [sets]; None for a kernel of one point, which has a reaction only.
        upsilon: advection, [axes of more than one point, sets], in grid spacings per unit of time; None likewise.
        rho: reaction, [sets].

    Source: ANODEV2 (arXiv 1906.04596); Hartley basis: Bracewell, J. Opt. Soc. Am. 73 (1983).
    """

    def __init__(self, shape: torch.Size, sharing: str = "layer", activation: str = "none") -> None:
        super().__init__()
        self.activation = EVOLUTION_ACTIVATIONS[activation]
        sets = {"layer": (1, 1), "channel": (shape[0], 1), "kernel": tuple(shape[:2])}[sharing]
        sizes = shape[2:]
        axes = [i for i, k in enumerate(sizes) if k > 1]
        self.rho = nn.Parameter(torch.zeros(sets))
        self.tau = nn.Parameter(torch.zeros(sets)) if axes else None
        self.upsilon = nn.Parameter(torch.zeros(len(axes), *sets)) if axes else None
        points = torch.tensor(list(product(*(range(k) for k in sizes))), dtype=torch.float64)
        # Frequencies of a discrete Fourier transform, in radians per grid spacing.
        frequencies = [torch.fft.fftfreq(k, dtype=torch.float64).tolist() for k in sizes]
        modes = torch.tensor(list(product(*frequencies)), dtype=torch.float64)
        omega = 2 * math.pi * modes
        phase = omega @ points.T  # [ω, x]
        # The highest frequency of an even size is its own conjugate, and has no derivative of odd order.
        turning = torch.where(modes == -0.5, 0.0, omega)[:, axes].T
        # Not saved: they follow from the kernel's shape.
        self.register_buffer("squared", omega.square().sum(1)[:, None].float(), persistent=False)  # [ω, 1]
        self.register_buffer("turning", turning[:, None, :, None].float(), persistent=False)  # [axes, 1, ω, 1]
        cas, reflected = phase.cos() + phase.sin(), phase.cos() - phase.sin()  # of ω and −ω
        self.register_buffer("analysis", torch.cat([cas, reflected]).float(), persistent=False)  # [2 ω, x]
        self.register_buffer("synthesis", (cas.T / len(cas)).float(), persistent=False)  # [x, ω]
        self.squared: Tensor
        self.turning: Tensor
        self.analysis: Tensor
        self.synthesis: Tensor
        self._field = VectorField(self)

    def _symbol(self) -> tuple[Tensor, Tensor]:
        """Growth ρ − τ|ω|² and turn υ·ω of every mode, each [c_out or 1, ω, c_in or 1]."""
        growth = self.rho[:, None]
        if self.tau is None or self.upsilon is None:
            return growth, torch.zeros_like(growth)
        return growth - self.tau[:, None] * self.squared, (self.upsilon[:, :, None] * self.turning).sum(0)

    def forward(self, t: float, w: Tensor) -> Tensor:
        """∂w/∂t of weights [c_out, K, c_in]."""
        growth, turn = self._symbol()
        modes, reflected = (self.analysis @ w).chunk(2, dim=-2)
        rate = self.synthesis @ (growth * modes - turn * reflected)
        return rate if self.activation is None else self.activation(rate)

    def evolve(self, w0: Tensor, start: float, step: float, count: int, n_steps: int) -> Tensor:
        """w at ``count`` times from ``start`` on, ``step`` apart: [count, *w0.shape].

        Args:
            n_steps: steps per unit of time, if σ is not the identity.
        """
        if self.tau is not None:
            with torch.no_grad():
                self.tau.clamp_(min=0.0)
        flat = w0.flatten(2).transpose(1, 2)  # [c_out, K, c_in]: a view in channels-last layout
        if self.activation is None:
            t = (torch.arange(count, device=w0.device, dtype=w0.dtype) * step + start)[:, None, None, None]
            growth, turn = self._symbol()
            if self.tau is None:  # one mode
                evolved = flat + (t * growth).expm1() * flat
            else:
                evolved = _Flow.apply(t, growth, turn, flat, self.analysis, self.synthesis)
        else:
            states, w, before = [], flat, 0.0
            for at in (start + n * step for n in range(count)):
                if at > before:
                    grid = TimeGrid(max(1, math.ceil((at - before) * n_steps)), before, at)
                    w = integrate(self._field, w, self._field.theta, grid, ExplicitRungeKutta(TABLEAUX["rk4"]))
                states.append(w)
                before = at
            evolved = torch.stack(states)
        return evolved.transpose(2, 3).reshape(count, *w0.shape)


class Evolution(nn.Module):
    """θ(t) for the convolutions of a vector field; its other parameters stay constant in time.

    ``joint`` (configuration 1): weights and activations advance together, and step n of the solve has θ(t_n).
    ``first`` (configuration 2): the weights first evolve to t = 1, and are then used in every step.

    Args:
        f: the vector field's module.
        coupling: joint or first.
        sharing, activation: as in ``ReactionDiffusionAdvection``.
        n_steps: steps of the weights over [0, 1], if they are time-stepped.

    Source: ANODEV2 (arXiv 1906.04596); θ(t) = w(t), with a delta as its kernel in time.
    """

    def __init__(
        self, f: nn.Module, coupling: str = "joint", sharing: str = "layer", activation: str = "none", n_steps: int = 10
    ) -> None:
        super().__init__()
        if coupling not in COUPLINGS:
            raise ValueError(f"coupling={coupling}: choose one of {COUPLINGS}")
        self.coupling, self.n_steps = coupling, n_steps
        kernels = [p for m in f.modules() if isinstance(m, nn.Conv2d) for p in [m.weight]]
        self.places = [i for i, p in enumerate(f.parameters()) if any(p is kernel for kernel in kernels)]
        shapes = [list(f.parameters())[i].shape for i in self.places]
        self.flows = nn.ModuleList(ReactionDiffusionAdvection(shape, sharing, activation) for shape in shapes)

    def forward(self, theta: Theta, n_steps: int) -> Theta:
        """θ for a solve of n_steps steps, in float32 or wider also under autocast.

        Args:
            theta: f's parameters, including w0.

        Returns:
            θ; evolved entries have a leading axis of n_steps (joint), or their own shape (first).
        """
        joint = self.coupling == "joint"
        start, step, count = (0.0, 1.0 / n_steps, n_steps) if joint else (1.0, 0.0, 1)
        evolved = list(theta)
        with torch.autocast(theta[0].device.type, enabled=False):
            for place, flow in zip(self.places, self.flows, strict=True):
                w = flow.evolve(theta[place], start, step, count, self.n_steps)  # type: ignore[operator]
                evolved[place] = w if joint else w[0]
        return tuple(evolved)
