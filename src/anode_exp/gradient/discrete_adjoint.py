"""The discrete adjoint: exact gradients of the discrete solve, from as many or as few kept states as there is room for.

One mechanism, two choices. The *unit* is what is evaluated again with a graph at a time: the whole block, a step, or a
stage (one evaluation of f). The *states* are where the units begin from: kept during the forward pass, or rebuilt from
the block's input when its gradient is due. For a block of N steps of s stages, L layers in f:

| unit | states | kept between blocks | held for one block | evaluations of f in its backward pass |
|---|---|---|---|---|
| block | input | 1 | graph of N s L | sN |
| step | keep | N | graph of s L | sN |
| step | rebuild | 1 | N states, graph of s L | sN + s(N−1) |
| step | revolve, c slots | 1 | c states, graph of s L | sN + s(N−1) + s p(N, c) |
| stage | keep | N s | graph of L | sN |
| stage | rebuild | 1 | N + s states, graph of L | sN + s(N−1) + (s−1)N |
| stage | revolve, c slots | 1 | c + s states, graph of L | sN + s(N−1) + s p(N, c) + (s−1)N |

Slots hold states alone, y_n at the start of a step, and the block's input takes one of them, as in the library
``checkpoint-schedules``. p(N, c) = (t−1)N − C(c+t, t−1) + 1 with C(c+t−1, t−1) < N ≤ C(c+t, t) is the number of steps
that the binomial schedule takes more often than a second forward pass does; it is the fewest possible.

Sources: ANODE (arXiv 1902.10298) Sec. V; ACA (arXiv 2006.02493); PNODE (arXiv 2206.01298); Griewank and Walther,
Algorithm 799: revolve, ACM TOMS 26(1), 2000.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from checkpoint_schedules import Copy, EndReverse, Forward, Move, Reverse
from checkpoint_schedules import Revolve as BinomialSchedule
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge

from anode_exp.gradient.base import ThetaGradient, current_autocast
from anode_exp.ode import ExplicitRungeKutta, Steps, Theta, TimeGrid, Tolerance, VectorField, integrate, solve_forward

UNITS = ("block", "step", "stage")
STATES = ("input", "keep", "rebuild", "revolve", "equispaced")

Advance = Callable[[int, Tensor], Tensor]
"""(n, y_n) → y_{n+1}, without a graph."""


class DiscreteAdjoint:
    """The gradient of the discrete solve by ``unit`` from ``states``; see the module for what each choice costs.

    Args:
        unit: block, step or stage.
        states: input (block alone), keep, rebuild, revolve or equispaced.
        slots: states held at a time, the block's input included; revolve and equispaced need it.

    Raises:
        ValueError: for a combination that does not exist.
    """

    def __init__(self, unit: str, states: str, slots: int | None = None, passes: int = 1) -> None:
        if unit not in UNITS or states not in STATES:
            raise ValueError(f"unit={unit}, states={states}: choose unit of {UNITS} and states of {STATES}")
        if (unit == "block") != (states == "input"):
            raise ValueError(
                f"unit={unit}, states={states}: the unit block goes with states input, and nothing else does"
            )
        if (slots is not None) != (states in ("revolve", "equispaced")) or (slots is not None and slots < 1):
            raise ValueError(
                f"states={states}, slots={slots}: revolve and equispaced need at least 1 slot, others none"
            )
        self.unit, self.states, self.slots, self.passes = unit, states, slots, passes

    def solve(
        self, field: VectorField, y0: Tensor, theta: Theta, grid: TimeGrid | Tolerance, solver: ExplicitRungeKutta
    ) -> Tensor:
        return _Solve.apply(self, field, grid, solver, y0, *theta)


class DtoCheckpoint(DiscreteAdjoint):
    """ANODE: keep a block's input alone, and solve the block again with a graph when its gradient is due.

    Discretise-then-optimise: α_n = (I + h ∂f(y_n)/∂y)ᵀ α_{n+1} for Euler, the adjoint of the step for any method; the
    gradient of full backpropagation, to the last bit where kernels are deterministic. sN evaluations of f backward.

    Args:
        passes: over the block's graph; with 2, as in the published code, the input's gradient and then the parameters'.

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

    sN + s(N−1) + s p(N, c) evaluations of f backward, and (s−1)N more by stages; the module gives p.

    Source: Griewank and Walther, Algorithm 799, ACM TOMS 26(1), 2000; ANODE Sec. V; PNODE.
    """

    def __init__(self, unit: str = "step", slots: int = 3) -> None:
        super().__init__(unit, "revolve", slots)


class Equispaced(DiscreteAdjoint):
    """At most ``slots`` states at equal distances, every step reached again from the slot before it.

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
        solver: ExplicitRungeKutta,
        y0: Tensor,
        *theta: Tensor,
    ) -> Tensor:
        ctx.mode, ctx.field, ctx.solver = mode, field, solver
        ctx.autocast = current_autocast(y0.device.type)
        kept: list[Tensor] = []
        to_keep = kept if mode.states == "keep" else None
        # The steps taken: an adaptive solve finds them once, and they are a fixed grid from then on.
        y1, ctx.grid = solve_forward(field, y0, theta, grid, solver, to_keep, mode.unit == "stage")
        kept = kept or [y0]
        ctx.n_kept = len(kept)
        ctx.save_for_backward(*kept, *theta)
        return y1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y1: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        kept, theta = list(saved[: ctx.n_kept]), saved[ctx.n_kept :]
        backward = _block_adjoint if ctx.mode.unit == "block" else _adjoint
        with ctx.autocast(), ctx.field.re_evaluation():
            grads = backward(ctx, kept, theta, grad_y1)
        return None, None, None, None, *grads


