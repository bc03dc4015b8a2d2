"""Compare the gradient of every mode with full backpropagation through the same solve, in float64.

    python examples/gradient_errors.py      (a few seconds)

Exact modes agree to rounding. The reverse-time adjoint does not: it solves the state backwards, and it differentiates
the ODE, not its discrete solution. More steps make both errors smaller.
"""

import torch

from anode_exp import GRADIENT_MODES, TABLEAUX, ExplicitRungeKutta, OdeBlock, TimeGrid


class Field(torch.nn.Linear):
    def forward(self, t: float, y: torch.Tensor) -> torch.Tensor:
        return torch.tanh(super().forward(y))


MODES = {
    "dto_checkpoint": {},
    "step_checkpoint": {},
    "stage_checkpoint": {},
    "revolve": {"unit": "stage", "slots": 3},
    "stored_adjoint": {},
    "reverse_adjoint": {},
}


def gradient(f: torch.nn.Module, y0: torch.Tensor, n_steps: int, mode: str, **settings: object) -> torch.Tensor:
    """dL/dθ and dL/dy(0) of L = |y(1)|² as one vector."""
    solver = ExplicitRungeKutta(TABLEAUX["rk2"])
    block = OdeBlock(f, solver, TimeGrid(n_steps), GRADIENT_MODES[mode](**settings))
    y0 = y0.clone().requires_grad_()
    wanted = [y0, *f.parameters()]
    return torch.cat([g.flatten() for g in torch.autograd.grad(block(y0).square().sum(), wanted)])


def main() -> None:
    torch.manual_seed(0)
    f = Field(16, 16).double()
    with torch.no_grad():
        f.weight.mul_(5)  # a field that changes quickly
    y0 = torch.randn(8, 16, dtype=torch.float64)
    steps = (1, 4, 16, 64)
    print(f"{'relative error':18}" + "".join(f"{f'{n} steps':>12}" for n in steps))
    for mode, settings in MODES.items():
        errors = []
        for n in steps:
            truth = gradient(f, y0, n, "full_backprop")
            errors.append(float((gradient(f, y0, n, mode, **settings) - truth).norm() / truth.norm()))
        print(f"{mode:18}" + "".join(f"{error:12.1e}" for error in errors))


if __name__ == "__main__":
    main()
