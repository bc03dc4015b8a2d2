"""``train``: one run, a sweep of them, or a recorded run continued."""

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from anode_exp.commands.arguments import PROGRAM, help_text, own_settings, version
from anode_exp.commands.launch import enter_job, join, launched, run_by_hydra
from anode_exp.config.change import resumed
from anode_exp.config.check import split_settings, typed
from anode_exp.config.compose import composed_settings, jobs, quoted
from anode_exp.config.describe import CONF, PRESETS, described, files_of, groups, options
from anode_exp.config.schema import ResumeSettings, TrainConfig
from anode_exp.errors import OtherProcessFailed, UserError, fail, is_first_process
from anode_exp.records.reading import write_json

log = logging.getLogger(__name__)

ABOUT = "one run, on CUDA if available; with -m a sweep; with resume=DIR a recorded run is continued"
SWEEP = "run every combination of the settings that list several values: gradient=full_backprop,revolve"
FLAGS = [
    ("-m, --multirun", SWEEP),
    ("-c, --cfg job", "print the configuration that would run, and run nothing"),
    ("-h, --help", "this page, with the values that the given settings lead to"),
    ("--hydra-help", "Hydra's own flags"),
]
EXAMPLES = (
    "train experiment=digits                     # a small real run, no download",
    "train model=squeezenext solver=rk2          # the paper's network on CIFAR-10",
    "train -m model=resnet18,squeezenext gradient=full_backprop,dto_checkpoint,reverse_adjoint",
    "train model=squeezenext seeds=5             # five seeds at once on one GPU",
    "train resume=outputs/DATE/TIME              # after a kill; with recipe.epochs=… for more",
)


def help_page(overrides: list[str]) -> str:
    config = composed_settings(overrides)
    choices = [(f"{g}:", ", ".join(options(g))) for g in groups()]
    chosen = [(g, config[g].name) for g in groups() if g not in PRESETS]
    files = [CONF / "train.yaml", *(file for g, name in chosen for file in files_of(g, name))]
    place = ("hydra.run.dir=outputs/DATE/TIME", "where the run is recorded; with -m hydra.sweep.dir")
    settings = [place, *own_settings(ResumeSettings), *described(config, files)]
    parts = [(f"groups, described by: {PROGRAM} list", choices), ("settings", settings), ("flags", FLAGS)]
    return help_text("train [-m] [GROUP=OPTION …] [KEY=VALUE …]", f"Train: {ABOUT}.", parts, EXAMPLES)


def main(arguments: list[str]) -> None:
    if any(a.startswith("resume=") for a in arguments):
        if "-h" in arguments or "--help" in arguments:
            print(help_page([]))
            return
        resume(*split_settings(ResumeSettings, arguments, "train resume=DIR"))
        return
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    parser.prog = f"{PROGRAM} train"

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message}; see {parser.prog} --help")

    parser.error = refuse  # type: ignore[method-assign]
    if "--version" in arguments:  # Hydra's parser would answer with its own
        print(version())
        return
    parsed = parser.parse_intermixed_args(arguments)
    if parsed.help:
        print(help_page(parsed.overrides))
        return
    for flag in ("run", "shell_completion", "config_path", "config_name", "config_dir", "experimental_rerun"):
        if getattr(parsed, flag):
            raise UserError(f"--{flag.replace('_', '-')}: not a flag of train; see {parser.prog} --help")
    for key in (a.partition("=")[0].lstrip("+") for a in parsed.overrides):
        if key == "hydra.mode":
            raise UserError("hydra.mode: give -m for a sweep")
        of_sweeps = key in ("hydra/launcher", "hydra/sweeper") or key.startswith(("hydra.launcher.", "hydra.sweeper."))
        if of_sweeps and not parsed.multirun and not parsed.cfg:
            raise UserError(f"{key}: is for sweeps; add -m")
    flags = [a for a in arguments if a not in parsed.overrides]
    ours: list[str] = []
    if not parsed.hydra_help:
        # All jobs are checked before Hydra runs the first one: a mistake in the last job stops the whole sweep.
        asked = jobs(parsed.overrides, parsed.multirun)
        if parsed.multirun:  # a job may start in another folder
            parsed.overrides = [a for a in parsed.overrides if not a.startswith("hydra.sweep.dir=")]
            ours.append(f"hydra.sweep.dir={quoted(asked.directory.absolute())}")
        elif not asked.given:
            ours.append(f"hydra.run.dir={asked.directory}")
        if launched():
            if parsed.multirun:
                raise UserError("-m: torchrun starts the processes of one run; start it once for each job")
            world = join(asked.configs[0])
            if not asked.given:  # one folder, named by the first process
                ours[-1] = f"hydra.run.dir={world.gather(str(asked.directory))[0]}"
            if world.rank:
                ours.append("hydra.output_subdir=null")
        if parsed.multirun:  # the folders of a sweep's jobs are named by what varies
            ours.append(f"hydra.job.config.override_dirname.exclude_keys=[{','.join(asked.fixed)}]")
    rows: list[dict[str, Any]] = []
    try:
        run_by_hydra(run_job, parser.prog, [*ours, *parsed.overrides, *flags])
    finally:
        several = not parsed.hydra_help and (parsed.multirun or asked.configs[0].seeds > 1)
        if several and asked.directory.is_dir():
            from anode_exp.report.sweep import sweep_rows, sweep_table

            rows = sweep_rows(asked.directory)
            print(f"\n{sweep_table(asked.directory, rows)}")
    failed = [row for row in rows if row["status"] == "failed"]
    if failed:
        print(f"{len(failed)} of {len(asked.configs)} jobs failed", file=sys.stderr)
        sys.exit(2 if all(row["mistake"] for row in failed) else 1)


