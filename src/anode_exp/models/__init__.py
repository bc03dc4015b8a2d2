"""Networks with ODE blocks, one file per architecture."""

from collections.abc import Callable

from torch import nn

from anode_exp.models.alexnet import AlexNet
from anode_exp.models.evolution import COUPLINGS, EVOLUTION_ACTIVATIONS, SHARINGS, Evolution, ReactionDiffusionAdvection
from anode_exp.models.layers import ACTIVATIONS, NORMS, Autonomous, MakeOdeBlock, TimedBatchNorm, synchronise_norms
from anode_exp.models.mlp import Mlp, TrajectoryNetwork, mlp
from anode_exp.models.normalizing_flow import FlowField, NormalizingFlow, flow
from anode_exp.models.ode_block import OdeBlock, count_parameters, ode_blocks, take_evaluations
from anode_exp.models.resnet import RESNET4, RESNET10, RESNET18, ResNet
from anode_exp.models.squeezenext import SqueezeNext

MODELS: dict[str, Callable[..., nn.Module]] = {
    "alexnet": AlexNet,
    "flow": flow,
    "mlp": mlp,
    "resnet4": RESNET4,
    "resnet10": RESNET10,
    "resnet18": RESNET18,
    "squeezenext": SqueezeNext,
}

__all__ = [
    "ACTIVATIONS",
    "COUPLINGS",
    "EVOLUTION_ACTIVATIONS",
    "MODELS",
    "NORMS",
    "SHARINGS",
    "AlexNet",
    "Autonomous",
    "Evolution",
    "FlowField",
    "MakeOdeBlock",
    "Mlp",
    "NormalizingFlow",
    "OdeBlock",
    "ReactionDiffusionAdvection",
    "ResNet",
    "SqueezeNext",
    "TimedBatchNorm",
    "TrajectoryNetwork",
    "count_parameters",
    "ode_blocks",
    "synchronise_norms",
    "take_evaluations",
]
