"""The ResNet-18 variant with ODE blocks, as in ANODE's published code."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from anode_exp.models.layers import ACTIVATIONS, NORMS, Autonomous, MakeOdeBlock, conv_norm, initialise

STAGES = ((64, 1), (128, 2), (256, 2), (512, 2))
"""(channels, stride of the basic block) of each stage."""


def _conv3x3(c_in: int, c_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """y ↦ act(norm(conv(act(norm(conv(y))))) + shortcut(y)); the shortcut is 1×1 where the shape changes."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        stride: int,
        norm: Callable[[int], nn.Module],
        activation: Callable[[], nn.Module],
    ) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            *conv_norm(_conv3x3(c_in, c_out, stride), norm, activation),
            *conv_norm(_conv3x3(c_out, c_out), norm, None),
        )
        same = stride == 1 and c_in == c_out
        self.shortcut = nn.Sequential(
            *([] if same else conv_norm(nn.Conv2d(c_in, c_out, 1, stride, bias=False), norm, None))
        )
        self.activation = activation()

    def forward(self, y: Tensor) -> Tensor:
        return self.activation(self.branch(y) + self.shortcut(y))


class ResNet18(nn.Sequential):
    """The ResNet-18 variant: stem, four stages of one basic block and ODE blocks, pooling, linear.

    11,173,962 parameters at ten classes, 6,270,720 of them in the ODE blocks, whose
    f = act(norm(conv3×3(act(norm(conv3×3(y)))))).

    Args:
        make_ode_block: turns f into a layer.
        blocks_per_stage: ODE blocks after each basic block.
        norm, field_norm: names in ``NORMS``; of the network, and of f alone.
        activation: name in ``ACTIVATIONS``.

    Input [B, 3, 32, 32], output [B, num_classes].

    Source: ResNet (arXiv 1512.03385); ANODE's published code.
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
        c = STAGES[0][0]
        layers: list[nn.Module] = conv_norm(_conv3x3(3, c), make_norm, act)
        for channels, stride in STAGES:
            c_in, c = c, channels
            layers.append(BasicBlock(c_in, c, stride, make_norm, act))
            for _ in range(blocks_per_stage):
                f = [layer for _ in range(2) for layer in conv_norm(_conv3x3(c, c), make_field_norm, act)]
                layers.append(make_ode_block(Autonomous(*f)))
        layers += [nn.AvgPool2d(4), nn.Flatten(), nn.Linear(c, num_classes)]
        super().__init__(*layers)
        initialise(self)
