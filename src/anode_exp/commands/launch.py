"""Processes that torchrun or a launcher of Hydra started: who they are, and handing a reproduction's runs to them."""

import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, update_wrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from anode_exp.config.check import check_shared
from anode_exp.config.compose import quoted
from anode_exp.config.describe import CONF
from anode_exp.config.reproduction import Cell
from anode_exp.config.schema import TrainConfig
from anode_exp.errors import UserError
from anode_exp.records.reading import read_metrics, write_json
from anode_exp.training import progress

if TYPE_CHECKING:
    from anode_exp.training.world import World

LOOK_EVERY_S = 5.0


def launched() -> bool:
    """Whether torchrun, or what sets the same variables, started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def join(config: TrainConfig) -> "World":
    """The processes that torchrun started, and that share every batch; UserError for what they cannot share."""
    from anode_exp.training import world

    if not launched():
        return world.ALONE
    check_shared(config, int(os.environ["WORLD_SIZE"]))
    joined = world.join(config.runtime.device == "cpu")
    if joined.rank:
        progress.say_nothing()
    return joined


def enter_job() -> bool:
    """Take up a job's place: the folder of its command; several tasks of a cluster's job become processes of one run.

    Returns:
        Whether the launcher starts a job again that was stopped or killed: it then goes on where it was.
    """
    hydra = HydraConfig.get()
    os.chdir(hydra.runtime.cwd)  # Ray's processes begin elsewhere
    launcher = str(hydra.launcher.get("_target_", ""))
    if "submitit" in launcher:
        import submitit
        from submitit.helpers import TorchDistributedEnvironment

        if submitit.JobEnvironment().num_tasks > 1:  # hydra.launcher.tasks_per_node
            TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
    return "submitit" in launcher or "ray" in launcher


def run_by_hydra(job: Callable[[DictConfig], None], program: str, arguments: list[str]) -> None:
    """Start a job, or with ``-m`` the jobs of a sweep, as Hydra's command line asks.

    Raises:
        UserError: if the launcher's cluster is not there.
    """
    import hydra

    if "hydra/launcher=slurm" in arguments and "-m" in arguments and shutil.which("srun") is None:
        raise UserError("launcher slurm: this machine has no Slurm (srun); submitit_local starts such jobs on it")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises what a job raised, for the caller to report
    sys.argv = [program, *arguments]
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")(job)()
    except ConnectionError as error:
        if type(error) is not ConnectionError:  # a pipe that was closed, say
            raise
        remedy = "start it with ray start --head, or leave out hydra.launcher.ray.init.address"
        raise UserError(f"launcher ray: no cluster answers; {remedy}") from error


def launch(cells: list[Cell], settings: list[str], folder: Path) -> list[dict[str, Any]]:
    """A job for each cell, as many at once as the launcher lets; returns when all have ended.

    Args:
        settings: Hydra's, with the launcher.
        folder: how each job ended is written there, and what the launcher writes itself.

    Returns:
        Of each job ``error``, None if nothing failed; ``mistake``, whether the user can mend it; and ``signal``, the
        number of the one that interrupted it, or None.
    """
    jobs = {f"{cell.figure}/{cell.directory.name}": (cell, folder.absolute()) for cell in cells}
    for name in jobs:
        _ending(folder, name).unlink(missing_ok=True)
    own = ["hydra.output_subdir=null", "hydra.sweep.subdir=.", f"hydra.sweep.dir={quoted(folder.absolute())}"]
    with _epochs_shown(cells):
        job = update_wrapper(partial(_run_job, jobs), _run_job)
        run_by_hydra(job, "reproduce", ["-m", *own, *settings, f"+cell={','.join(jobs)}"])
    endings = []
    for name, (cell, _) in jobs.items():
        path, unknown = _ending(folder, name), f"{cell.name}: the job ended and did not say how; see {folder}"
        known = path.exists()
        endings.append(json.loads(path.read_text()) if known else {"error": unknown, "mistake": False, "signal": None})
    return endings


def _ending(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"


def _run_job(jobs: dict[str, tuple[Cell, Path]], config: DictConfig) -> None:
    """What a job does: it trains or studies one cell. Nothing that goes wrong in it stops the other jobs."""
    from anode_exp.commands.reproduce import run_group
    from anode_exp.training.signals import stop_requests

    enter_job()
    cell, folder = jobs[config.cell]
    failed: list[tuple[str, bool]] = []
    with stop_requests() as stop:
        run_group([cell], failed, lambda: None, stop)
    if os.environ.get("RANK", "0") == "0":
        error, mistake = failed[0] if failed else (None, False)
        path = _ending(folder, config.cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"error": error, "mistake": mistake, "signal": stop.signal})


@contextmanager
def _epochs_shown(cells: list[Cell]) -> Iterator[None]:
    """A bar of the epochs that the jobs have recorded."""
    runs = [cell for cell in cells if cell.config is not None]
    ended = threading.Event()

    def recorded() -> int:
        return sum(len(read_metrics(cell.directory)) for cell in runs)

    with progress.bar(sum(c.config.recipe.epochs for c in runs if c.config), "all runs", recorded()) as shown:

        def look() -> None:
            while not ended.wait(LOOK_EVERY_S):
                shown.update(recorded() - shown.n)

        watch = threading.Thread(target=look, daemon=True)
        if not shown.disable:
            watch.start()
        try:
            yield
        finally:
            ended.set()
            if watch.is_alive():
                watch.join()
