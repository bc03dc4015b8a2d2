"""One explicit Runge–Kutta step, made from a tableau, and its adjoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from anode_exp.ode.solver import Attempt, State
from anode_exp.ode.tableau import ButcherTableau
from anode_exp.ode.vector_field import Theta, VectorField


def weighted_sum(y: Tensor, h: float, weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    """y + h Σ_i w_i k_i, one fused multiply-add per non-zero weight."""
    for w, k in zip(weights, slopes, strict=True):
        if w != 0.0:
            y = torch.add(y, k, alpha=h * w)
    return y


class ExplicitRungeKutta:
    """Solver of dy/dt = f(t, y, θ) by the explicit Runge–Kutta method of a tableau, θ constant within a step.

    Stages that the solution does not use (those of an embedded error estimate) are not evaluated on a fixed grid.

    Its state is y only.

    Attributes:
        tableau: the method without those stages.
        embedded: the method with them, for adaptive steps.
    """

    static = True
    start_nodes: tuple[float, ...] = ()

    def __init__(self, tableau: ButcherTableau) -> None:
        self.embedded = tableau
        self.tableau = tableau.without_unused_stages()
        self.name, self.order, self.nodes = tableau.name, tableau.order, self.tableau.c
        self.error_order = None if tableau.b_error is None else tableau.order

    def start(self, field: VectorField, theta: Theta, t: float, y: Tensor) -> State:
        return (y,)

    def step(
        self, field: VectorField, theta: Theta, t: float, h: float, state: State, stages: list[Tensor] | None = None
    ) -> State:
        """y(t + h) from y(t); ``tableau.stages`` evaluations of f. ``stages`` receives the stage states Y_i."""
        (y,) = state
        return (weighted_sum(y, h, self.tableau.b, self.slopes(field, theta, t, h, y, stages)),)

    def slopes(
        self, field: VectorField, theta: Theta, t: float, h: float, y: Tensor, stages: list[Tensor] | None = None
    ) -> list[Tensor]:
        """k_i = f(t + c_i h, Y_i) of one step."""
        slopes: list[Tensor] = []
        for c, row in zip(self.tableau.c, self.tableau.a, strict=True):
            y_i = weighted_sum(y, h, row, slopes)
            if stages is not None:
                stages.append(y_i)
            slopes.append(field(t + c * h, y_i, theta))
        return slopes

    def attempt(self, field: VectorField, theta: Theta, t: float, h: float, y: Tensor, first: Tensor) -> Attempt:
        """A step with its error estimate h Σ_i b_error_i k_i, from the slope ``first`` = f(t, y)."""
        table = self.embedded
        assert table.b_error is not None
        slopes, stages = [first], [y]
        for c, row in zip(table.c[1:], table.a[1:], strict=True):
            stages.append(weighted_sum(y, h, row, slopes))
            slopes.append(field(t + c * h, stages[-1], theta))
        y1 = stages[-1] if table.first_same_as_last else weighted_sum(y, h, table.b, slopes)
        with torch.no_grad():
            error = sum((h * e * k for e, k in zip(table.b_error, slopes, strict=True) if e), torch.zeros_like(y))
        return Attempt(y1, error, slopes[-1] if table.first_same_as_last else None, stages[: self.tableau.stages])

    def stage_states(self, field: VectorField, theta: Theta, t: float, h: float, state: State) -> list[Tensor]:
        """Y_i = y + h Σ_j a_ij f(Y_j) of one step; one evaluation of f fewer than the step."""
        slopes: list[Tensor] = []
        states = list(state)
        y = states[0]
        for c, row in zip(self.tableau.c, self.tableau.a[1:], strict=False):
            slopes.append(field(t + c * h, states[-1], theta))
            states.append(weighted_sum(y, h, row, slopes))
        return states

    def adjoint_step(
        self,
        field: VectorField,
        theta: Theta,
        t: float,
        h: float,
        stages: list[Tensor],
        a: State,
        add: Callable[[Sequence[Tensor], float], None],
    ) -> State:
        """The adjoint of one step, written out; f is differentiated one evaluation at a time.

        From the last stage to the first, with h a constant:
            μ_i = h (b_i α_{n+1} + Σ_{j>i} a_ji λ_j),   λ_i = (∂f/∂y(Y_i))ᵀ μ_i,
            α_n = α_{n+1} + Σ_i λ_i.

        Args:
            stages: the stage states Y_i of the step; emptied, so that each is freed when its stage is done.
            a: α_{n+1} = ∂J/∂y_{n+1}.
            add: receives gradients and a factor for every stage; their product is (∂f/∂θ(Y_i))ᵀ μ_i, for each entry
                of θ that requires a gradient.

        Returns:
            α_n.

        Source: PNODE (arXiv 2206.01298); Hager, Numer. Math. 87, 2000.
        """
        table = self.tableau
        (end,) = a
        lambdas: dict[int, tuple[float, Tensor]] = {}  # λ_i as a factor and a tensor, without a scaled copy
        for i in reversed(range(table.stages)):
            terms = [(table.b[i], end), *((table.a[j][i] * factor, x) for j, (factor, x) in lambdas.items())]
            (w0, mu), *rest = [(w, x) for w, x in terms if w != 0.0]
            # μ_i = h w0 (x0 + Σ (w/w0) x): a single term needs no new tensor
            mu = weighted_sum(mu, 1.0, [w / w0 for w, _ in rest], [x for _, x in rest])
            _, gradient, g = field.vjp(t + table.c[i] * h, stages.pop(), theta, mu)
            lambdas[i] = h * w0, gradient
            add(g, h * w0)
        return (weighted_sum(end, 1.0, [w for w, _ in lambdas.values()], [x for _, x in lambdas.values()]),)
