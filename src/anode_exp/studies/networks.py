"""The networks that studies compare: one configuration, varied."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from anode_exp.build import build_memory_format, build_network
from anode_exp.config.schema import GradientConfig, TrainConfig


def varied(config: TrainConfig, gradient: GradientConfig, num_classes: int, **changes: Any) -> nn.Module:
    """The network of a seed under a gradient mode; ``changes``: solver (a name), its settings, blocks_per_stage."""
    blocks = changes.pop("blocks_per_stage", config.model.blocks_per_stage)
    name = changes.pop("solver", config.solver.name)
    solver = replace(config.solver, name=name, **{"adaptive": False, **changes})
    model = replace(config.model, blocks_per_stage=blocks)
    return build_network(replace(config, model=model, solver=solver, gradient=gradient), num_classes)


def placed(network: nn.Module, config: TrainConfig, device: torch.device) -> tuple[nn.Module, torch.memory_format]:
    """The network on the device, and the layout that it has there."""
    layout = build_memory_format(config.runtime, network, device)
    return network.to(device, memory_format=layout), layout  # type: ignore[call-overload]
