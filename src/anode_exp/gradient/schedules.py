"""The states of a solve in reverse order: kept, rebuilt, or by a checkpoint schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from checkpoint_schedules import Copy, EndReverse, Forward, Move, Reverse
from checkpoint_schedules import Revolve as BinomialSchedule

from anode_exp.ode import State

Advance = Callable[[int, State], State]
"""(n, state at t_n) → state at t_{n+1}, without a graph."""


def reversed_steps(
    states: str, slots: int | None, kept: list[State], n_steps: int, advance: Advance
) -> Iterator[tuple[int, State]]:
    """(n, state at t_n) from n = n_steps − 1 down to 0.

    Args:
        states: ``keep``, with an entry of ``kept`` for every step, which may be its stage states; ``rebuild``,
            ``revolve`` or ``equispaced``, with the first state only.
        slots: states held at a time, for ``revolve`` and ``equispaced``.
    """
    if states == "keep":
        for n in reversed(range(n_steps)):
            yield n, kept[n]
    elif states == "rebuild":
        rebuilt = [kept[0]]
        for n in range(n_steps - 1):
            rebuilt.append(advance(n, rebuilt[n]))
        for n in reversed(range(n_steps)):
            yield n, rebuilt.pop()
    elif states == "revolve":
        yield from _revolve(kept[0], n_steps, slots or 1, advance)
    else:
        yield from _equispaced(kept[0], n_steps, slots or 1, advance)


def _revolve(state: State, n_steps: int, slots: int, advance: Advance) -> Iterator[tuple[int, State]]:
    stored: dict[int, State] = {}
    for action in BinomialSchedule(n_steps, min(slots, n_steps)):
        match action:
            case Forward(write_adj_deps=True):
                pass  # the unit to be evaluated again begins from this state
            case Forward():
                if action.write_ics:
                    stored[action.n0] = state
                for n in range(action.n0, action.n1):
                    state = advance(n, state)
            case Move():
                state = stored.pop(action.n)
            case Copy():
                state = stored[action.n]
            case Reverse():
                yield action.n0, state
            case EndReverse():
                return


def _equispaced(state: State, n_steps: int, slots: int, advance: Advance) -> Iterator[tuple[int, State]]:
    at = sorted({i * n_steps // slots for i in range(slots)})
    stored = {0: state}
    for n in range(at[-1]):
        state = advance(n, state)
        if n + 1 in at:
            stored[n + 1] = state
    for first in reversed(at):
        start = stored.pop(first)
        end = n_steps if first == at[-1] else at[at.index(first) + 1]
        for last in reversed(range(first, end)):
            state = start
            for n in range(first, last):
                state = advance(n, state)
            yield last, state