def _block_adjoint(ctx: Any, kept: list[Tensor], theta: Theta, grad_y1: Tensor) -> list[Tensor | None]:
    """Gradients in y0 and θ through the graph of the whole block."""
    needed = ctx.needs_input_grad[4:]
    # Detached, or the hooks of a θ that is no leaf would fire once in here and once outside.
    y0, *copies = (x.detach().requires_grad_(need) for x, need in zip((kept[0], *theta), needed, strict=True))
    with torch.enable_grad():
        # Where in the graph y1 is, not its value: that would be held all through the backward pass.
        y1 = get_gradient_edge(integrate(ctx.field, y0, tuple(copies), ctx.grid, ctx.solver))
    wanted = [x for x in (y0, *copies) if x.requires_grad]
    # y0 and θ in one pass over the graph, unless asked otherwise
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


def _adjoint(ctx: Any, kept: list[Tensor], theta: Theta, grad_y1: Tensor) -> list[Tensor | None]:
    """Gradients in y0 and θ, a step after the other from the last to the first."""
    mode: DiscreteAdjoint = ctx.mode
    field: VectorField = ctx.field
    grid: TimeGrid | Steps = ctx.grid
    solver: ExplicitRungeKutta = ctx.solver
    needed = ctx.needs_input_grad[4:]
    gradient = ThetaGradient(theta, needed[1:])
    per_step = gradient.per_step(field, grid.n_steps)

    def advance(n: int, y: Tensor) -> Tensor:
        return solver.step(field, per_step[n], grid.time(n), grid.step_size(n), y)

    a = grad_y1
    for n, states in _states(mode, kept, grid.n_steps, advance):
        t, h, theta_n, add = grid.time(n), grid.step_size(n), per_step[n], partial(gradient.add, n)
        if mode.unit == "step":
            a = _step_adjoint(solver, field, theta_n, t, h, states[0], a, add)
            continue
        if mode.states != "keep":
            states = solver.stage_states(field, theta_n, t, h, states.pop())
        a = solver.adjoint_step(field, theta_n, t, h, states, a, add)
    return [a if needed[0] else None, *gradient.result]


def _step_adjoint(
    solver: ExplicitRungeKutta,
    field: VectorField,
    theta: Theta,
    t: float,
    h: float,
    y: Tensor,
    a: Tensor,
    add: Callable[[Sequence[Tensor]], None],
) -> Tensor:
    """α_n from α_{n+1} through the graph of one step."""
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        y1 = get_gradient_edge(solver.step(field, theta, t, h, y))
        wanted = (y, *(p for p in theta if p.requires_grad))
        grad_y, *grad_theta = torch.autograd.grad([y1], wanted, a, materialize_grads=True)
    add(grad_theta)
    return grad_y


def _states(
    mode: DiscreteAdjoint, kept: list[Tensor], n_steps: int, advance: Advance
) -> Iterator[tuple[int, list[Tensor]]]:
    """(n, [y_n]) from n = n_steps − 1 down to 0; with kept stages (n, all of the step's stage states)."""
    if mode.states == "keep":
        size = len(kept) // n_steps
        for n in reversed(range(n_steps)):
            yield n, kept[n * size : (n + 1) * size]
    elif mode.states == "rebuild":
        states = [kept[0]]
        for n in range(n_steps - 1):
            states.append(advance(n, states[n]))
        for n in reversed(range(n_steps)):
            yield n, [states.pop()]
    elif mode.states == "revolve":
        yield from _revolve(kept[0], n_steps, mode.slots or 1, advance)
    else:
        yield from _equispaced(kept[0], n_steps, mode.slots or 1, advance)


def _revolve(y: Tensor, n_steps: int, slots: int, advance: Advance) -> Iterator[tuple[int, list[Tensor]]]:
    stored: dict[int, Tensor] = {}
    for action in BinomialSchedule(n_steps, min(slots, n_steps)):
        match action:
            case Forward(write_adj_deps=True):
                pass  # the unit that the adjoint evaluates again begins from y as it stands
            case Forward():
                if action.write_ics:
                    stored[action.n0] = y
                for n in range(action.n0, action.n1):
                    y = advance(n, y)
            case Move():
                y = stored.pop(action.n)
            case Copy():
                y = stored[action.n]
            case Reverse():
                yield action.n0, [y]
            case EndReverse():
                return


def _equispaced(y: Tensor, n_steps: int, slots: int, advance: Advance) -> Iterator[tuple[int, list[Tensor]]]:
    at = sorted({i * n_steps // slots for i in range(slots)})
    stored = {0: y}
    for n in range(at[-1]):
        y = advance(n, y)
        if n + 1 in at:
            stored[n + 1] = y
    for first in reversed(at):
        start = stored.pop(first)
        end = n_steps if first == at[-1] else at[at.index(first) + 1]
        for last in reversed(range(first, end)):
            y = start
            for n in range(first, last):
                y = advance(n, y)
            yield last, [y]
