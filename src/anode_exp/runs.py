"""Loading and evaluating recorded runs."""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from torch import nn

from anode_exp.build import (
    assemble,
    build_data,
    build_device,
    build_network,
    evaluation_batch_size,
    output_size,
    set_backends,
)
from anode_exp.config.check import read_config, typed
from anode_exp.config.schema import TrainConfig
from anode_exp.errors import UserError
from anode_exp.models import take_evaluations
from anode_exp.models.calibrate import calibrate_norms
from anode_exp.ode import SolveFailed
from anode_exp.records.checkpoints import Checkpoints
from anode_exp.records.reading import Row, append_line, read_metrics, read_results
from anode_exp.training.progress import bar
from anode_exp.training.step import evaluate


@dataclass(frozen=True)
class Run:
    """A run's network in evaluation mode, on the CPU, and its records.

    Attributes:
        epoch: the epoch after which the network's weights were saved.
        metrics: one dictionary per epoch, as in ``metrics.jsonl``.
        results: as in ``results.json``; None for a run that has not ended.
    """

    directory: Path
    config: TrainConfig
    network: nn.Module
    epoch: int
    metrics: list[Row]
    results: Row | None


def load_run(directory: str | Path, checkpoint: str = "best", config: TrainConfig | None = None) -> Run:
    """The network and records of a run.

    Args:
        checkpoint: ``best``, ``last``, or the number of an epoch that was kept; ``0`` is the untrained network.
        config: solve with the solver of this configuration instead of the run's own.

    Raises:
        UserError: if the directory holds no run, or the run does not have the checkpoint.
    """
    directory = Path(directory)
    config = typed(read_config(directory)) if config is None else config
    checkpoints = Checkpoints(directory / "checkpoints")
    network = build_network(config, output_size(config.dataset))
    epoch = 0
    if checkpoint != "0":
        kept = [str(epoch) for epoch in checkpoints.epochs()]
        if checkpoint not in ("best", "last", *kept):
            choice = f"choose one of {', '.join(('best', 'last', '0', *kept))}"
            raise UserError(f"checkpoint={checkpoint}: {choice}; train with runtime.keep_every=1 to keep more")
        state = checkpoints.load(f"epoch-{checkpoint}" if checkpoint in kept else checkpoint)
        if state is None:
            raise UserError(f"{directory}: has no {checkpoint} checkpoint yet; one is saved after every epoch")
        averaged = state.get("averaged")
        network.load_state_dict(state["network"] if averaged is None else averaged["network"])
        epoch = state["progress"]["epochs"]
    return Run(directory, config, network.eval(), epoch, read_metrics(directory), read_results(directory))


def evaluate_run(directory: Path, checkpoint: str, configs: list[TrainConfig], calibrate: int = 0) -> list[Row]:
    """Loss and metrics on the test split under every configuration; appended to ``evaluations.jsonl``.

    Args:
        calibrate: training batches from which BatchNorm's running statistics are estimated again; 0 keeps the run's.

    Raises:
        UserError: if the run has no such checkpoint, or its network does not fit the data set or solver.
    """
    rows = []
    for config in configs:
        rows.append(evaluated(directory, checkpoint, config, calibrate))
        append_line(directory / "evaluations.jsonl", rows[-1])
    return rows


def evaluated(directory: Path, checkpoint: str, config: TrainConfig, calibrate: int = 0, show: bool = True) -> Row:
    """One row of ``evaluate_run``, which is not recorded; ``show`` draws a progress bar."""
    trained = typed(read_config(directory))
    if trained.model.block == "residual" and (config.solver.name, config.solver.n_steps) != ("euler", 1):
        raise UserError(f"{directory}: has residual blocks, which are one Euler step; leave out solver settings")
    if trained.model.statistics == "by_time" and config.model.statistics != "by_time" and not calibrate:
        why = "this run has by_time, which is not a single set; estimate one from training batches with calibrate=50"
        raise UserError(f"model.statistics={config.model.statistics}: {why}")
    outputs, own = (output_size(c.dataset) for c in (config, trained))
    if outputs != own:
        what = "classes" if config.task.name == "classification" else "components"
        why = f"has {outputs} {what}, and this run's network has {own}; choose a data set with {own}"
        raise UserError(f"dataset={config.dataset.name}: {why}")
    run = load_run(directory, checkpoint, config)
    device = build_device(config.runtime)
    set_backends(config.runtime)
    assembly = assemble(config, build_data(config.dataset, device))
    network, data = assembly.network, assembly.data
    network.load_state_dict(run.network.state_dict())
    size = evaluation_batch_size(config, device)
    total = -(-data.size("test") // size)
    name = config.solver.describe()
    batches = data.evaluation("test", size)
    try:
        if calibrate:
            if not any(isinstance(m, nn.BatchNorm2d) for m in network.modules()):
                raise UserError(f"calibrate={calibrate}: this network has no BatchNorm to estimate; leave it out")
            calibrate_norms(network, assembly.autocast, islice(data.epoch(1).starting_at(0), calibrate))
        shown = bar(total, name, iterable=batches) if show else batches
        metrics = evaluate(network, assembly.autocast, assembly.task, shown)
    except SolveFailed as error:
        raise UserError(f"{directory}, {name}: {error}") from error
    anew = f", {calibrate} batches anew" if calibrate else ""
    row: Row = {"checkpoint": checkpoint, "epoch": run.epoch, "dataset": config.dataset.name}
    row |= {assembly.task.unit: data.size("test"), "solver": config.solver.name}
    row |= {"n_steps": None if config.solver.adaptive else config.solver.n_steps}
    row |= {"statistics": config.model.statistics + anew}
    row |= {"nfe": sum(e.forward for e in take_evaluations(network)) // total}
    return row | {f"test_{metric}": x for metric, x in metrics.items()}
