"""Flows of trained runs: likelihoods next to baselines, integrals, samples, and the costs and errors of gradients."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from anode_exp.build import build_data, build_device, build_network, dtype_of
from anode_exp.config.schema import GradientConfig, StudyConfig, TrainConfig
from anode_exp.data.densities import PLANAR, DensityData
from anode_exp.errors import UserError
from anode_exp.models.normalizing_flow import NormalizingFlow
from anode_exp.ode import SolveFailed
from anode_exp.records.reading import Row
from anode_exp.runs import load_run
from anode_exp.studies.baselines import COMPONENTS, baselines
from anode_exp.studies.gradient_error import relative_error
from anode_exp.studies.memory import peaks_and_times
from anode_exp.tasks.density import ALLOWED_STEP_ERROR, Density, DensityBatches
from anode_exp.tasks.task import Batch
from anode_exp.training.progress import bar

AT_ONCE = 5000
"""Samples in one solve."""

RESOLUTION = 300
"""Points per axis of the grid for integrals and pictures."""


def in_parts(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), for ``AT_ONCE`` samples at a time, without a gradient."""
    with torch.no_grad():
        return torch.cat([function(part) for part in x.split(AT_ONCE)])


def grid_of(x: Tensor) -> tuple[Tensor, float]:
    """Points [n², 2] of a square around the samples [N, 2] with a margin of 3, and the area of each point."""
    most = float(x.abs().max()) + 3
    axis = torch.linspace(-most, most, RESOLUTION, dtype=x.dtype, device=x.device)
    return torch.cartesian_prod(axis, axis), (2 * most / (RESOLUTION - 1)) ** 2


def likelihood(flow: NormalizingFlow, data: DensityData, samples: int) -> tuple[Row, dict[str, Tensor]]:
    """The flow's likelihood on the test split, and pictures of the flow.

    Returns:
        ``nll`` in nats by accurate steps, ``nll_by_steps`` by the run's own, and ``exploits_steps``, whether these
        differ by more than is allowed; in the plane the integrals of both densities over a square around the data;
        ``round_trip``, the largest difference between normal points and these mapped to samples and back. Pictures:
        ``samples`` [n, d], and in the plane ``density`` and ``density_by_steps`` [n²].
    """
    row: Row = {}
    densities: dict[str, Callable[[Tensor], Tensor]] = {"": flow.log_prob, "_by_steps": flow}
    for name, log_p in densities.items():
        row[f"nll{name}"] = data.offset - float(in_parts(log_p, data.test).double().mean())
    row["exploits_steps"] = abs(row["nll_by_steps"] - row["nll"]) > ALLOWED_STEP_ERROR
    generator = torch.Generator().manual_seed(0)
    normals = torch.randn(min(samples, len(data.test)), data.output_size, generator=generator).to(data.test)
    pictures = {"samples": in_parts(flow.sample, normals)}
    row["round_trip"] = float((in_parts(flow.normals, pictures["samples"]) - normals).abs().max())
    if data.output_size == 2:
        points, area = grid_of(data.train)
        for name, log_p in densities.items():
            pictures[f"density{name}"] = in_parts(log_p, points).double().exp()
            row[f"integral{name}"] = float(pictures[f"density{name}"].sum()) * area
    return row, pictures


def gradient_of(flow: NormalizingFlow, batch: Batch) -> Tensor:
    """The loss's gradient over all parameters, as one vector."""
    flow.zero_grad()
    loss, _ = Density().loss(flow, batch)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in flow.parameters() if p.grad is not None])


