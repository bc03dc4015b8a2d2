"""The command line: a verb, then Hydra overrides."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any

from anode_exp.errors import UserError, fail

# Threads that wait for the next of thousands of small kernels: sleeping at once makes a step up to 3 times slower on a
# CPU, spinning for long up to 20 times slower beside another busy process. Read by OpenMP when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

HELP = """\
anode_exp trains neural-ODE image classifiers and measures what each gradient mode costs.

usage: python -m anode_exp VERB [settings]

  train                one run, on CUDA where there is one
  train -m             a sweep over the values that settings list: gradient=dto_checkpoint,reverse_adjoint
  train seeds=5        so many seeds at once on one device
  train resume=DIR     go on with a run that was interrupted, or for more epochs
  evaluate run=DIR     accuracy of a trained run, also under another solver, steps and data set
  study NAME           memory, budget, gradient_error, reversibility, evolution, batchnorm: a measurement, table, plot
  bench compare=[…]    time training steps of several compositions in turn, and of usual ways to train
  reproduce anode      a paper's figures and table, run by run; goes on where it stopped; also anodev2
  report anode         curves and tables of those runs beside the paper's, as one page
  list                 models, solvers, gradient modes, data sets and presets

  python -m anode_exp train experiment=digits                  a small real run, no download
  python -m anode_exp train model=squeezenext solver=rk2       the paper's network on CIFAR-10
  python -m anode_exp train --help                             every setting
  tensorboard --logdir outputs                                 watch
