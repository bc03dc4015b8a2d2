"""The discrete adjoint: exact gradients of the discrete solve, with many or few kept states.

One mechanism, two choices. The *unit* is what is evaluated again with a graph at one time: the whole block, a step, or
a stage (one evaluation of f). The *states* are those that units begin from: kept during the forward pass, or rebuilt
from the block's input when its gradient is needed. For a block of N steps of s stages, L layers in f:

| unit | states | kept between blocks | held for one block | evaluations of f in its backward pass |
|---|---|---|---|---|
| block | input | 1 | graph of N s L | sN |
| step | keep | N | graph of s L | sN |
| step | rebuild | 1 | N states, graph of s L | sN + s(N−1) |
| step | revolve, c slots | 1 | c states, graph of s L | sN + s(N−1) + s p(N, c) |
| stage | keep | N s | graph of L | sN |
| stage | rebuild | 1 | N + s states, graph of L | sN + s(N−1) + (s−1)N |
| stage | revolve, c slots | 1 | c + s states, graph of L | sN + s(N−1) + s p(N, c) + (s−1)N |

Slots hold only states, y_n at the start of a step, and the block's input takes one of them, as in the library
``checkpoint-schedules``. p(N, c) = (t−1)N − C(c+t, t−1) + 1 with C(c+t−1, t−1) < N ≤ C(c+t, t) is the number of steps
that the binomial schedule takes in addition to those of ``rebuild``; it is the smallest possible.

Sources: ANODE (arXiv 1902.10298) Sec. V; ACA (arXiv 2006.02493); PNODE (arXiv 2206.01298); Griewank and Walther,
Algorithm 799: revolve, ACM TOMS 26(1), 2000.
"""

from __future__ import annotations

from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge

from anode_exp.gradient.base import ThetaGradient, current_autocast, vjp_through
from anode_exp.gradient.schedules import reversed_steps
from anode_exp.ode import (
    Solver,
    State,
    Steps,
    Theta,
    TimeGrid,
    Tolerance,
    VectorField,
    integrate,
    solve_forward,
    with_stages,
)

UNITS = ("block", "step", "stage")
STATES = ("input", "keep", "rebuild", "revolve", "equispaced")


class DiscreteAdjoint:
    """The gradient of the discrete solve by ``unit`` from ``states``; see the module for what each choice costs.

    Args:
        unit: block, step or stage.
        states: input (only with block), keep, rebuild, revolve or equispaced.
        slots: states held at a time, the block's input included; required for revolve and equispaced.

    Raises:
        ValueError: for a combination that does not exist.
    """

    def __init__(self, unit: str, states: str, slots: int | None = None, passes: int = 1) -> None:
        if unit not in UNITS or states not in STATES:
            raise ValueError(f"unit={unit}, states={states}: choose unit of {UNITS} and states of {STATES}")
        if (unit == "block") != (states == "input"):
            raise ValueError(
                f"unit={unit}, states={states}: unit block needs states input, and other units need other states"
            )
        if (slots is not None) != (states in ("revolve", "equispaced")) or (slots is not None and slots < 1):
            raise ValueError(
                f"states={states}, slots={slots}: revolve and equispaced need at least 1 slot, other states take none"
            )
        self.unit, self.states, self.slots, self.passes = unit, states, slots, passes

    def solve(self, field: VectorField, y0: Tensor, theta: Theta, grid: TimeGrid | Tolerance, solver: Solver) -> Tensor:
        return _Solve.apply(self, field, grid, solver, y0, *theta)


class DtoCheckpoint(DiscreteAdjoint):
    """ANODE: keep only a block's input, and solve the block again with a graph when its gradient is needed.

    Discretise-then-optimise: α_n = (I + h ∂f(y_n)/∂y)ᵀ α_{n+1} for Euler, the adjoint of the step for any method; the
    gradient of full backpropagation, bit for bit where kernels are deterministic. sN evaluations of f backward.

    Args:
        passes: over the block's graph; 2, as in the published code: first the input's gradient, then the parameters'.

    Source: ANODE (arXiv 1902.10298) Sec. V, Eqs. 18–24.
    """

    def __init__(self, unit: str = "block", states: str = "input", passes: int = 1) -> None:
        super().__init__(unit, states, passes=passes)


class StepCheckpoint(DiscreteAdjoint):
    """ACA: the state at every step, kept or rebuilt, and the graph of one step at a time.

    α_n = (∂y_{n+1}/∂y_n)ᵀ α_{n+1} by autograd through one step. sN evaluations of f backward; s(N−1) more to rebuild.

    Source: ACA (arXiv 2006.02493).
    """

    def __init__(self, unit: str = "step", states: str = "keep") -> None:
        super().__init__(unit, states)


class StageCheckpoint(DiscreteAdjoint):
    """PNODE: the adjoint of the Runge–Kutta step written out, f differentiated one evaluation at a time.

    With stage states Y_i: λ_i = (∂f/∂y(Y_i))ᵀ μ_i, μ_i = h (b_i α_{n+1} + Σ_{j>i} a_ji λ_j);
    α_n = α_{n+1} + Σ_i λ_i, and ∂J/∂θ gains Σ_i (∂f/∂θ(Y_i))ᵀ μ_i. The graph held is that of one evaluation.
    sN evaluations of f backward; s(N−1) + (s−1)N more to rebuild.

    Source: PNODE (arXiv 2206.01298), high-level discrete adjoint.
    """

    def __init__(self, unit: str = "stage", states: str = "keep") -> None:
        super().__init__(unit, states)


