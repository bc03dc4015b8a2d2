"""Whether a solve can be undone: ρ of ANODE Eq. 6 for the paper's own cases, and for images."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anode_exp.build import build_solver
from anode_exp.config.schema import StudyConfig, TrainConfig
from anode_exp.ode import (
    SOLVERS,
    ReversibleSolver,
    SolveFailed,
    Solver,
    TimeGrid,
    Tolerance,
    VectorField,
    end_state,
    solve_forward,
)
from anode_exp.records.reading import Row
from anode_exp.tasks.task import Batch
from anode_exp.training.progress import bar

Grid = TimeGrid | Tolerance
CASE_ROWS = 31
SINGLE = torch.finfo(torch.float32).eps


class Flow(nn.Module):
    """dy/dt = g(y) as a module."""

    def __init__(self, g: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.g = g

    def forward(self, t: float, y: Tensor) -> Tensor:
        return self.g(y)


@torch.no_grad()
def there_and_back(
    f: nn.Module, y0: Tensor, there: Grid, back: Grid, solver: str | Solver
) -> tuple[Tensor, Tensor, int, int]:
    """φ(y0, t), φ(φ(y0, t), −t), and the steps taken each way; a method with an inverse undoes its steps.

    Raises:
        SolveFailed: if an adaptive solve fails.
    """
    field, method = VectorField(f), SOLVERS[solver]() if isinstance(solver, str) else solver
    if isinstance(method, ReversibleSolver) and isinstance(there, TimeGrid):
        state = end_state(field, y0, field.theta, there, method)
        y1 = state[0]
        for n in reversed(range(there.n_steps)):
            state = method.inverse(field, field.theta, there.time(n), there.step_size(n), state)
        return y1, state[0], there.n_steps, there.n_steps
    y1, forward = solve_forward(field, y0, field.theta, there, method)
    again, backward = solve_forward(field, y1, field.theta, back, method)
    return y1, again, forward.n_steps, backward.n_steps


def rho(y0: Tensor, again: Tensor) -> float:
    """ρ = ‖φ(φ(y0, t), −t) − y0‖₂ / ‖y0‖₂ (ANODE Eq. 6)."""
    return float((again - y0).norm() / y0.norm())


def fixed(f: nn.Module, y0: Tensor, n_steps: int, solver: str | Solver) -> float:
    """ρ at t = 1 over n_steps equal steps each way."""
    return rho(y0, there_and_back(f, y0, TimeGrid(n_steps), TimeGrid(n_steps, 1.0, 0.0), solver)[1])


def to_tolerance(f: nn.Module, y0: Tensor, rtol: float, solver: str = "dopri5") -> tuple[float, int, int]:
    """ρ at t = 1 and the steps taken each way; atol = rtol/1000, as in ode45's defaults."""
    there, back = (Tolerance(rtol, rtol / 1000, t0, 1.0 - t0, 1_000_000, 1e-12) for t0 in (0.0, 1.0))
    _, again, forward, backward = there_and_back(f, y0, there, back, solver)
    return rho(y0, again), forward, backward


def steps_for(f: nn.Module, y0: Tensor, target: float, solver: str, most: int) -> int | None:
    """The least power of two of equal steps with ρ ≤ target; None if even ``most`` are too few."""
    powers = (2**k for k in range(1, most.bit_length()))
    return next((n for n in powers if fixed(f, y0, n, solver) <= target), None)