"""


def run_train(arguments: list[str]) -> None:
    if any(a.startswith("resume=") for a in arguments):
        run_resume(arguments)
        return
    import hydra
    from hydra._internal.utils import get_args_parser

    from anode_exp.composition import CONF, jobs
    from anode_exp.job import run_job

    parser = get_args_parser()
    parser.prog = "python -m anode_exp train"
    parsed = parser.parse_intermixed_args(arguments)
    flags = [a for a in arguments if a not in parsed.overrides]
    ours: list[str] = []
    if not parsed.hydra_help:
        # All of it once before Hydra runs any of it: a mistake in the last job of a sweep stops the first.
        asked = jobs(parsed.overrides, parsed.multirun)
        if not asked.given:
            ours.append(f"hydra.{'sweep' if parsed.multirun else 'run'}.dir={asked.directory}")
        if parsed.multirun:  # the folders of a sweep's jobs are named by what varies
            ours.append(f"hydra.job.config.override_dirname.exclude_keys=[{','.join(asked.fixed)}]")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises what a job raised, for `main` to report
    sys.argv = [parser.prog, *ours, *parsed.overrides, *flags]
    rows: list[dict[str, Any]] = []
    task = hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")(run_job)
    if parsed.help:
        with redirect_stdout(StringIO()) as text, suppress(SystemExit):
            task()
        print(text.getvalue().replace("_common, ", ""), end="")  # what options share is none of them
        return
    try:
        task()
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


def _take(arguments: list[str], *names: str) -> tuple[dict[str, str], list[str]]:
    """The named key=value arguments, and the rest."""
    taken = {a.partition("=")[0]: a.partition("=")[2] for a in arguments if a.partition("=")[0] in names}
    rest = [a for a in arguments if a.partition("=")[0] not in names]
    for a in rest:
        if a.startswith("-"):
            raise UserError(f"{a}: takes no flags beside {names[0]}=DIR")
    return taken, rest


def run_resume(arguments: list[str]) -> None:
    from anode_exp.composition import resumed
    from anode_exp.report.sweep import runs_of_seeds, sweep_rows, sweep_table

    taken, overrides = _take(arguments, "resume")
    directory = Path(taken["resume"])
    folders = [f for f in runs_of_seeds(directory) if (f / "config.yaml").exists()] or [directory]
    runs = [(resumed(folder, overrides), folder) for folder in folders]

    from anode_exp.train import train_together  # imports torch

    results = train_together(runs, resume=True)
    if len(runs) > 1:
        print(f"\n{sweep_table(directory, sweep_rows(directory))}")
    for result in results:
        if result["signal"] is not None:
            sys.exit(128 + result["signal"])


def run_evaluate(arguments: list[str]) -> None:
    from anode_exp.composition import evaluations

    taken, overrides = _take(arguments, "run", "checkpoint", "calibrate")
    calibrate = taken.get("calibrate", "0")
    if not calibrate.isdecimal():
        raise UserError(f"calibrate={calibrate}: give a number of training batches, such as 50")
    if not taken.get("run"):
        raise UserError("evaluate: needs run=DIR, the folder of a trained run, such as outputs/DATE/TIME")
    directory = Path(taken["run"])
    configs = evaluations(directory, overrides)

    from anode_exp.evaluate import evaluate_run, table  # imports torch

    print(table(evaluate_run(directory, taken.get("checkpoint", "best"), configs, int(calibrate))))


def run_study(arguments: list[str]) -> None:
    from anode_exp.composition import options, study

    if not arguments or "=" in arguments[0] or arguments[0].startswith("-"):
        raise UserError(f"study: needs the name of one; there are {', '.join(options('study'))}")
    taken, overrides = _take(arguments[1:], "run", "checkpoint")
    config, settings = study(arguments[0], [*overrides, *(f"study.{k}='{v}'" for k, v in taken.items())])

    from anode_exp.study import run_study  # imports torch

    run_study(config, settings)


def run_bench(arguments: list[str]) -> None:
    from anode_exp.composition import bench_entries

    entries, rounds = bench_entries(arguments)

    from anode_exp.bench import run_bench  # imports torch

    run_bench(entries, rounds)


def run_reproduce(arguments: list[str]) -> None:
    from anode_exp.composition import options
    from anode_exp.reproduction import cells

    if not arguments or "=" in arguments[0] or arguments[0].startswith("-"):
        raise UserError(f"reproduce: needs the name of a paper; there are {', '.join(options('reproduce'))}")
    asked = cells(arguments[0], arguments[1:])

    from anode_exp.reproduce import reproduce  # imports torch

    sys.exit(reproduce(asked))


def run_report(arguments: list[str]) -> None:
    from anode_exp.composition import composed, options
    from anode_exp.reproduction import cells, directories, specification

    taken = {a.partition("=")[0]: a.partition("=")[2] for a in arguments[1:]}
    if not arguments or "=" in arguments[0] or arguments[0].startswith("-"):
        raise UserError(f"report: needs the name of a paper; there are {', '.join(options('reproduce'))}")
    for key in taken.keys() - {"length", "directory", "to", "seeds"}:
        raise UserError(f"{key}: report takes length=, directory=, to= and seeds=")
    paper, length = arguments[0], taken.get("length", "paper")
    expected = cells(paper, [f"{k}={taken[k]}" for k in ("length", "seeds") if k in taken])
    places = directories(paper, length, Path(taken.get("directory") or "outputs"))

    from anode_exp.report.paper import COPIES, copy_records, read_records, write_report

    records = [r for r in read_records(*places) if r.cell["length"] == length]
    if not records:
        raise UserError(
            f"{places[0]}: holds no runs of {paper} at length={length}; make some with: python -m anode_exp reproduce "
            f"{paper} length={length}"
        )
    target = Path(taken.get("to") or places[0] / "report")
    given = shlex.join(f"{k}={taken[k]}" for k in ("length", "directory") if k in taken)
    commands = {
        (c.shown_in, c.method, c.seed): f"python -m anode_exp reproduce {paper} figure={c.shown_in} method={c.method} "
        f"'seeds=[{c.seed}]' {given}".rstrip()
        for c in expected
        if c.method is not None
    }
    epochs = "every experiment's whole recipe"
    if length != "paper":
        epochs = f"{composed([f'length={length}']).recipe.epochs} epochs"
    page = write_report(specification(paper), length, epochs, records, commands, target)
    if "to" in taken:
        copy_records(records, target / COPIES)
    print((target / "README.md").read_text())
    print(page)


def run_list(arguments: list[str]) -> None:
    from anode_exp.composition import catalogue

    if arguments:
        raise UserError(f"{arguments[0]}: list takes no settings")
    print(catalogue())


VERBS: dict[str, Callable[[list[str]], None]] = {
    "train": run_train,
    "evaluate": run_evaluate,
    "study": run_study,
    "bench": run_bench,
    "reproduce": run_reproduce,
    "report": run_report,
    "list": run_list,
}


def main() -> None:
    """Entry point of ``python -m anode_exp`` and ``anode-exp``.

    Exit codes: 0 completed or diverged, 1 a bug, 2 the user's mistake, 130 and 143 interrupted.
    """
    verb, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if verb in ("-h", "--help", "help"):
        print(HELP, end="")
        return
    try:
        if not verb:
            raise UserError(f"no verb given; verbs are {', '.join(VERBS)}; see python -m anode_exp --help")
        if verb not in VERBS:
            from anode_exp.composition import near

            hint = f"; did you mean: python -m anode_exp train {verb} …" if "=" in verb or verb.startswith("-") else ""
            raise UserError(f"{verb}: no such verb; verbs are {', '.join(VERBS)}{hint or near(verb, VERBS)}")
        VERBS[verb](arguments)
    except UserError as error:
        fail(str(error))
    except OSError as error:
        if error.filename is None:
            raise
        fail(f"{error.filename}: {error.strerror}; choose another folder or make room")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
