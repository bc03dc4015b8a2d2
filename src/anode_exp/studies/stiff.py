"""Trained trajectories: against their data, under implicit and explicit solvers, and their stiffness over training."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from anode_exp.build import build_data, build_device
from anode_exp.config.check import read_config, typed
from anode_exp.config.schema import StudyConfig, TrainConfig
from anode_exp.data import DataSet, TrajectoryData
from anode_exp.models import TrajectoryNetwork, ode_blocks, take_evaluations
from anode_exp.ode import SOLVERS, SolveFailed, Solver, TimeGrid, Tolerance, VectorField, linearised
from anode_exp.records.checkpoints import Checkpoints
from anode_exp.records.reading import Row
from anode_exp.runs import Run, load_run
from anode_exp.training.progress import bar

MOST_EVALUATIONS = 200_000
"""Most evaluations of f between two points, by an adaptive solver."""

AFTER = (500, 2_000, 10_000)
"""Training steps after which the best loss so far is reported."""

TIGHT = {"rtol": 1e-9, "atol": 1e-11}
"""Tolerances of scipy's Radau, whose solution of the trained field counts as exact."""


@dataclass
class Subject:
    """A trained field in float64, and its data."""

    network: TrajectoryNetwork
    data: TrajectoryData

    @classmethod
    def of(cls, run: Run, data: DataSet) -> "Subject":
        network = run.network.to(data.device, torch.float64)
        assert isinstance(network, TrajectoryNetwork) and isinstance(data, TrajectoryData)
        return cls(network, data)

    @property
    def field(self) -> VectorField:
        (block,) = ode_blocks(self.network)
        return block.field

    def solve(self, name: str, grid: TimeGrid | Tolerance, solver: Solver | None = None) -> tuple[Tensor, Row]:
        """States at the training times, [T, d], and a row with their costs and errors.

        Args:
            solver: the named one with settings of its own; by default the named one as it is.

        Returns:
            States, NaN where the solve failed. In the row ``mae`` against the data, the norm ``gradient`` of its
            gradient in the weights, ``forward`` evaluations of f and ``accepted`` steps, or ``reason`` of a failure.
        """
        (block,) = ode_blocks(self.network)
        block.solver, block.grid = solver or SOLVERS[name](), grid
        take_evaluations(self.network)
        self.network.zero_grad()
        truth = self.data.train[:, 1:]
        row: Row = {"solver": name, "mae": None, "gradient": None, "reason": None}
        try:
            states = self.network(self.data.train[:, 0], self.data.times)
            loss = (states - truth).abs().mean()
            loss.backward()
        except SolveFailed as error:
            return torch.full_like(truth[0], torch.nan), {**row, "reason": str(error)}
        norm = torch.stack([p.grad.norm() for p in self.network.parameters() if p.grad is not None]).norm()
        row |= {"mae": _number(loss), "gradient": _number(norm)}
        (counted,) = take_evaluations(self.network)
        steps = grid.n_steps * len(truth[0]) if isinstance(grid, TimeGrid) else counted.accepted
        return states[0].detach(), {**row, "forward": counted.forward, "steps": steps}

    def tight(self) -> Tensor:
        """States at the training times by scipy's Radau, [T, d]; NaN from where it failed."""
        from scipy.integrate import solve_ivp

        theta, start, times = self.field.theta, self.data.train[0, 0], self.data.times

        def as_tensor(y: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(y)).to(start)[None]

        @torch.no_grad()
        def f(t: float, y: np.ndarray) -> np.ndarray:
            return np.asarray(self.field(t, as_tensor(y), theta)[0].cpu())

        def jacobian(t: float, y: np.ndarray) -> np.ndarray:
            return np.asarray(linearised(self.field, theta, t, as_tensor(y))[1][0].cpu())

        span = (float(times[0]), float(times[-1]))
        solution = solve_ivp(f, span, start.cpu().numpy(), "Radau", times[1:].numpy(), jac=jacobian, **TIGHT)
        states = torch.full((len(times) - 1, len(start)), torch.nan, dtype=torch.float64)
        states[: solution.y.shape[1]] = torch.from_numpy(solution.y.T.copy())
        return states.to(start.device)

    def eigenvalues(self, states: Tensor) -> Tensor:
        """Eigenvalues of ∂f/∂y at the states, [T, d] complex, largest first; NaN where a state is not finite."""
        found = torch.full_like(states, torch.nan, dtype=torch.complex128)
        finite = states.isfinite().all(1)
        if finite.any():
            values = torch.linalg.eigvals(linearised(self.field, self.field.theta, 0.0, states[finite])[1])
            found[finite] = values.gather(1, values.abs().argsort(dim=1, descending=True))
        return found


