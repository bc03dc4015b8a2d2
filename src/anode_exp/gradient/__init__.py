"""How a solve is differentiated: one file a family, all behind ``GradientMode.solve``."""

from anode_exp.gradient.base import GradientMode
from anode_exp.gradient.discrete_adjoint import DtoCheckpoint
from anode_exp.gradient.full_backprop import FullBackprop
from anode_exp.gradient.reverse_adjoint import ReverseAdjoint

GRADIENT_MODES: dict[str, type[GradientMode]] = {
    "full_backprop": FullBackprop,
    "dto_checkpoint": DtoCheckpoint,
    "reverse_adjoint": ReverseAdjoint,
}

__all__ = ["GRADIENT_MODES", "DtoCheckpoint", "FullBackprop", "GradientMode", "ReverseAdjoint"]
