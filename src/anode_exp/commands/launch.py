"""Processes started by torchrun or a Hydra launcher, and running a reproduction as jobs of a launcher."""

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
from anode_exp.errors import UserError, is_first_process
from anode_exp.records.reading import read_metrics, write_json
from anode_exp.training import progress

if TYPE_CHECKING:
    from anode_exp.training.world import World

LOOK_EVERY_S = 5.0


def launched() -> bool:
    """Whether this process is one of several, started by torchrun or a program that sets the same variables."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def join(config: TrainConfig) -> "World":
    """Join the processes that torchrun started to share every batch; UserError for settings they cannot share."""
    from anode_exp.training import world

    if not launched():
        return world.ALONE
    check_shared(config, int(os.environ["WORLD_SIZE"]))
    joined = world.join(config.runtime.device == "cpu")
    if joined.rank:
        progress.say_nothing()
    return joined


def enter_job() -> bool:
    """Prepare a job: change to the folder of its command, and make several tasks of a Slurm job processes of one run.

    Returns:
        Whether the launcher restarts a job that was stopped or killed, which then continues from its checkpoint.
    """
    hydra = HydraConfig.get()
    os.chdir(hydra.runtime.cwd)  # Ray's processes start in another folder
    launcher = str(hydra.launcher.get("_target_", ""))
    if "submitit" in launcher:
        import submitit
        from submitit.helpers import TorchDistributedEnvironment

        if submitit.JobEnvironment().num_tasks > 1:  # hydra.launcher.tasks_per_node
            TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
    return "submitit" in launcher or "ray" in launcher


def run_by_hydra(job: Callable[[DictConfig], None], program: str, arguments: list[str]) -> None:
    """Start a job, or with ``-m`` the jobs of a sweep, by Hydra's command line.

    Raises:
        UserError: if the launcher's cluster cannot be reached.
    """
    import hydra

    on_slurm = {"hydra/launcher=slurm", "hydra/launcher=submitit_slurm"} & set(arguments)
    if on_slurm and "-m" in arguments and shutil.which("srun") is None:
        raise UserError("launcher slurm: this machine has no Slurm (srun); use submitit_local to start such jobs here")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises a job's exception, which the caller reports
    sys.argv = [program, *arguments]
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")(job)()
    except ConnectionError as error:
        if type(error) is not ConnectionError:  # such as a closed pipe
            raise
        remedy = "start it with ray start --head, or leave out hydra.launcher.ray.init.address"
        raise UserError(f"launcher ray: no cluster answers; {remedy}") from error


def launch(cells: list[Cell], settings: list[str], folder: Path) -> list[dict[str, Any]]:
    """Run each cell as a job, as many at once as the launcher allows; return when all have ended.

    Args:
        settings: overrides for Hydra, including the launcher.
        folder: for the outcome of each job and the launcher's own files.

    Returns:
        For each job ``error``, None if nothing failed; ``mistake``, whether the user can fix it; and ``signal``, the
        number of the signal that interrupted it, or None.
    """
    jobs = {f"{cell.paper}/{cell.figure}/{cell.directory.name}": (cell, folder.absolute()) for cell in cells}
    for name in jobs:
        _ending(folder, name).unlink(missing_ok=True)
    own = ["hydra.output_subdir=null", "hydra.sweep.subdir=.", f"hydra.sweep.dir={quoted(folder.absolute())}"]
    with _epochs_shown(cells):
        job = update_wrapper(partial(_run_job, jobs), _run_job)
        try:
            run_by_hydra(job, "reproduce", ["-m", *own, *settings, f"+cell={','.join(jobs)}"])
        except UserError:
            raise
        except Exception as error:  # a process was killed, and the launcher gave up; the others may have ended well
            print(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}", file=sys.stderr)
    endings = []
    for name, (cell, _) in jobs.items():
        path, unknown = _ending(folder, name), f"{cell.name}: its job left no result; see {folder}"
        known = path.exists()
        endings.append(json.loads(path.read_text()) if known else {"error": unknown, "mistake": False, "signal": None})
    return endings


def _ending(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"


def _run_job(jobs: dict[str, tuple[Cell, Path]], config: DictConfig) -> None:
    """Run one cell in a job. An error in it does not stop the other jobs."""
    from anode_exp.commands.reproduce import run_group
    from anode_exp.training.signals import stop_requests

    enter_job()
    cell, folder = jobs[config.cell]
    failed: list[tuple[str, bool]] = []
    with stop_requests() as stop:
        run_group([cell], failed, lambda: None, stop)
    if is_first_process():
        error, mistake = failed[0] if failed else (None, False)
        path = _ending(folder, config.cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"error": error, "mistake": mistake, "signal": stop.signal})


@contextmanager
def _epochs_shown(cells: list[Cell]) -> Iterator[None]:
    """Show a progress bar of the epochs that the jobs have recorded."""
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
