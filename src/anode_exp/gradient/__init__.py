"""How a solve is differentiated: one file per family, all behind ``GradientMode.solve``."""

from collections.abc import Callable

from anode_exp.gradient.base import GradientMode, WarmStart, solve_through
from anode_exp.gradient.batched_adjoint import BatchedAdjoint
from anode_exp.gradient.discrete_adjoint import (
    DiscreteAdjoint,
    DtoCheckpoint,
    Equispaced,
    Revolve,
    StageCheckpoint,
    StepCheckpoint,
)
from anode_exp.gradient.full_backprop import FullBackprop
from anode_exp.gradient.reverse_adjoint import ReverseAdjoint
from anode_exp.gradient.reversible import Reversible
from anode_exp.gradient.stored_adjoint import StoredAdjoint

GRADIENT_MODES: dict[str, Callable[..., GradientMode]] = {
    "full_backprop": FullBackprop,
    "dto_checkpoint": DtoCheckpoint,
    "step_checkpoint": StepCheckpoint,
    "stage_checkpoint": StageCheckpoint,
    "batched_adjoint": BatchedAdjoint,
    "revolve": Revolve,
    "equispaced": Equispaced,
    "reversible": Reversible,
    "reverse_adjoint": ReverseAdjoint,
    "stored_adjoint": StoredAdjoint,
}

__all__ = [
    "GRADIENT_MODES",
    "BatchedAdjoint",
    "DiscreteAdjoint",
    "DtoCheckpoint",
    "Equispaced",
    "FullBackprop",
    "GradientMode",
    "ReverseAdjoint",
    "Reversible",
    "Revolve",
    "StageCheckpoint",
    "StepCheckpoint",
    "StoredAdjoint",
    "WarmStart",
    "solve_through",
]
