"""Weights that evolve in time (ANODEV2): θ(t) of an ODE block's convolutions from learned w0 and p."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor, nn

from anode_exp.ode import TABLEAUX, ExplicitRungeKutta, Theta, TimeGrid, VectorField, integrate

COUPLINGS = ("joint", "first")
SHARINGS = ("layer", "channel")
EVOLUTION_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "none": None,
    "tanh": torch.tanh,
    "relu": torch.relu,
}


class ReactionDiffusionAdvection(nn.Module):
    """∂w/∂t = σ(τ Δw + υ·∇w + ρ w) over the spatial grid of one convolution's kernels, periodic, of spacing 1.

    With σ the identity each Fourier mode ω is multiplied by exp(t (ρ − τ|ω|² + i υ·ω)), so that

        w(t, x) = Σ_x' G(t, x − x') w0(x'),   G(t, x) = (1/K) Σ_ω exp(t (ρ − τ|ω|²)) cos(ω·(x + t υ)),

    exact at any t, over the K points x of the kernel. Otherwise classic Runge–Kutta steps of σ(Lw), L the same
    operator. A norm after the convolution takes out the scale of its weights, and so most of what ρ does.
    All coefficients start at 0, where the weights are constant in time, to the last bit, and where every
    coefficient has a gradient. τ stays non-negative by projection before each use.

    Args:
        shape: of the weight, [c_out, c_in, k, …].
        sharing: ``layer``, one set of coefficients, or ``channel``, one for every output channel.
        activation: σ, a name in ``EVOLUTION_ACTIVATIONS``.

    Attributes:
        tau: diffusion, [1 or c_out]; absent for a kernel of one point, which only reacts.
        upsilon: advection, [axes of more than one point, 1 or c_out], in grid spacings a unit of time; likewise.
        rho: reaction, [1 or c_out].

    Source: ANODEV2 (arXiv 1906.04596).
    """

    def __init__(self, shape: torch.Size, sharing: str = "layer", activation: str = "none") -> None:
        super().__init__()
        self.activation = EVOLUTION_ACTIVATIONS[activation]
        sets = 1 if sharing == "layer" else shape[0]
        sizes = shape[2:]
        axes = [i for i, k in enumerate(sizes) if k > 1]
        self.rho = nn.Parameter(torch.zeros(sets))
        self.tau = nn.Parameter(torch.zeros(sets)) if axes else None
        self.upsilon = nn.Parameter(torch.zeros(len(axes), sets)) if axes else None
        points = torch.tensor(list(product(*(range(k) for k in sizes))), dtype=torch.float64)
        # Frequencies as of a discrete Fourier transform, in radians a grid spacing.
        frequencies = [torch.fft.fftfreq(k, dtype=torch.float64).tolist() for k in sizes]
        modes = torch.tensor(list(product(*frequencies)), dtype=torch.float64)
        omega = 2 * math.pi * modes
        lag = (points[:, None] - points[None, :]) % torch.tensor(sizes, dtype=torch.float64)
        strides = torch.tensor([math.prod(sizes[i + 1 :]) for i in range(len(sizes))], dtype=torch.float64)
        # No state: what they hold follows from the kernel's shape.
        self.register_buffer("squared", omega.square().sum(1).float(), persistent=False)  # [ω]
        # The highest frequency of an even size is its own conjugate, and has no derivative of odd order.
        turning = torch.where(modes == -0.5, 0.0, omega)[:, axes]
        self.register_buffer("turning", turning.T.float(), persistent=False)  # [axes, ω]
        self.register_buffer("phase", (points @ omega.T).float(), persistent=False)  # [x, ω]
        self.register_buffer("lag", (lag @ strides).long(), persistent=False)  # [x, x'] → index of x − x'
        self.squared: Tensor
        self.turning: Tensor
        self.phase: Tensor
        self.lag: Tensor
        self._field = VectorField(self)

    def _symbol(self) -> tuple[Tensor, Tensor]:
        """Growth ρ − τ|ω|² and turn υ·ω of every mode, each [sets, ω]."""
        if self.tau is None or self.upsilon is None:
            growth = self.rho[:, None]
            return growth, torch.zeros_like(growth)
        return self.rho[:, None] - self.tau[:, None] * self.squared, self.upsilon.T @ self.turning

    def _convolve(self, kernel: Tensor, w: Tensor) -> Tensor:
        """Convolve a kernel [..., sets, K] with weights [c_out, K, c_in] → [..., c_out, K, c_in]."""
        return kernel[..., self.lag] @ w

    def forward(self, t: float, w: Tensor) -> Tensor:
        """∂w/∂t of weights [c_out, K, c_in]."""
        growth, turn = self._symbol()
        modes = growth[:, None] * self.phase.cos() - turn[:, None] * self.phase.sin()  # [sets, x, ω]
        rate = self._convolve(modes.mean(-1), w)
        return rate if self.activation is None else self.activation(rate)

    def evolve(self, w0: Tensor, start: float, step: float, count: int, n_steps: int) -> Tensor:
        """w at ``count`` times from ``start`` on, ``step`` apart: [count, *w0.shape].

        Args:
            n_steps: of a unit of time, where σ is not the identity.
        """
        if self.tau is not None:
            with torch.no_grad():
                self.tau.clamp_(min=0.0)
        flat = w0.flatten(2).transpose(1, 2)  # [c_out, K, c_in]: a view in channels-last layout
        if self.activation is None:
            t = (torch.arange(count, device=w0.device, dtype=w0.dtype) * step + start)[:, None, None]
            growth, turn = self._symbol()
            # Less what G is at t = 0, with the same operations: constant weights are then w0 itself.
            angle = self.phase + (t * turn)[..., None, :]  # [t, sets, x, ω]
            change = ((t * growth).exp()[..., None, :] * angle.cos() - self.phase.cos()).mean(-1)
            evolved = flat + self._convolve(change, flat)
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

    ``joint`` (configuration 1): weights and activations advance together, step n of the solve has θ(t_n). ``first``
    (configuration 2): the weights evolve to t = 1, then are applied in every step.

    Args:
        f: the vector field's module.
        coupling: joint or first.
        sharing, activation: of ``ReactionDiffusionAdvection``.
        n_steps: steps of the weights over [0, 1], where they are time-stepped.

    Source: ANODEV2 (arXiv 1906.04596); θ(t) = w(t), its kernel in time a delta.
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
            theta: f's parameters, w0 among them.

        Returns:
            Evolved entries with a leading axis of n_steps (joint), or of their own shape (first).
        """
        joint = self.coupling == "joint"
        start, step, count = (0.0, 1.0 / n_steps, n_steps) if joint else (1.0, 0.0, 1)
        evolved = list(theta)
        with torch.autocast(theta[0].device.type, enabled=False):
            for place, flow in zip(self.places, self.flows, strict=True):
                w = flow.evolve(theta[place], start, step, count, self.n_steps)  # type: ignore[operator]
                evolved[place] = w if joint else w[0]
        return tuple(evolved)
