"""Checkpoint policies, and the fastest plan for a byte budget: a search over bytes and seconds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate

from anode_exp.gradient import (
    DtoCheckpoint,
    FullBackprop,
    GradientMode,
    Reversible,
    Revolve,
    StageCheckpoint,
    StepCheckpoint,
)
from anode_exp.ode import ReversibleSolver, Solver, StageSolver

RESERVE = 2**16
"""Bytes of a budget reserved for what the measured steps lack, mostly checks of the losses between steps."""


def policies(n_steps: int, solver: Solver) -> dict[str, GradientMode]:
    """The policies worth trying for blocks of ``n_steps`` steps of this method: name → mode."""
    found: dict[str, GradientMode] = {"full_backprop": FullBackprop(), "dto_checkpoint": DtoCheckpoint()}
    units = ["step"]
    if isinstance(solver, StageSolver):
        found["stage_checkpoint keep"] = StageCheckpoint()
        found["stage_checkpoint rebuild"] = StageCheckpoint(states="rebuild")
        units.append("stage")
    if isinstance(solver, ReversibleSolver):
        found["reversible"] = Reversible()
    if n_steps > 1:
        found["step_checkpoint keep"] = StepCheckpoint()
        found["step_checkpoint rebuild"] = StepCheckpoint(states="rebuild")
    slots = 1
    while slots < n_steps:
        for unit in units:
            found[f"revolve {unit} {slots}"] = Revolve(unit, slots)
        slots += max(1, slots // 2)
    return found


@dataclass(frozen=True)
class Profile:
    """Bytes of a training step with one policy in every block.

    Attributes:
        kept: what each block holds from its forward pass until its backward pass.
        inside: the most bytes alive during each block's own passes, minus what the blocks before it keep.
        outside: the most bytes alive elsewhere, minus what blocks keep: entry i while the first i blocks hold theirs.
        evaluations: of f, forward and backward, in each block.
        inputs: shape, without the batch, and dtype of each block's input.
    """

    kept: list[int]
    inside: list[int]
    outside: list[int]
    evaluations: list[tuple[int, int]]
    inputs: list[tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class Plan:
    """A policy for each block, and the predicted bytes of a step and seconds of the blocks' passes."""

    policies: tuple[str, ...]
    predicted_bytes: int
    block_seconds: float


def plan_table(plan: dict[str, Any]) -> str:
    """A recorded plan, one line per block."""
    rows = []
    for i, b in enumerate(plan["blocks"], 1):
        evaluations = f"{b['evaluations_forward']} + {b['evaluations_backward']}"
        row = {"block": i, "policy": b["policy"], "evaluations of f": evaluations}
        row |= {"kept, MB": f"{b['kept_bytes'] / 1e6:,.1f}", "both passes, ms": f"{b['seconds'] * 1e3:,.1f}"}
        rows.append(row)
    budget, predicted, measured = (plan[f"{k}_bytes"] / 2**20 for k in ("budget", "predicted", "measured"))
    head = f"plan for {budget:,.1f} MiB: peak {predicted:,.1f} MiB predicted, {measured:,.1f} MiB measured"
    return f"{head}\n{tabulate(rows, headers='keys')}"


def counted_bytes(profiles: Mapping[str, Profile], names: Sequence[str]) -> int:
    """Peak bytes of the tensors of a step with these policies: the largest of the moments in ``Profile``."""
    kept = [profiles[name].kept[i] for i, name in enumerate(names)]
    inside = [sum(kept[:i]) + profiles[name].inside[i] for i, name in enumerate(names)]
    outside = [sum(kept[:i]) + most for i, most in enumerate(_outside(profiles))]
    return max(*inside, *outside)


def _outside(profiles: Mapping[str, Profile]) -> list[int]:
    return next(iter(profiles.values())).outside


def fastest(
    profiles: Mapping[str, Profile], seconds: Mapping[str, Sequence[float]], budget: int
) -> tuple[str, ...] | None:
    """The policies of the fastest plan whose counted bytes fit the budget; None if none does.

    Args:
        seconds: of each block's passes under each policy; infinite where it was not measured.
    """
    outside = _outside(profiles)
    if outside[0] > budget:
        return None
    plans: list[tuple[int, float, tuple[str, ...]]] = [(0, 0.0, ())]  # bytes kept, seconds, policies
    for i in range(len(outside) - 1):
        longer = [
            (kept + profile.kept[i], taken + seconds[name][i], (*names, name))
            for kept, taken, names in plans
            for name, profile in profiles.items()
            if kept + profile.inside[i] <= budget
            and kept + profile.kept[i] + outside[i + 1] <= budget
            and seconds[name][i] < float("inf")
        ]
        plans = []
        for candidate in sorted(longer, key=lambda plan: plan[:2]):  # more bytes only where that is faster
            if not plans or candidate[1] < plans[-1][1]:
                plans.append(candidate)
    return plans[-1][2] if plans else None


def lightest(profiles: Mapping[str, Profile]) -> tuple[str, ...]:
    """The policies with the fewest bytes."""
    blocks = len(_outside(profiles)) - 1
    any_time = {name: [0.0] * blocks for name in profiles}
    low, high = 0, min(counted_bytes(profiles, [name] * blocks) for name in profiles)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fastest(profiles, any_time, middle) is None else (low, middle)
    names = fastest(profiles, any_time, high)
    assert names is not None
    return names