def resume(own: ResumeSettings, overrides: list[str]) -> None:
    from anode_exp.report.sweep import runs_of_seeds, sweep_rows, sweep_table

    if not own.resume:
        raise UserError("resume=: give the folder of a run, such as outputs/DATE/TIME")
    directory = Path(own.resume)
    folders = runs_of_seeds(directory)
    begun = [folder for folder in folders if (folder / "config.yaml").exists()]
    if not begun:
        folders = begun = [directory]
    configs = {folder: resumed(folder, overrides) for folder in begun}
    # A seed that had not begun when the process ended begins now.
    runs = [(configs.get(f) or replace(configs[begun[0]], seed=int(f.name.rpartition("-")[2])), f) for f in folders]

    from anode_exp.commands.together import train_together

    world = join(runs[0][0])
    if world.size > 1 and len(runs) > 1:
        raise UserError(f"{directory}: holds {len(runs)} runs; torchrun trains one, such as {folders[0]}")
    try:
        results = train_together(runs, resume=True, world=world)
    except OtherProcessFailed as error:
        _gone(error, directory)
    if len(runs) > 1:
        print(f"\n{sweep_table(directory, sweep_rows(directory))}")
    exit_by_signal(results)


def _gone(error: OtherProcessFailed, directory: Path) -> NoReturn:
    print(f"anode_exp: {error}; continue with the same torchrun command and train resume={directory}", file=sys.stderr)
    sys.exit(1)


def exit_by_signal(results: list[dict[str, Any]]) -> None:
    """Exit with 128 plus the number of the signal that interrupted a run, if there was one."""
    for result in results:
        if result["signal"] is not None:
            sys.exit(128 + result["signal"])


def seed_runs(config: TrainConfig, directory: Path) -> list[tuple[TrainConfig, Path]]:
    """The runs that a configuration asks for: one in the directory, or one per seed, each in its own folder."""
    if config.seeds == 1:
        return [(config, directory)]
    seeds = range(config.seed, config.seed + config.seeds)
    return [(replace(config, seed=s, seeds=1), directory / f"{i}_seed-{s}") for i, s in enumerate(seeds)]


def run_job(config: DictConfig) -> None:
    """Train in Hydra's output directory. A failed job of a sweep is recorded and logged, and the others continue."""
    from anode_exp.commands.together import train_together

    hydra = HydraConfig.get()
    directory = Path(hydra.runtime.output_dir)
    runs = seed_runs(typed(config), directory)
    again = enter_job()
    try:
        begun = again and any((folder / "config.yaml").exists() for _, folder in runs)
        results = train_together(runs, resume=begun, world=join(runs[0][0]))
    except OtherProcessFailed as error:
        _gone(error, directory)
    except Exception as error:
        mistake = isinstance(error, UserError)
        if hydra.mode == RunMode.RUN:
            if mistake:
                fail(str(error))
            raise
        reason = str(error) if mistake else f"{type(error).__name__}: {error}".splitlines()[0]
        log.error(f"{directory.name} failed: {reason}\n  see {runs[0][1] / 'train.log'}", exc_info=not mistake)
        record = {"status": "failed", "error": reason, "mistake": mistake}
        for _, folder in runs if is_first_process() else ():
            if not (folder / "results.json").exists():
                write_json(folder / "results.json", record)
        return
    exit_by_signal(results)
