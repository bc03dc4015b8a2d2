"""The command line: a verb, then Hydra overrides."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from omegaconf import DictConfig

from anode_exp.errors import UserError

HELP = """\
anode_exp trains neural-ODE image classifiers and measures what each gradient mode costs.

usage: python -m anode_exp VERB [settings]

  train                one run, on CUDA where there is one
  train -m             a sweep over the values that settings list: gradient=dto_checkpoint,reverse_adjoint

  python -m anode_exp train experiment=digits                  a small real run, no download
  python -m anode_exp train model=squeezenext solver=rk2       the paper's network on CIFAR-10
  python -m anode_exp train --help                             every setting
  tensorboard --logdir outputs                                 watch
"""


def fail(message: str) -> NoReturn:
    """A user's mistake: one line, exit code 2."""
    sys.stdout.flush()
    print(f"anode_exp: {message}", file=sys.stderr)
    sys.exit(2)


def run_job(config: DictConfig) -> None:
    """Hydra's task: one job, in Hydra's output directory."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from anode_exp.config import typed
    from anode_exp.train import train  # imports torch

    job = HydraConfig.get()
    try:
        results = train(typed(config), Path(job.runtime.output_dir))
    except UserError as error:
        if job.mode == RunMode.MULTIRUN:
            raise  # the other jobs go on
        fail(str(error))  # Hydra would put a line of its own above it
    if results["signal"] is not None:
        sys.exit(128 + results["signal"])


def run_train(arguments: list[str]) -> None:
    import hydra
    from hydra._internal.utils import get_args_parser

    from anode_exp.composition import CONF, fixed_keys, jobs

    parser = get_args_parser()
    parser.prog = "python -m anode_exp train"
    parsed = parser.parse_args(arguments)
    if not parsed.hydra_help:
        # All of it once before Hydra runs any of it: a mistake in the last job of a sweep stops the first.
        jobs(parsed.overrides, parsed.multirun)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises what a job raised, for `main` to report
    if parsed.multirun:  # the folders of a sweep's jobs are named by what varies
        arguments = [
            *arguments,
            f"hydra.job.config.override_dirname.exclude_keys=[{','.join(fixed_keys(parsed.overrides))}]",
        ]
    sys.argv = [parser.prog, *arguments]
    hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")(run_job)()


VERBS: dict[str, Callable[[list[str]], None]] = {"train": run_train}


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
            hint = f"; did you mean: python -m anode_exp train {verb} …" if "=" in verb or verb.startswith("-") else ""
            raise UserError(f"{verb}: no such verb; verbs are {', '.join(VERBS)}{hint}")
        VERBS[verb](arguments)
    except UserError as error:
        fail(str(error))
    except OSError as error:
        if error.filename is None:
            raise
        fail(f"{error.filename}: {error.strerror}; choose another folder or make room")


if __name__ == "__main__":
    main()
