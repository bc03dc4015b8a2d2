"""Gradients of a network as one vector, and how far one is from another."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anode_exp.build import autocast_for, build_device, dtype_of, set_backends, varied
from anode_exp.config.check import lacking
from anode_exp.config.schema import GradientConfig, StudyConfig, TrainConfig
from anode_exp.ode import SolveFailed
from anode_exp.records.checkpoints import Checkpoints
from anode_exp.records.reading import Row
from anode_exp.runs import load_run
from anode_exp.tasks.task import Batch
from anode_exp.training.progress import bar


def flat_gradient(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Tensor:
    """∂J/∂θ of the cross entropy over all parameters, as one vector, in training mode."""
    network.train()
    network.zero_grad()
    with autocast():
        loss = F.cross_entropy(network(images), labels)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


def relative_error(g: Tensor, exact: Tensor) -> float:
    """‖g − g_exact‖₂ / ‖g_exact‖₂."""
    return float((g - exact).norm() / exact.norm())


def split_error(reverse: Tensor, stored: Tensor, exact: Tensor) -> dict[str, float]:
    """The reverse-time adjoint's error as the sum of two vectors, each relative to the exact gradient's norm.

    g_reverse − g_exact = (g_reverse − g_stored) + (g_stored − g_exact): the error of not retracing the trajectory,
    and the error left on the stored one, where the continuous adjoint is not that of the discrete solve. The norms do
    not add up if the two vectors are not parallel.

    Source: the two faults of ANODE (arXiv 1902.10298), Sec. III and IV.
    """
    reversal = float((reverse - stored).norm() / exact.norm())
    return {"reversal_error": reversal, "inconsistency_error": relative_error(stored, exact)}


def rows(config: TrainConfig, study: StudyConfig, outputs: int, batch: Batch, directory: Path) -> Iterator[Row]:
    """A row for each mode that the solver supports, in each precision, against ``full_backprop`` in float64.

    In float64 an error is the mode's own. In float32 it includes rounding, so ``full_backprop`` has a row too, and the
    row of ``reversible`` has the distance from that (``drift``): what its inverse steps add. In TF32 and bfloat16 the
    row of ``full_backprop`` shows the effect of rounding.
    """
    images, labels = batch
    settings: list[dict[str, Any]] = [{"solver": s, "n_steps": n} for s in study.solvers for n in study.n_steps]
    each_its_own = config.model.evolution != "none" and config.model.evolution_coupling == "joint"
    settings += [
        {"solver": s, "adaptive": True, "rtol": tolerance, "atol": tolerance}
        for s in (() if each_its_own else study.adaptive_solvers)  # weights that change per step need fixed steps
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
    for precision in study.precisions:
        build_device(replace(config.runtime, precision=precision))  # UserError if it lacks it
    full, stored = (GradientConfig(name=name) for name in ("full_backprop", "stored_adjoint"))
    with bar(len(states) * len(settings) * len(study.precisions), study.name) as progress:
        for epoch, weights in states.items():
            for setting in settings:

                def gradient(
                    mode: GradientConfig, precision: str, setting: dict[str, Any] = setting, weights: Any = weights
                ) -> Tensor:
                    network = varied(config, mode, outputs, **setting)
                    if weights is not None:
                        network.load_state_dict(weights)
                    dtype = dtype_of(precision)
                    set_backends(replace(config.runtime, precision=precision))
                    network, x = network.to(images.device, dtype), images.to(dtype)
                    return flat_gradient(network, x, labels, autocast_for(precision, images.device)).double()

                chosen = {"n_steps": setting.get("n_steps"), "tolerance": setting.get("rtol")}
                row = {"epoch": epoch, "solver": setting["solver"], **chosen}
                try:
                    exact = gradient(full, "fp64")
                except SolveFailed as error:
                    yield {**row, "precision": "fp64", "gradient": "full_backprop", "relative_error": None,
                           "reason": str(error)}  # fmt: skip
                    progress.update(len(study.precisions))
                    continue
                modes = {
                    label: mode
                    for label, mode in study.gradients.items()
                    if not lacking(setting["solver"], mode) and mode.solver in (None, setting["solver"])
                }
                for precision in study.precisions:
                    compared: dict[str, GradientConfig] = {} if precision == "fp64" else {"full_backprop": full}
                    if precision in ("fp64", "fp32"):
                        compared |= modes
                    found: dict[str, Tensor] = {}
                    for label, mode in compared.items():
                        mine: dict[str, Any] = {**row, "precision": precision, "gradient": label}
                        try:
                            g = found[label] = gradient(mode, precision)
                            if mode.name == "reverse_adjoint" and precision == "fp64":
                                on_stored = found.get("stored_adjoint")
                                on_stored = gradient(stored, precision) if on_stored is None else on_stored
                                mine |= split_error(g, on_stored, exact)
                        except SolveFailed as error:
                            yield {**mine, "relative_error": None, "reason": str(error)}
                            continue
                        if mode.name == "reversible" and "full_backprop" in found:
                            mine["drift"] = relative_error(g, found["full_backprop"])
                        yield {**mine, "relative_error": relative_error(g, exact)}
                    progress.update()
    set_backends(config.runtime)