class Revolve(DiscreteAdjoint):
    """The binomial schedule: at most ``slots`` states held, the fewest steps repeated.

    sN + s(N−1) + s p(N, c) evaluations of f backward, and (s−1)N more with unit stage; the module gives p.

    Source: Griewank and Walther, Algorithm 799, ACM TOMS 26(1), 2000; ANODE Sec. V; PNODE.
    """

    def __init__(self, unit: str = "step", slots: int = 3) -> None:
        super().__init__(unit, "revolve", slots)


class Equispaced(DiscreteAdjoint):
    """At most ``slots`` states at equal distances; every step is computed again from the slot before it.

    The suboptimal schedule that ANODE Sec. V names; a baseline for ``Revolve``.
    """

    def __init__(self, unit: str = "step", slots: int = 3) -> None:
        super().__init__(unit, "equispaced", slots)


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        mode: DiscreteAdjoint,
        field: VectorField,
        grid: TimeGrid | Tolerance,
        solver: Solver,
        y0: Tensor,
        *theta: Tensor,
    ) -> Tensor:
        if mode.unit == "stage":
            with_stages(solver)  # raises here, not in the backward pass
        ctx.mode, ctx.field, ctx.solver = mode, field, solver
        ctx.autocast = current_autocast(y0.device.type)
        kept: list[State] = []
        to_keep = kept if mode.states == "keep" else None
        # The steps taken: an adaptive solve finds them once; from then on they are a fixed grid.
        y1, ctx.grid = solve_forward(field, y0, theta, grid, solver, to_keep, mode.unit == "stage")
        kept = kept or [(y0,)]
        ctx.sizes = [len(tensors) for tensors in kept]
        ctx.save_for_backward(*(x for tensors in kept for x in tensors), *theta)
        return y1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y1: Tensor) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)
        kept = [tuple(islice(saved, size)) for size in ctx.sizes]
        backward = _block_adjoint if ctx.mode.unit == "block" else _adjoint
        with ctx.autocast(), ctx.field.re_evaluation():
            grads = backward(ctx, kept, tuple(saved), grad_y1)
        return None, None, None, None, *grads


def _block_adjoint(ctx: Any, kept: list[State], theta: Theta, grad_y1: Tensor) -> list[Tensor | None]:
    """Gradients in y0 and θ through the graph of the whole block."""
    needed = ctx.needs_input_grad[4:]
    # Detached; otherwise hooks of a non-leaf θ would run twice, once in here and once outside.
    y0, *copies = (x.detach().requires_grad_(need) for x, need in zip((*kept[0], *theta), needed, strict=True))
    with torch.enable_grad():
        # The place of y1 in the graph, not its value, which would be held through the backward pass.
        y1 = get_gradient_edge(integrate(ctx.field, y0, tuple(copies), ctx.grid, ctx.solver))
    wanted = [x for x in (y0, *copies) if x.requires_grad]
    # y0 and θ in one pass over the graph, unless two passes are set
    cut = 1 if ctx.mode.passes > 1 and y0.requires_grad and len(wanted) > 1 else len(wanted)
    grads = iter(
        gradient
        for part in (wanted[:cut], wanted[cut:])
        if part
        for gradient in torch.autograd.grad(
            [y1], part, grad_y1, allow_unused=True, retain_graph=cut < len(wanted) and part[0] is y0
        )
    )
    return [next(grads) if need else None for need in needed]


def _adjoint(ctx: Any, kept: list[State], theta: Theta, grad_y1: Tensor) -> list[Tensor | None]:
    """Gradients in y0 and θ, one step after another, from the last to the first."""
    mode: DiscreteAdjoint = ctx.mode
    field: VectorField = ctx.field
    grid: TimeGrid | Steps = ctx.grid
    solver: Solver = ctx.solver
    needed = ctx.needs_input_grad[4:]
    gradient = ThetaGradient(theta, needed[1:])
    per_step = gradient.per_step(field, grid.n_steps)

    def advance(n: int, state: State) -> State:
        return solver.step(field, per_step[n], grid.time(n), grid.step_size(n), state)

    y0 = kept[0][:1]  # y comes first in a state, and in the stage states of an explicit method
    start = partial(solver.start, field, per_step[0], grid.time(0))
    if mode.states != "keep":
        kept = [start(*y0)]
    by_stages = with_stages(solver) if mode.unit == "stage" else None
    a: State = (grad_y1,)
    for n, state in reversed_steps(mode.states, mode.slots, kept, grid.n_steps, advance):
        t, h, theta_n, add = grid.time(n), grid.step_size(n), per_step[n], partial(gradient.add, n)
        if by_stages is None:
            a = vjp_through(partial(solver.step, field, theta_n, t, h), state, theta_n, a, add)
            continue
        stages = list(state) if mode.states == "keep" else by_stages.stage_states(field, theta_n, t, h, state)
        del state  # only the list holds the stage states: each is freed after use
        a = by_stages.adjoint_step(field, theta_n, t, h, stages, a, add)
    if len(a) > 1:  # the other parts of the state were made from y
        a = vjp_through(lambda state: start(*state), y0, per_step[0], a, partial(gradient.add, 0))
    return [a[0] if needed[0] else None, *gradient.result]