def _number(x: Tensor) -> float | None:
    """x as a number, or None if it is not finite, for JSON."""
    return float(x.detach()) if bool(x.isfinite()) else None


def rows(config: TrainConfig, study: StudyConfig, outputs: int, batch: None, directory: Path) -> Iterator[Row]:
    """Rows of three kinds, and ``trajectories.npz`` with the arrays of each run by its number.

    ``run``: what training reached. ``steps``: a solver on fixed steps between the points, against the data and
    (``error``) against the field's exact solution. ``epoch``: an adaptive solver after a kept epoch, and the
    eigenvalues along the run's own trajectory.
    """
    device = build_device(config.runtime)
    folders = [Path(folder) for folder in (study.run or "").split(",")]
    owns = [typed(read_config(folder)) for folder in folders]
    kept = [Checkpoints(folder / "checkpoints").epochs() for folder in folders]
    per_epoch = len(study.adaptive_solvers) * len(study.tolerances)
    total = len(folders) * (1 + len(study.solvers) * len(study.n_steps)) + per_epoch * sum(map(len, kept))
    arrays: dict[str, np.ndarray] = {}
    with bar(total, study.name) as progress:
        for i, (folder, own, epochs) in enumerate(zip(folders, owns, kept, strict=True)):
            name = {"run": str(folder), "trained_by": own.solver.describe(), "seed": own.seed}
            run = load_run(folder, study.checkpoint)
            data = build_data(own.dataset, device)
            subject = Subject.of(run, data)
            (block,) = ode_blocks(subject.network)
            states, row = subject.solve(own.solver.name, block.grid, block.solver)
            exact = subject.tight()
            found, known = subject.eigenvalues(states), subject.data
            arrays |= {f"{i}.{k}": np.asarray(x.cpu()) for k, x in {
                "times": known.times[1:], "low": known.low, "high": known.high, "data": known.train[0, 1:],
                "model": states, "exact": exact, "eigenvalues": found}.items()}  # fmt: skip
            losses = [x for line in run.metrics for x in line["step_losses"] if x is not None]
            yield {
                "kind": "run", **name, "epoch": run.epoch, "iterations": len(losses), "mae": row["mae"],
                "exact_mae": _number((exact - known.train[0, 1:]).abs().mean()), "gradient": row["gradient"],
                "best_after": {str(n): min(losses[:n]) for n in AFTER if len(losses) >= n},
                "status": None if run.results is None else run.results["status"],
            }  # fmt: skip
            progress.update()
            for solver in study.solvers:
                for n in study.n_steps:
                    states, row = subject.solve(solver, TimeGrid(n))
                    error = _number((states - exact).abs().mean())
                    yield {"kind": "steps", **name, "n_steps": n, **row, "error": error}
                    progress.update()
            for epoch in epochs:
                then = Subject.of(load_run(folder, str(epoch)), data)
                (block,) = ode_blocks(then.network)
                states, mine = then.solve(own.solver.name, block.grid, block.solver)
                found = then.eigenvalues(states)
                found = found[found.isfinite()]
                (line,) = [line for line in run.metrics if line["epoch"] == epoch]
                about = {"kind": "epoch", **name, "iterations": line["steps"], "own_mae": mine["mae"]}
                about |= {"own_gradient": mine["gradient"]}
                fastest, unstable = (_number(x.max()) if len(x) else None for x in (found.abs(), found.real))
                about |= {"fastest": fastest, "most_unstable": unstable}
                for solver in study.adaptive_solvers:
                    for tolerance in study.tolerances:
                        grid = Tolerance(tolerance, tolerance, max_evaluations=MOST_EVALUATIONS, min_step=1e-12)
                        yield {**about, "tolerance": tolerance, **then.solve(solver, grid)[1]}
                        progress.update()
    np.savez(directory / "trajectories.npz", **arrays)  # type: ignore[arg-type]