def cases(tick: Callable[[], object]) -> Iterator[Row]:
    """A row for each case of ANODE Sec. III: what is stated, and what is measured, in float64 on the CPU."""

    def row(case: str, solver: str, quantity: str, stated: str, measured: float | str | None) -> Row:
        tick()
        return {"kind": "case", "case": case, "solver": solver, "quantity": quantity, "stated": stated,
                "measured": measured}  # fmt: skip

    one = torch.ones(1, dtype=torch.float64)
    decay = Flow(lambda y: -100.0 * y)
    stated = "about 200,000 steps for 1 %"
    for solver in ("euler", "rk2", "rk4"):
        yield row("dz/dt = -100 z", f"{solver}, 200,000 steps", "ρ", stated, fixed(decay, one, 200_000, solver))
        yield row("dz/dt = -100 z", solver, "steps for 1 %", stated, steps_for(decay, one, 0.01, solver, 2**21))
    yield row("dz/dt = -100 z", "alf, 10,000 steps, undone", "ρ", stated, fixed(decay, one, 10_000, "alf"))
    stiff = Flow(lambda y: -1e4 * y)
    yield row("dz/dt = -10,000 z", "euler, 100,000 steps", "ρ", "impossible in double precision",
              fixed(stiff, one, 100_000, "euler"))  # fmt: skip

    relu = Flow(lambda y: -F.relu(10.0 * y))
    for steps, stated in ((11, "1 %"), (18, "0.4 %"), (211, "single precision")):
        yield row("dz/dt = -max(0, 10 z)", f"dopri5, {steps} equal steps", "ρ", stated,
                  fixed(relu, one, steps, "dopri5"))  # fmt: skip
        yield row("dz/dt = -max(0, 10 z)", f"alf, {steps} steps, undone", "ρ", stated, fixed(relu, one, steps, "alf"))
        # The tolerance whose forward solve takes the stated number of steps, or the nearest number
        tolerances = [10 ** (-i / 8) for i in range(8, 105)]
        found = [(abs(forward - steps), tol, r, forward) for tol in tolerances
                 for r, forward, _ in [to_tolerance(relu, one, tol)]]  # fmt: skip
        _, tol, r, forward = min(found)
        yield row("dz/dt = -max(0, 10 z)", f"dopri5, adaptive {tol:.0e}: {forward} steps", "ρ", stated, r)

    n = 100
    w = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y0 = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for name, matrix in (("Gaussian", w), ("Gaussian, ‖W‖₂ = 1", w / torch.linalg.matrix_norm(w, 2))):
        flow = Flow(partial(lambda w, y: F.relu(w @ y), matrix))
        case = f"dz/dt = max(0, W z), W {name}, n = 100"
        said = "about 10,000 steps for single precision" if matrix is w else "reversible"
        for solver in ("euler", "rk4"):
            yield row(case, f"{solver}, 10,000 steps", "ρ", said, fixed(flow, y0, 10_000, solver))
        yield row(case, "alf, 100 steps, undone", "ρ", said, fixed(flow, y0, 100, "alf"))
        yield row(case, "rk4", "steps for single precision", said, steps_for(flow, y0, SINGLE, "rk4", 2**16))

    cube = Flow(lambda y: y**3)
    z0 = 2.0
    start, blow_up = z0 * one, 1 / (2 * z0**2)
    for share in (0.5, 0.99):
        t = share * blow_up
        grid = Tolerance(1e-10, 1e-10, 0.0, t, 10**6, 1e-12)
        y1 = there_and_back(cube, start, grid, Tolerance(1e-10, 1e-10, t, 0.0, 10**6, 1e-12), "dopri5")[0]
        exact = z0 / math.sqrt(1 - 2 * z0**2 * t)
        yield row("dz/dt = z³, z(0) = 2", f"dopri5, adaptive 1e-10, t = {t:.5g}", "relative distance from the flow",
                  "z0/√(1−2 z0² t)", abs(float(y1) / exact - 1))  # fmt: skip
    try:
        solve_forward(VectorField(cube), start, (), Tolerance(1e-10, 1e-10, 0.0, 1.0, 10**6, 1e-12),
                      SOLVERS["dopri5"]())  # fmt: skip
        end = "ended"
    except SolveFailed as error:
        end = str(error).partition(" needs")[0].removeprefix("adaptive solve at ")
    yield row("dz/dt = z³, z(0) = 2", "dopri5, adaptive 1e-10", "where the solve ends", f"t = {blow_up:g}", end)

    for a in (0.1, 0.5, 0.9):
        z = 1.7 * one
        flow = Flow(partial(lambda a, y: a * F.relu(y), a))
        yield row(f"F(z) = z + {a} max(0, z), z0 = 1.7", "euler, 1 step", "error", f"a² z0 = {a * a * 1.7:.4g}",
                  fixed(flow, z, 1, "euler") * 1.7)  # fmt: skip


