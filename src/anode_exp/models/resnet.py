"""Residual networks with ODE blocks: the variants in ANODE's and ANODEV2's published figures and tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from anode_exp.models.layers import ACTIVATIONS, NORMS, Autonomous, MakeOdeBlock, conv_norm, initialise


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


@dataclass(frozen=True)
class Stage:
    """One resolution: its channels, and the stride of its basic block; without a stride it has no basic block."""

    channels: int
    stride: int | None


class ResNet(nn.Sequential):
    """Stem, stages of one basic block and ODE blocks, average pooling, linear.

    The ODE blocks' f = act(norm(conv3×3(act(norm(conv3×3(y)))))): it ends in its activation, as in the published code.

    Args:
        stages: from the first to the last; the stem has the channels of the first.
        pool: size of the pooling window, in pixels of the last stage.
        make_ode_block: turns f into a layer.
        blocks_per_stage: ODE blocks of each stage.
        norm, field_norm: names in ``NORMS``, for the network and for f.
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
        *,
        stages: tuple[Stage, ...],
        pool: int,
    ) -> None:
        make_norm, make_field_norm, act = NORMS[norm], NORMS[field_norm], ACTIVATIONS[activation]
        c, pixels = stages[0].channels, 32
        layers: list[nn.Module] = conv_norm(_conv3x3(3, c), make_norm, act)
        for stage in stages:
            c_in, c = c, stage.channels
            if stage.stride is not None:
                pixels //= stage.stride
                layers.append(BasicBlock(c_in, c, stage.stride, make_norm, act))
            for _ in range(blocks_per_stage):
                f = [layer for _ in range(2) for layer in conv_norm(_conv3x3(c, c), make_field_norm, act)]
                layers.append(make_ode_block(Autonomous(*f)))
        layers += [nn.AvgPool2d(pool), nn.Flatten(), nn.Linear(c * (pixels // pool) ** 2, num_classes)]
        super().__init__(*layers)
        initialise(self)


RESNET18 = partial(ResNet, stages=(Stage(64, 1), Stage(128, 2), Stage(256, 2), Stage(512, 2)), pool=4)
"""The ResNet-18 variant of ANODE's Figs. 4 and 5: 11,173,962 parameters for ten classes, 6,270,720 in 4 ODE blocks."""

RESNET10 = partial(ResNet, stages=(Stage(16, 1), Stage(32, 2)), pool=8)
"""ResNet-10 of ANODE's table: 44,186 parameters for ten classes, 23,232 in 2 ODE blocks."""

RESNET4 = partial(ResNet, stages=(Stage(16, None),), pool=8)
"""ResNet-4 of ANODE's table: 7,706 parameters for ten classes, 4,672 in its ODE block."""
