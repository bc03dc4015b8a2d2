"""AlexNet with an ODE block, as in ANODE's table."""

from __future__ import annotations

from torch import nn

from anode_exp.models.layers import ACTIVATIONS, NORMS, Autonomous, MakeOdeBlock, conv_norm, initialise


class AlexNet(nn.Sequential):
    """conv5×5 3→64, pooling, ODE blocks of one conv5×5 64→64, pooling, linear 4096→384→192→classes.

    1,756,682 parameters for ten classes, 102,592 of them in the ODE block, whose f = act(norm(conv5×5(y))). Pooling is
    max pooling of 3×3 with stride 2, as in AlexNet; the published code is not known to differ.

    Args:
        make_ode_block: turns f into a layer.
        blocks_per_stage: ODE blocks.
        norm, field_norm: names in ``NORMS``, for the network and for f.
        activation: name in ``ACTIVATIONS``.

    Input [B, 3, 32, 32], output [B, num_classes].

    Source: AlexNet (Krizhevsky, Sutskever, Hinton, NeurIPS 2012); the table published with ANODE's code.
    """

    def __init__(
        self,
        num_classes: int,
        make_ode_block: MakeOdeBlock,
        blocks_per_stage: int = 1,
        norm: str = "batch",
        field_norm: str = "batch",
        activation: str = "relu",
    ) -> None:
        make_norm, make_field_norm, act = NORMS[norm], NORMS[field_norm], ACTIVATIONS[activation]
        c = 64
        layers: list[nn.Module] = [*conv_norm(nn.Conv2d(3, c, 5, padding=2), make_norm, act), nn.MaxPool2d(3, 2, 1)]
        for _ in range(blocks_per_stage):
            f = conv_norm(nn.Conv2d(c, c, 5, padding=2), make_field_norm, act)
            layers.append(make_ode_block(Autonomous(*f)))
        layers += [nn.MaxPool2d(3, 2, 1), nn.Flatten(), nn.Linear(c * 8 * 8, 384), act(), nn.Linear(384, 192), act()]
        super().__init__(*layers, nn.Linear(192, num_classes))
        initialise(self)
