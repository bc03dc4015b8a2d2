"""Networks with ODE blocks, one file an architecture."""

from collections.abc import Callable

from torch import nn

from anode_exp.models.layers import ACTIVATIONS, NORMS, MakeOdeBlock
from anode_exp.models.ode_block import OdeBlock, count_parameters, ode_blocks, take_evaluations
from anode_exp.models.resnet import ResNet18
from anode_exp.models.squeezenext import SqueezeNext

MODELS: dict[str, Callable[..., nn.Module]] = {"resnet18": ResNet18, "squeezenext": SqueezeNext}

__all__ = [
    "ACTIVATIONS",
    "MODELS",
    "NORMS",
    "MakeOdeBlock",
    "OdeBlock",
    "ResNet18",
    "SqueezeNext",
    "count_parameters",
    "ode_blocks",
    "take_evaluations",
]
