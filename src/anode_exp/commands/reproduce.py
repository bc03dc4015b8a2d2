"""``reproduce PAPER``: the runs of a paper that are still missing."""

import itertools
import json
import logging
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from anode_exp.commands.arguments import Parser, help_text, own_settings
from anode_exp.commands.evaluate import table
from anode_exp.commands.launch import join, launch
from anode_exp.config.change import differing, evaluations, may_change_on_resume
from anode_exp.config.check import read_config, split_settings, typed
from anode_exp.config.compose import compose_line, composed
from anode_exp.config.describe import about, options
from anode_exp.config.reproduction import Cell, cells, directories, specification
from anode_exp.config.schema import ReproduceSettings, TrainConfig
from anode_exp.config.studies import study
from anode_exp.errors import Ended, InUse, UserError, is_first_process
from anode_exp.records.cells import CALIBRATION_BATCHES, is_calibrated, other_statistics
from anode_exp.records.claim import claim
from anode_exp.records.reading import read_lines, read_metrics, read_results, write_atomically
from anode_exp.training.progress import bar
from anode_exp.training.signals import StopRequest, stop_requests

log = logging.getLogger(__name__)

ABOUT = "a paper's figures and tables, run by run; continues where it stopped"


def main(arguments: list[str]) -> None:
    parsed = Parser("reproduce", "paper").parse_intermixed_args(arguments)
    if parsed.help:
        print(paper_help("reproduce", ABOUT, parsed.paper))
        return
    of_launcher = [a for a in parsed.settings if a.startswith("hydra.launcher.")]
    settings = [a for a in parsed.settings if a not in of_launcher]
    found = cells(paper_name("reproduce", parsed.paper), settings)
    own, _ = split_settings(ReproduceSettings, settings, "reproduce")
    if own.launcher is None:
        if of_launcher:
            raise UserError(f"{of_launcher[0]}: is for jobs in parallel; add launcher=NAME")
        sys.exit(reproduce(found))
    launcher = [f"hydra/launcher={own.launcher}", *of_launcher]
    compose_line(launcher)  # checks the settings
    sys.exit(reproduce_by_jobs(found, launcher, directories(parsed.paper, own.length, Path(own.directory))[0]))


def paper_name(verb: str, given: str | None) -> str:
    """The paper that was named; UserError if none was."""
    if given is None or "=" in given:
        folders = "" if verb == "reproduce" else "; or folders of runs, such as outputs/DATE"
        raise UserError(f"{verb}: needs the name of a paper; papers are {', '.join(options('reproduce'))}{folders}")
    return given


def paper_help(verb: str, text: str, paper: str | None, schema: type = ReproduceSettings) -> str:
    """Help of a verb about papers; with a paper, its figures and methods."""
    papers = options("reproduce")
    if paper is None or "=" in paper:
        parts = [("papers", [(p, about("reproduce", p).line) for p in papers])]
        paper = papers[0]
    else:
        spec = specification(paper)
        parts = [
            ("figures", [(f"figure={name}", figure["title"]) for name, figure in spec["figures"].items()]),
            ("methods", [(f"method={name}", method["label"]) for name, method in spec["methods"].items()]),
        ]
    examples, notes = [f"{verb} {paper} length=short seeds=1"], ""
    if verb == "reproduce":
        of_figure = f"reproduce {paper} figure=table_resnet4"
        examples += [f"{of_figure} seeds=3 length=short", f"{of_figure} runtime.precision=bf16"]
        notes = "All other settings of train apply to every run."
    else:
        examples += [f"{verb} outputs/DATE outputs/DATE/TIME", f"{verb} outputs/DATE to=page"]
        notes = (
            "A report of folders shows their runs, of any task, grouped by the settings that vary; it takes only to=."
        )
    parts.append(("settings", own_settings(schema)))
    usage = "PAPER" if verb == "reproduce" else "PAPER | DIR …"
    return help_text(f"{verb} {usage} [KEY=VALUE …]", f"{verb.capitalize()}: {text}.", parts, examples, notes)


def is_done(cell: Cell) -> bool:
    """Whether a cell's run is completed or diverged; UserError if the folder holds a run with other settings."""
    if cell.config is None:  # cell.json is written last
        path = cell.directory / "cell.json"
        if not path.exists():
            return False
        recorded = json.loads(path.read_text())["settings"]
        if cell.of_runs:
            return bool(recorded == with_runs(cell).settings)
        if _measured(recorded) != _measured(cell.settings):
            raise UserError(f"{cell.directory}: holds a study with other settings; give directory= for another")
        return True
    if not (cell.directory / "config.yaml").exists():
        return False
    # Training does not depend on the running statistics, and a run is evaluated with both kinds. A resumed run may have
    # changed some settings: of these, what it began with is compared.
    recorded = beginning = typed(read_config(cell.directory))
    if (path := cell.directory / "cell.json").exists():
        began = json.loads(path.read_text())["settings"]
        beginning = cell.config if began == cell.settings else composed(began)
    other = {k for k in differing(recorded, cell.config) if not may_change_on_resume(k)}
    other |= {k for k in differing(beginning, cell.config) if may_change_on_resume(k)}
    other.discard("model.statistics")
    if other:
        remedy = "give directory= for a new reproduction"
        raise UserError(f"{cell.directory}: holds a run with another {', '.join(sorted(other)[:3])}; {remedy}")
    results = read_results(cell.directory)
    return results is not None and results["status"] in ("completed", "diverged")


