"""A network of your own with an ODE block, trained on handwritten digits in a plain PyTorch loop.

    python examples/own_network.py      (about 10 seconds)

The block solves dy/dt = f(t, y) over t in [0, 1]. Change the last argument of OdeBlock to another gradient mode, such
as FullBackprop() or StageCheckpoint(): the network trains in the same way, with other memory and time.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from anode_exp import TABLEAUX, DtoCheckpoint, ExplicitRungeKutta, OdeBlock, TimeGrid


class Field(nn.Module):
    """f(t, y) for images y of shape [B, 16, 8, 8], with the time as one more channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(17, 16, 3, padding=1)

    def forward(self, t: float, y: torch.Tensor) -> torch.Tensor:
        time = torch.full_like(y[:, :1], float(t))
        return torch.tanh(self.conv(torch.cat([y, time], 1)))


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    train, test = slice(0, 1437), slice(1437, None)

    rk4 = ExplicitRungeKutta(TABLEAUX["rk4"])
    network = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
        OdeBlock(Field(), rk4, TimeGrid(n_steps=2), DtoCheckpoint()),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    for epoch in range(1, 6):
        for batch in torch.randperm(1437).split(64):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(images[train][batch]), labels[train][batch])
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            correct = network(images[test]).argmax(1) == labels[test]
        print(f"epoch {epoch}: training loss {loss:.3f}, test accuracy {correct.float().mean():.1%}")


if __name__ == "__main__":
    main()
