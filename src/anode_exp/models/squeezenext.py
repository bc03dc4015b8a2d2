"""SqueezeNext-23 with ODE blocks, as in ANODE's published code."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from anode_exp.models.layers import ACTIVATIONS, NORMS, Autonomous, MakeOdeBlock, conv_norm, initialise

STAGES = ((32, 1), (64, 2), (128, 2), (256, 2))
"""(channels, stride of the transition) of each stage at width 1."""


def _bottleneck(
    c_in: int,
    c_out: int,
    ratio: float,
    stride: int,
    norm: Callable[[int], nn.Module],
    activation: Callable[[], nn.Module],
) -> list[nn.Module]:
    """Convolutions 1×1, 1×1, 1×3, 3×1, 1×1 over c_in → r → r/2 → r → r → c_out channels, r = ratio·c_in."""
    r = int(ratio * c_in)
    convs = [
        nn.Conv2d(c_in, r, 1, stride),
        nn.Conv2d(r, r // 2, 1),
        nn.Conv2d(r // 2, r, (1, 3), padding=(0, 1)),
        nn.Conv2d(r, r, (3, 1), padding=(1, 0)),
        nn.Conv2d(r, c_out, 1),
    ]
    return [layer for conv in convs for layer in conv_norm(conv, norm, activation)]


class Transition(nn.Module):
    """y ↦ act(bottleneck(y) + act(norm(conv1×1(y)))): changes channels and resolution."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        stride: int,
        norm: Callable[[int], nn.Module],
        activation: Callable[[], nn.Module],
    ) -> None:
        super().__init__()
        ratio = 1.0 if stride == 2 else 0.25 if c_in > c_out else 0.5
        self.branch = nn.Sequential(*_bottleneck(c_in, c_out, ratio, stride, norm, activation))
        self.shortcut = nn.Sequential(*conv_norm(nn.Conv2d(c_in, c_out, 1, stride), norm, activation))
        self.activation = activation()

    def forward(self, y: Tensor) -> Tensor:
        return self.activation(self.branch(y) + self.shortcut(y))


class SqueezeNext(nn.Sequential):
    """SqueezeNext-23: stem, four stages of one transition and ODE blocks, head.

    461,466 parameters for width 1 and ten classes, 199,800 of them in the ODE blocks, whose f is the bottleneck of five
    convolutions at half the channels, without shortcut.

    Args:
        make_ode_block: turns f into a layer.
        blocks_per_stage: ODE blocks after each transition.
        norm, field_norm: names in ``NORMS``, for the network and for f.
        activation: name in ``ACTIVATIONS``.
        width: factor on every layer's channels; 8·width must be a whole number.

    Input [B, 3, 32, 32], output [B, num_classes].

    Raises:
        ValueError: if a layer would not have a whole number of channels.

    Source: SqueezeNext (arXiv 1803.10615); ANODE's published code.
    """

    def __init__(
        self,
        num_classes: int,
        make_ode_block: MakeOdeBlock,
        blocks_per_stage: int = 1,
        norm: str = "batch",
        field_norm: str = "batch",
        activation: str = "relu",
        width: float = 1.0,
    ) -> None:
        if width <= 0 or width * 8 != int(width * 8):
            raise ValueError(f"width is {width}; allowed are multiples of 1/8 above 0, such as 0.5, 1 or 2")
        make_norm, make_field_norm, act = NORMS[norm], NORMS[field_norm], ACTIVATIONS[activation]
        c, head = int(64 * width), int(128 * width)
        layers: list[nn.Module] = conv_norm(nn.Conv2d(3, c, 3, padding=1), make_norm, act)
        for channels, stride in STAGES:
            c_in, c = c, int(channels * width)
            layers.append(Transition(c_in, c, stride, make_norm, act))
            for _ in range(blocks_per_stage):
                layers.append(make_ode_block(Autonomous(*_bottleneck(c, c, 0.5, 1, make_field_norm, act))))
        layers += conv_norm(nn.Conv2d(c, head, 1), make_norm, act)
        layers += [nn.AvgPool2d(4), nn.Flatten(), nn.Linear(head, num_classes)]
        super().__init__(*layers)
        initialise(self)