def _measured(settings: list[str]) -> list[str]:
    """The settings that change what a study measures."""
    return [s for s in settings if not s.startswith(("dataset.root=", "dataset.download=", "runtime.device="))]


def with_runs(cell: Cell) -> Cell:
    """A study of a figure's runs with the completed ones in its settings; any other cell unchanged."""
    folders = sorted(path.parent for path in cell.directory.glob("*_seed-*/results.json"))
    ended = [str(f) for f in folders if cell.of_runs and (read_results(f) or {}).get("status") == "completed"]
    return replace(cell, settings=[f"study.run='{','.join(ended)}'", *cell.settings]) if ended else cell


def recorded_config(cell: Cell) -> TrainConfig | None:
    """A cell's configuration; if its run has begun, with that run's statistics, gradient mode and precision."""
    config = cell.config
    if config is None or not (cell.directory / "config.yaml").exists():
        return config
    of = typed(read_config(cell.directory))
    model = replace(config.model, statistics=of.model.statistics)
    runtime = replace(config.runtime, precision=of.runtime.precision)
    return replace(config, model=model, gradient=of.gradient, runtime=runtime)


def lacks_calibration(cell: Cell) -> bool:
    """Whether a completed run of an ODE network still lacks its evaluation with the other BatchNorm statistics."""
    config, results = recorded_config(cell), read_results(cell.directory)
    if config is None or results is None or results["status"] != "completed":
        return False
    if config.task.name != "classification" or config.model.block != "ode" or config.model.field_norm != "batch":
        return False
    rows = read_lines(cell.directory / "evaluations.jsonl")
    return not config.solver.adaptive and not any(is_calibrated(row, config, results["epochs"]) for row in rows)


def missing(cells: list[Cell]) -> list[Cell]:
    """The cells without a record, in order, then the studies of runs whose figures will get more runs."""
    todo = [cell for cell in cells if not is_done(cell) or lacks_calibration(cell)]
    changing = {cell.directory.parent for cell in todo}  # figures that will get runs that their studies lack
    return todo + [cell for cell in cells if cell.of_runs and cell.directory in changing and cell not in todo]


def reproduce(cells: list[Cell]) -> int:
    """Run the missing cells, continue the interrupted ones, skip those that are recorded with the same settings.

    On CUDA the seeds of one figure and method run at once. A run that another process is writing is skipped. A failed
    run does not stop the others. An optional run is left out if the file of its data set is missing.

    Returns:
        The exit code: 0 on success; 2 if every failure is a mistake that the user can fix, else 1; 128 plus the number
        of the signal that interrupted.
    """
    cells = list({cell.directory: cell for cell in cells}.values())  # figures may share some
    todo = missing(cells)
    print(f"{len(cells) - len(todo)} of {len(cells)} runs are recorded, {len(todo)} to go")
    failed: list[tuple[str, bool]] = []  # and whether the user can fix it
    groups, done_epochs = _together(todo), sum(map(_epochs, cells))
    epochs = sum(c.config.recipe.epochs for c in cells if c.config is not None)
    with stop_requests() as stop, bar(epochs, "all runs", done_epochs) as progress:
        for position, group in enumerate(groups, 1):
            # Another process may have run some meanwhile.
            group = [cell for cell in group if not is_done(cell) or lacks_calibration(cell)]
            if not group:
                continue
            left = [[cell for cell in later if not is_done(cell)] for later in groups[position - 1 :]]
            names = "; ".join(cell.name for cell in group)
            progress.write(f"\n[{position} of {len(groups)}] {names}{_time_to_go(cells, left)}", file=sys.stdout)
            sys.stdout.flush()
            run_group(group, failed, progress.update, stop)
            if stop.signal is not None:
                return 128 + stop.signal
    return _exit_code(failed)


def _exit_code(failed: list[tuple[str, bool]]) -> int:
    for line, _ in failed:
        print(line, file=sys.stderr)
    return 0 if not failed else 2 if all(mistake for _, mistake in failed) else 1


def reproduce_by_jobs(cells: list[Cell], launcher: list[str], folder: Path) -> int:
    """As ``reproduce``, but each missing run is a job of a Hydra launcher.

    A job trains one run; the launcher decides how many share a device. Studies of runs start when all runs have ended.

    Args:
        launcher: overrides for Hydra.
        folder: the folder of the reproduction; the launcher writes to its subfolder ``jobs``.
    """
    cells = list({cell.directory: cell for cell in cells}.values())
    todo = missing(cells)
    print(f"{len(cells) - len(todo)} of {len(cells)} runs are recorded, {len(todo)} to go", flush=True)
    endings: list[dict[str, Any]] = []
    for batch in ([c for c in todo if not c.of_runs], [c for c in todo if c.of_runs]):
        if batch:
            endings += launch(batch, launcher, folder / "jobs")
    if todo:
        print(f"{len(cells) - len(missing(cells))} of {len(cells)} runs are recorded")
    signals = [ending["signal"] for ending in endings if ending["signal"] is not None]
    code = _exit_code([(ending["error"], ending["mistake"]) for ending in endings if ending["error"] is not None])
    return 128 + signals[0] if signals else code