def gradient_rows(
    flows: dict[str, NormalizingFlow], batch: Batch, repeats: int, tick: Callable[[], object]
) -> Iterator[Row]:
    """A row for each flow: error of its gradient in float64 against the first's, peak, time. Only the modes differ."""
    errors: dict[str, float | None] = {}
    exact = None
    for label, flow in flows.items():
        try:
            gradient = gradient_of(deepcopy(flow).double(), tuple(x.double() for x in batch))
        except SolveFailed:
            errors[label] = None
            continue
        exact = gradient if exact is None else exact
        errors[label] = relative_error(gradient, exact)
    networks: dict[str, nn.Module] = {k: flow for k, flow in flows.items() if errors[k] is not None}
    for row in peaks_and_times(networks, batch, "fp32", repeats, tick, task=Density()):
        yield {"kind": "gradient", **row, "relative_error": errors[row["gradient"]]}


def rows(config: TrainConfig, study: StudyConfig, outputs: int, batch: None, directory: Path) -> Iterator[Row]:
    device = build_device(config.runtime)
    runs = [load_run(folder, study.checkpoint) for folder in (study.run or "").split(",")]
    for run in runs:
        if run.config.dataset != runs[0].config.dataset:
            raise UserError(f"run={run.directory}: give runs on the same data set")
    name = runs[0].config.dataset.name
    pictures: dict[str, Any] = {}  # arrays by name
    data = build_data(config.dataset, device)
    assert isinstance(data, DensityData)
    few = [x[: study.samples].double().cpu().numpy() for x in (data.train, data.validation, data.test)]
    least = 10 * min(COMPONENTS)
    if len(few[0]) < least or not len(few[1]):
        has = f"the baselines have {len(few[0])} training samples and {len(few[1])} for validation"
        need = f"at least {least} and 1, by study.samples or the run's dataset.train_size and dataset.validation_size"
        raise UserError(f"study density: {has}; they need {need}")
    labels = _labels([run.directory for run in runs])
    with bar(1 + len(runs) * (1 + len(study.gradients) * (1 + study.repeats)), study.name) as progress:
        if name in PLANAR:
            yield {
                "kind": "density",
                "name": "the true density",
                "nll": -float(PLANAR[name].log_density(few[2]).mean()),
            }
            points, _ = grid_of(data.train)
            pictures |= {"points": points.cpu().numpy(), "data": few[2]}
            pictures["truth"] = np.exp(
                np.concatenate([PLANAR[name].log_density(x) for x in np.array_split(pictures["points"], 20)])
            )
        for baseline in baselines(*few):
            found = asdict(baseline)
            yield {"kind": "density", "name": found["name"], "chosen": found["chosen"],
                   "nll": found["test_nll"] + data.offset}  # fmt: skip
        progress.update()
        for label, run in zip(labels, runs, strict=True):
            own = run.config
            flow, here = run.network.to(device), data.to(device, dtype_of(own.runtime.precision))
            assert isinstance(flow, NormalizingFlow)
            row, drawn = likelihood(flow, here, study.samples or len(data.test))
            pictures |= {f"{label}|{key}": x.cpu().numpy() for key, x in drawn.items()}
            steps = {"chosen": own.solver.describe(), "epoch": run.epoch}
            yield {"kind": "density", "name": label, **steps, **row}
            progress.update()
            trace = own.task.trace or "exact"
            first = next(DensityBatches(here, own.recipe.batch_size, trace, own.seed).epoch(1).starting_at(0))
            flows = {}
            for mode, gradient in study.gradients.items():
                flows[mode] = with_gradient(own, gradient, data.output_size, flow)
            for found in gradient_rows(flows, first, study.repeats, progress.update):
                yield {**found, "name": label}
    if data.output_size == 2:
        np.savez_compressed(directory / "pictures.npz", **pictures)


def with_gradient(config: TrainConfig, gradient: GradientConfig, size: int, flow: NormalizingFlow) -> NormalizingFlow:
    """The run's flow with another gradient mode."""
    network: Any = build_network(replace(config, gradient=gradient), size)
    network.load_state_dict(flow.state_dict())
    return network.to(next(flow.parameters()))


def _labels(folders: list[Path]) -> list[str]:
    """The folders' names, or their whole paths if names are not unique."""
    names = [folder.name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]
