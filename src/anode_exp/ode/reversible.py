"""Methods whose step has an inverse in closed form: the backward pass undoes the steps, and needs no checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from anode_exp.ode.explicit import ExplicitRungeKutta, weighted_sum
from anode_exp.ode.solver import State
from anode_exp.ode.tableau import TABLEAUX, ButcherTableau
from anode_exp.ode.vector_field import Theta, VectorField, value_and_vjp


class AsynchronousLeapfrog:
    """The asynchronous leapfrog of MALI: a pair (y, v), v an approximation of dy/dt; one evaluation of f per step.

    v0 = f(t0, y0), and with the damping η a step is

        k = y + v h/2,   u = f(t + h/2, k, θ),   v' = v + 2η (u − v),   y' = k + v' h/2,

    with the inverse  k = y' − v' h/2,  v = (v' − 2η u)/(1 − 2η),  y = k − v h/2.

    Order 2 if undamped (η = 1). With η < 1, v lags behind f by (1 − η)/(2η) h d²y/dt²: the order is 1, with the local
    error (1 − η)/(2η) h² d²y/dt². On dy/dt = λy, λ < 0, a step multiplies by the roots of
    r² − (2 − 2η + 2η hλ) r + 1 − 2η = 0, which is stable if h|λ| ≤ 2(1 − η)/η. Undamped, an oscillation grows,
    slowly for short steps. Damped, each inverse step multiplies rounding errors by up to 1/(2η − 1).

    Its state is (y, v), both of y's shape.

    Args:
        damping: η in (1/2, 1]; 1 is undamped.

    Raises:
        ValueError: if η is out of range. The step has no inverse at 1/2.

    Source: Zhuang et al., MALI, ICLR 2021 (arXiv 2102.04668), Sec. 3 and App. A; Mutze, arXiv 1311.6602.
    """

    name, static = "alf", True
    nodes: tuple[float, ...] = (0.5,)
    start_nodes: tuple[float, ...] = (0.0,)

    def __init__(self, damping: float = 1.0) -> None:
        if not 0.5 < damping <= 1.0:
            raise ValueError(f"damping = {damping}: give a number above 0.5, at most 1 (undamped)")
        self.damping = damping
        self.order = 2 if damping == 1.0 else 1

    def start(self, field: VectorField, theta: Theta, t: float, y: Tensor) -> State:
        """(y, f(t, y)); one evaluation of f."""
        return y, field(t, y, theta)

    def step(self, field: VectorField, theta: Theta, t: float, h: float, state: State) -> State:
        y, v = state
        k = torch.add(y, v, alpha=h / 2)
        u = field(t + h / 2, k, theta)
        v = torch.lerp(v, u, 2 * self.damping)
        return torch.add(k, v, alpha=h / 2), v

    def inverse(self, field: VectorField, theta: Theta, t: float, h: float, state: State) -> State:
        """The state at t from that at t + h; one evaluation of f."""
        y, v = state
        k = torch.sub(y, v, alpha=h / 2)
        return self._before(h, k, field(t + h / 2, k, theta), v)

    def _before(self, h: float, k: Tensor, u: Tensor, v: Tensor) -> State:
        """The state at t, from k and u of the step and v at its end."""
        v = torch.lerp(v, u, 2 * self.damping / (2 * self.damping - 1))
        return torch.sub(k, v, alpha=h / 2), v

    def reverse_step(
        self,
        field: VectorField,
        theta: Theta,
        t: float,
        h: float,
        state: list[Tensor],
        a: list[Tensor],
        add: Callable[[Sequence[Tensor], float], None],
    ) -> tuple[State, State]:
        """As ``ReversibleSolver.reverse_step``: u and its products with the adjoint come from one evaluation of f.

        With ν = α_v' + h/2 α_y', the total derivative of J in v':
            α_k = α_y' + 2η (∂f/∂y(k))ᵀ ν,   α_y = α_k,   α_v = (1 − 2η) ν + h/2 α_k,
        and ∂J/∂θ gains 2η (∂f/∂θ(k))ᵀ ν.
        """
        v, a_v, twice = state.pop(), a.pop(), 2 * self.damping
        k = torch.sub(state.pop(), v, alpha=h / 2)
        a_v = torch.add(a_v, a[0], alpha=h / 2)
        u, gradient, g = field.vjp(t + h / 2, k, theta, a_v)
        add(g, twice)
        a_k = torch.add(a.pop(), gradient, alpha=twice)
        del gradient
        return self._before(h, k, u, v), (a_k, a_v.mul_(1 - twice).add_(a_k, alpha=h / 2))


class ReversibleRungeKutta:
    """A reversible method from any explicit Runge–Kutta method: a pair (y, z), at twice the evaluations of f.

    With Ψ_h(t, y) = h Σ b_i k_i the increment of the tableau's step from y at t, z0 = y0, and the coupling λ:

        y' = λ y + (1 − λ) z + Ψ_h(t, z),   z' = z − Ψ_{−h}(t + h, y'),

    with the inverse  z = z' + Ψ_{−h}(t + h, y'),  y = (y' − (1 − λ) z − Ψ_h(t, z))/λ.

    Its order is the tableau's. A step multiplies y − z by about λ exp(−h ∂f/∂y), so a decaying solution needs a
    smaller λ or shorter steps. Each inverse step multiplies rounding errors by up to 1/λ.

    Its state is (y, z), both of y's shape.

    Args:
        coupling: λ in (0, 1].

    Raises:
        ValueError: if λ is out of range.

    Source: McCallum and Foster, arXiv 2410.11648.
    """

    name, static = "reversible_rk", True
    start_nodes: tuple[float, ...] = ()

    def __init__(self, tableau: ButcherTableau = TABLEAUX["rk2"], coupling: float = 0.99) -> None:
        if not 0.0 < coupling <= 1.0:
            raise ValueError(f"coupling = {coupling}: give a number above 0, at most 1")
        self.method, self.coupling, self.order = ExplicitRungeKutta(tableau), coupling, tableau.order
        # Rounded, so that 1 − 1/3 and 2/3 are the same time.
        self.nodes = tuple(sorted({round(x, 12) for c in self.method.nodes for x in (c, 1 - c)}))

    def start(self, field: VectorField, theta: Theta, t: float, y: Tensor) -> State:
        return y, y

    def _added(
        self, onto: Tensor, factor: float, field: VectorField, theta: Theta, t: float, h: float, y: Tensor
    ) -> Tensor:
        """onto + factor Σ b_i k_i, with the slopes k_i of the tableau's step of size h from y at t."""
        return weighted_sum(onto, factor, self.method.tableau.b, self.method.slopes(field, theta, t, h, y))

    def step(self, field: VectorField, theta: Theta, t: float, h: float, state: State) -> State:
        y, z = state
        y = self._added(torch.lerp(z, y, self.coupling), h, field, theta, t, h, z)
        return y, self._added(z, h, field, theta, t + h, -h, y)  # −Ψ_{−h} = h Σ b_i k_i, with the slopes of −h

    def inverse(self, field: VectorField, theta: Theta, t: float, h: float, state: State) -> State:
        """The state at t from that at t + h; 2s evaluations of f."""
        y, z = state
        z = self._added(z, -h, field, theta, t + h, -h, y)
        y = self._added(y, -h, field, theta, t, h, z)
        return torch.lerp(z, y, 1 / self.coupling), z

    def reverse_step(
        self,
        field: VectorField,
        theta: Theta,
        t: float,
        h: float,
        state: list[Tensor],
        a: list[Tensor],
        add: Callable[[Sequence[Tensor], float], None],
    ) -> tuple[State, State]:
        """As ``ReversibleSolver.reverse_step``: each increment and its products come from s evaluations of f.

            ν = α_y' − (∂Ψ_{−h}/∂y(y'))ᵀ α_z',   α_y = λ ν,   α_z = α_z' + (1 − λ) ν + (∂Ψ_h/∂y(z))ᵀ ν.

        It holds the graph of one increment at a time.
        """
        (y, z), (a_y, a_z) = state, a
        state.clear()
        a.clear()

        def back(t: float, h_step: float, at: Tensor, adjoint: Tensor) -> tuple[Tensor, Tensor]:
            """h Σ b_i k_i at ``at``, and its product with the adjoint."""
            zero = torch.zeros_like(at)
            value, gradient, g = value_and_vjp(
                lambda x: self._added(zero, h, field, theta, t, h_step, x), at, theta, adjoint
            )
            add(g, 1.0)
            return value, gradient

        increment, gradient = back(t + h, -h, y, a_z)
        z, a_y = z - increment, a_y + gradient
        increment, gradient = back(t, h, z, a_y)
        y = torch.lerp(z, y - increment, 1 / self.coupling)
        return (y, z), (self.coupling * a_y, torch.add(a_z + gradient, a_y, alpha=1 - self.coupling))
