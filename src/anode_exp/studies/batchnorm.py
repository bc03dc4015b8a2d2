"""BatchNorm statistics by time compared with one set for all times, for a run's kept epochs."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from anode_exp.config.check import read_config, typed
from anode_exp.config.schema import StudyConfig, TrainConfig
from anode_exp.errors import UserError
from anode_exp.records.checkpoints import Checkpoints
from anode_exp.records.reading import Row, read_metrics
from anode_exp.runs import evaluated
from anode_exp.training.progress import bar


def kept_epochs(directory: Path) -> list[int]:
    """A run's epochs whose networks were kept; UserError if there are none, or if its ODE blocks have no BatchNorm."""
    config = typed(read_config(directory))
    if config.model.block != "ode" or config.model.field_norm != "batch":
        remedy = "give a run with model.field_norm=batch, block=ode"
        raise UserError(f"{directory}: has no BatchNorm in ODE blocks; {remedy}")
    epochs = Checkpoints(directory / "checkpoints").epochs()
    if not epochs:
        raise UserError(f"{directory}: kept no epochs; train with runtime.keep_every=1")
    return epochs


def both_ways(directory: Path, epoch: int, calibrate: int, here: TrainConfig) -> Row:
    """Test accuracy of one kept epoch's network with statistics by time and with one set.

    Statistics that the run kept while it trained are as recorded; the others are estimated from training batches.

    Args:
        here: gives the device and the folder of data.

    Returns:
        Accuracies in [0, 1]: ``by_time``; ``one_set_kept``, None where the run kept statistics by time;
        ``one_set_anew``, from the same number of batches as those by time; ``train_accuracy``, of the epoch's batches
        by their own statistics.
    """
    config = typed(read_config(directory))
    data = replace(config.dataset, root=here.dataset.root, download=here.dataset.download)
    config = replace(config, runtime=replace(config.runtime, device=here.runtime.device), dataset=data)
    (recorded,) = [line for line in read_metrics(directory) if line["epoch"] == epoch]
    by_time = config.model.statistics == "by_time"

    def anew(statistics: str) -> float:
        changed = replace(config, model=replace(config.model, statistics=statistics))
        return float(evaluated(directory, str(epoch), changed, calibrate, show=False)["test_accuracy"])

    row: Row = {"run": directory.name, "model": config.model.name, "solver": config.solver.describe()}
    row |= {"statistics": config.model.statistics}
    row |= {name: recorded[name] for name in ("epoch", "train_loss", "train_accuracy")}
    row |= {"by_time": recorded["test_accuracy"] if by_time else anew("by_time")}
    row |= {"one_set_kept": None if by_time else recorded["test_accuracy"], "one_set_anew": anew("forward")}
    return row


def rows(config: TrainConfig, study: StudyConfig, outputs: int, batch: None, directory: Path) -> Iterator[Row]:
    runs = [(folder, kept_epochs(folder)) for folder in map(Path, (study.run or "").split(","))]
    with bar(sum(len(epochs) for _, epochs in runs), study.name) as progress:
        for folder, epochs in runs:
            for epoch in epochs:
                yield both_ways(folder, epoch, study.calibrate, config)
                progress.update()