FIELD_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "softplus": F.softplus,
}


def conv_flow(channels: int, std: float, activation: str, seed: int, device: torch.device) -> Flow:
    """dy/dt = act(K ∗ y): one 3×3 convolution with a Gaussian kernel, as in ANODE's Figs. 1 and 7. y: [B, C, H, W]."""
    kernel = torch.randn(channels, channels, 3, 3, generator=torch.Generator().manual_seed(seed))
    kernel = (std * kernel).to(device)
    return Flow(lambda y: FIELD_ACTIVATIONS[activation](F.conv2d(y, kernel, padding=1)))


def images_there_and_back(
    images: Tensor, std: float, seed: int, grids: dict[str, tuple[str | Solver, Grid, Grid]]
) -> Iterator[tuple[Row, dict[str, Tensor]]]:
    """A row with ρ of all images, and output and reversed images, for each activation and each (solver, there, back).

    Args:
        images: [B, C, H, W] in [0, 1].
        std: of the Gaussian kernel, the same for every activation.
    """
    for activation in FIELD_ACTIVATIONS:
        f = conv_flow(images.shape[1], std, activation, seed, images.device)
        for label, (solver, there, back) in grids.items():
            row = {"kind": "image", "activation": activation, "solver": label, "weight_std": std}
            try:
                y1, again, forward, backward = there_and_back(f, images, there, back, solver)
            except SolveFailed as error:
                yield {**row, "rho": None, "rho_of_images": None, "reason": str(error)}, {}
                continue
            each = [rho(y0, y) for y0, y in zip(images, again, strict=True)]
            row |= {"rho": rho(images, again), "rho_of_images": each, "steps": forward, "steps_back": backward}
            yield row, {"output": y1, "reversed": again}


def rows(config: TrainConfig, study: StudyConfig, outputs: int, batch: Batch, directory: Path) -> Iterator[Row]:
    images = batch[0]
    n = config.solver.n_steps
    grids: dict[str, tuple[str | Solver, Grid, Grid]] = {}
    for fixed_steps in dict.fromkeys((config.solver.name, "alf")):
        method = build_solver(replace(config.solver, name=fixed_steps))
        label = f"{fixed_steps}, {n} steps" + (", undone" if isinstance(method, ReversibleSolver) else "")
        grids[label] = (method, TimeGrid(n), TimeGrid(n, 1.0, 0.0))
    limits = {"max_evaluations": 100_000, "min_step": 1e-9}
    for solver in study.adaptive_solvers:
        for tol in study.tolerances:
            there, back = (Tolerance(tol, tol, t0, 1.0 - t0, **limits) for t0 in (0.0, 1.0))  # type: ignore[arg-type]
            grids[f"{solver}, adaptive {tol:g}"] = (solver, there, back)
    pictures = {"input": images}
    with bar(CASE_ROWS * study.cases + 4 * len(grids), study.name) as progress:
        for row, found in images_there_and_back(images, study.weight_std, config.seed, grids):
            for name, tensor in found.items():
                pictures[f"{row['activation']}|{row['solver']}|{name}"] = tensor
            yield row
            progress.update()
        np.savez_compressed(directory / "images.npz", **{k: v.cpu().numpy() for k, v in pictures.items()})  # type: ignore[arg-type]
        if study.cases:
            yield from cases(progress.update)
