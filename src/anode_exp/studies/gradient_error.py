"""Gradients of a network as one vector, and how far one is from another."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anode_exp.build import varied
from anode_exp.config.schema import GradientConfig, StudyConfig, TrainConfig
from anode_exp.ode import SolveFailed
from anode_exp.records.checkpoints import Checkpoints
from anode_exp.records.reading import Row
from anode_exp.runs import load_run
from anode_exp.tasks.task import Batch
from anode_exp.training.progress import bar


def flat_gradient(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """∂J/∂θ of the cross entropy over all parameters, as one vector, in training mode."""
    network.train()
    network.zero_grad()
    F.cross_entropy(network(images), labels).backward()
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


def relative_error(g: Tensor, exact: Tensor) -> float:
    """‖g − g_exact‖₂ / ‖g_exact‖₂."""
    return float((g - exact).norm() / exact.norm())


def split_error(reverse: Tensor, stored: Tensor, exact: Tensor) -> dict[str, float]:
    """The reverse-time adjoint's error as the sum of two vectors, each relative to the exact gradient's norm.

    g_reverse − g_exact = (g_reverse − g_stored) + (g_stored − g_exact): what comes of not retracing the trajectory,
    and what is left on the stored one, where the continuous adjoint does not belong to the discrete solve. The norms do
    not add up where the two point apart.

    Source: the two faults of ANODE (arXiv 1902.10298), Sec. III and IV.
    """
    reversal = float((reverse - stored).norm() / exact.norm())
    return {"reversal_error": reversal, "inconsistency_error": relative_error(stored, exact)}


def rows(config: TrainConfig, study: StudyConfig, outputs: int, batch: Batch, directory: Path) -> Iterator[Row]:
    images, labels = batch[0].double(), batch[1]
    settings: list[dict[str, Any]] = [{"solver": s, "n_steps": n} for s in study.solvers for n in study.n_steps]
    each_its_own = config.model.evolution != "none" and config.model.evolution_coupling == "joint"
    settings += [
        {"solver": s, "adaptive": True, "rtol": tolerance, "atol": tolerance}
        for s in (() if each_its_own else study.adaptive_solvers)  # weights that change with the step: fixed steps
        for tolerance in study.tolerances
    ]
    states: dict[int | None, dict[str, Tensor] | None] = {None: None}
    if study.run is not None:
        names = [study.checkpoint]
        if study.checkpoint == "every":
            names = ["0", *map(str, Checkpoints(Path(study.run) / "checkpoints").epochs())]
            own = config.solver
            settings = [{"solver": own.name, "n_steps": own.n_steps}]
            if own.adaptive:
                settings = [{"solver": own.name, "adaptive": True, "rtol": own.rtol, "atol": own.atol}]
        runs = [load_run(study.run, name) for name in names]
        states = {run.epoch: run.network.state_dict() for run in runs}
    modes = {name: GradientConfig(name=name) for name in ("full_backprop", "stored_adjoint")}
    with bar(len(states) * len(settings) * len(study.gradients), study.name) as progress:
        for epoch, weights in states.items():
            for setting in settings:

                def gradient(mode: GradientConfig, setting: dict[str, Any] = setting, weights: Any = weights) -> Tensor:
                    network = varied(config, mode, outputs, **setting)
                    if weights is not None:
                        network.load_state_dict(weights)
                    return flat_gradient(network.to(images.device).double(), images, labels)

                chosen = {"n_steps": setting.get("n_steps"), "tolerance": setting.get("rtol")}
                row = {"epoch": epoch, "solver": setting["solver"], **chosen}
                try:
                    exact, stored = (gradient(modes[name]) for name in modes)
                except SolveFailed as error:
                    yield {**row, "gradient": "full_backprop", "relative_error": None, "reason": str(error)}
                    progress.update(len(study.gradients))
                    continue
                for label, mode in study.gradients.items():
                    mine: dict[str, Any] = {**row, "gradient": label}
                    try:
                        g = stored if mode == modes["stored_adjoint"] else gradient(mode)
                    except SolveFailed as error:
                        yield {**mine, "relative_error": None, "reason": str(error)}
                    else:
                        if mode.name == "reverse_adjoint":
                            mine |= split_error(g, stored, exact)
                        yield {**mine, "relative_error": relative_error(g, exact)}
                    progress.update()