def _together(cells: list[Cell]) -> list[list[Cell]]:
    import torch

    if not torch.cuda.is_available():
        return [[cell] for cell in cells]
    cells = sorted(cells, key=lambda c: (c.of_runs, c.figure, c.method or ""))
    return [list(group) for _, group in itertools.groupby(cells, key=lambda c: (c.figure, c.method))]


def _epochs(cell: Cell) -> int:
    return len(read_metrics(cell.directory)) if cell.config is not None else 0


def run_group(group: list[Cell], failed: list[tuple[str, bool]], tick: Callable[[], object], stop: StopRequest) -> None:
    """Train the cells of a group, or run its study; a failure is logged and appended to ``failed``.

    If a launcher started several processes for a cell, they train it together, and the first does the rest.
    """
    from anode_exp.commands.together import train_together  # imports torch
    from anode_exp.runs import evaluate_run
    from anode_exp.training.world import ALONE

    try:
        config = group[0].config
        world = ALONE if config is None else join(config)
        first = is_first_process()
        for cell in group if first else ():
            cell.directory.mkdir(parents=True, exist_ok=True)
            if cell.study is not None:
                _make_study(cell)
                continue
            with suppress(FileNotFoundError):  # another process has just moved the same file into place
                write_atomically(cell.directory / "cell.json", cell.describe())
        runs = [(config, c.directory) for c in group if (config := recorded_config(c)) is not None and not is_done(c)]
        try:
            if runs:
                train_together(runs, resume=True, tick=tick, stop=stop, world=world)
        finally:  # also for runs that completed when another one failed
            for cell in group if first else ():
                if lacks_calibration(cell) and (config := recorded_config(cell)) is not None:
                    configs = evaluations(cell.directory, [f"model.statistics={other_statistics(config)}"])
                    print(table(evaluate_run(cell.directory, "last", configs, calibrate=CALIBRATION_BATCHES)))
        return
    except (InUse, Ended) as error:  # another process makes it, or has just made it
        print(error)
        return
    except UserError as error:
        if all(cell.optional for cell in group):
            print(f"{group[0].name}: left out; {error}")
            return
        failed.append((str(error), True))
    except OSError as error:  # a folder that cannot be written, a full disk
        failed.append((f"{error.filename or group[0].directory}: {error.strerror}", True))
    except Exception as error:
        traceback.print_exc()
        reason = str(error).splitlines()[0] if str(error) else ""
        failed.append((f"{group[0].name}: {type(error).__name__}: {reason}", False))
    log.error(failed[-1][0])


def _make_study(cell: Cell) -> None:
    """Make a cell's study, unless another process makes it (InUse) or has made it; ``cell.json`` is written last."""
    from anode_exp.studies.study import run_study

    with claim(cell.directory, "study"):
        if is_done(cell):
            return
        whole = with_runs(cell)
        if whole.of_runs and not any(s.startswith("study.run=") for s in whole.settings):
            print(f"{cell.name}: none of its runs is completed")
            return
        assert whole.study is not None
        run_study(*study(whole.study, whole.settings), whole.directory)
        write_atomically(whole.directory / "cell.json", whole.describe())


def _time_to_go(cells: list[Cell], left: list[list[Cell]]) -> str:
    """The estimated time to the end, as text, from the median time of recorded epochs, evaluation included.

    The epochs are those of the same figure and method, else of the figure's slowest other method. The runs of a group
    run at once.
    """
    seconds: dict[tuple[str, str | None], list[float]] = {}
    for recorded in (c for c in cells if c.config is not None):
        for line in read_metrics(recorded.directory):
            taken = line["train_time_s"] + line.get("evaluation_time_s", 0.0)
            seconds.setdefault((recorded.figure, recorded.method), []).append(taken)
    measured = {key: statistics.median(values) for key, values in seconds.items()}
    total, unknown = 0.0, False
    for group in left:
        cell = min(group, key=_epochs, default=None)
        if cell is None or cell.config is None:
            continue
        others = [s for (figure, _), s in measured.items() if figure == cell.figure]
        second = measured.get((cell.figure, cell.method), max(others, default=None))
        if second is None:
            unknown = True
        else:
            total += second * (cell.config.recipe.epochs - _epochs(cell))
    if not total:
        return ""
    ends = time.strftime("%a %H:%M", time.localtime(time.time() + total))
    return f"; {'more than ' if unknown else 'about '}{_duration(total)} to go, until {ends}"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{max(1, minutes)} min"
