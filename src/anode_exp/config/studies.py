"""Composing a study's settings."""

from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from anode_exp.config.check import (
    check_used,
    lacking,
    lacking_in_torchdiffeq,
    read_config,
    solvers_that,
    typed,
    typed_study,
)
from anode_exp.config.compose import check_folders, compose_line, expanded, given_keys, parse, typed_line
from anode_exp.config.describe import CONF, near, options
from anode_exp.config.schema import StudyConfig, TrainConfig
from anode_exp.errors import UserError

_DATA = ("dataset", "dataset.root", "dataset.download", "dataset.train_size", "dataset.validation_size",
         "dataset.mean", "dataset.std")  # fmt: skip
_REVERSIBLE = ("solver.damping", "solver.tableau", "solver.coupling")
_STEPS = ("experiment", "model", "model.*", "solver", "solver.n_steps", *_REVERSIBLE, *_DATA, "seed", "runtime.device",
          "runtime.precision", "runtime.channels_last", "runtime.cuda_graph", "runtime.cudnn_benchmark")  # fmt: skip
STUDY_READS: dict[str, tuple[str, ...]] = {
    "memory": _STEPS,
    "budget": _STEPS,
    "gradient_error": ("experiment", "model", "model.*", "solver.max_evaluations", "solver.min_step", *_REVERSIBLE,
                       *_DATA, "seed", "runtime.device"),
    "reversibility": ("experiment", "solver", "solver.n_steps", *_REVERSIBLE, *_DATA[:-2], "seed", "runtime.device"),
    "evolution": (),
    "batchnorm": ("dataset.root", "dataset.download", "runtime.device"),
    "stiff": ("runtime.device",),
    "density": ("dataset.root", "runtime.device"),
}  # fmt: skip
"""The settings that each study uses in addition to its own. Settings that a recorded run provides cannot be given."""


SEVERAL_RUNS = {"batchnorm": "runtime.keep_every=1", "stiff": "task=trajectory", "density": "task=density"}
"""Studies of one or more recorded runs, and the setting that these runs need."""

OF_TASK = {"stiff": "trajectory", "density": "density"}
"""The task of a study's runs, if it is not classification."""


def study(name: str, overrides: list[str], thorough: bool = False) -> tuple[TrainConfig, StudyConfig]:
    """The checked settings of a study, and of the networks and data it measures; UserError for the first mistake.

    Args:
        thorough: use the values of ``conf/study/thorough`` instead of the defaults.
    """
    if name not in options("study"):
        choice = f"choose one of {', '.join(options('study'))}{near(name, options('study'))}"
        raise UserError(f"study {name}: there is no such study; {choice}")
    parsed = parse(overrides)
    given = given_keys(parsed)
    check_folders(parsed, ("hydra.run.dir",))
    expanded(parsed, False, "a study takes one; its own lists are written [1,2]")
    grid = [f"+study/thorough={name}"] if thorough else []
    if thorough and not (CONF / "study" / "thorough" / f"{name}.yaml").exists():
        raise UserError(f"thorough=true: study {name} has one grid; leave it out")
    composed = compose_line([f"+study={name}", *grid, *overrides])
    config = typed_line(composed, without=("hydra", "study"))
    checked = typed_study(composed.study)
    for label in checked.modes:
        if label not in checked.gradients:
            known = list(checked.gradients)
            raise UserError(f"study.modes: {label} is not in study.gradients; choose from {', '.join(known)}"
                            + near(label, known))  # fmt: skip
    if checked.modes:
        checked.gradients = {label: g for label, g in checked.gradients.items() if label in checked.modes}
    own = [g.solver for g in checked.gradients.values() if g.solver is not None]
    for group, names in (("solver", checked.solvers + own), ("gradient", [g.name for g in checked.gradients.values()])):
        for unknown in set(names) - set(options(group)):
            raise UserError(f"study {name}: {unknown} is not a {group}; choose from {', '.join(options(group))}")
    compared = [] if name == "stiff" else checked.solvers  # that one compares implicit methods too
    if not compared and name in ("memory", "budget", "reversibility"):
        compared = [config.solver.name]
    for solver in set(compared + own) - set(solvers_that("static")):
        choice = f"choose from {', '.join(solvers_that('static'))}"
        raise UserError(f"study {name}: {solver} is implicit, and the study compares explicit methods; {choice}")
    for label, gradient in list(checked.gradients.items()):
        on = [gradient.solver] if gradient.solver else [*compared, *checked.adaptive_solvers]
        refused = [lacking(solver, gradient) for solver in on]
        if gradient.baseline == "torchdiffeq_adjoint":
            as_asked = [replace(config, solver=replace(config.solver, name=s, adaptive=False)) for s in on]
            refused = [lacking_in_torchdiffeq(c) for c in as_asked]
        if refused and all(refused):  # no solver here has this mode; the study's own modes are then left out
            if (
                gradient.solver
                or label in checked.modes
                or any(key.startswith(f"study.gradients.{label}") for key in given)
            ):
                raise UserError(f"study.gradients.{label}: {refused[0]}")
            del checked.gradients[label]
    if "run" in composed.study and checked.run is None and "study.checkpoint" in given:
        raise UserError(f"checkpoint={checked.checkpoint}: needs run=DIR, the folder of a trained run")
    if "study.name" in given:
        raise UserError("study.name: chosen by the word after study; leave it out")
    if "batch_size" in composed.study and checked.batch_size is None:
        raise UserError("study.batch_size=null: give a whole number, at least 1")
    axes = ("n_steps", "blocks_per_stage") if name == "memory" else ("solvers", "adaptive_solvers")
    for grids in (("gradients",), axes):
        if grids[0] in composed.study and not any(composed.study.get(grid) for grid in grids):
            raise UserError(f"study.{grids[0]}: is empty, so there is nothing to measure; list some")
    in_budgets = any(gradient.name == "budget" for gradient in checked.gradients.values())
    planned = name == "budget" or (in_budgets and bool(checked.n_steps))
    if planned and config.model.blocks_per_stage == 0:
        raise UserError("model.blocks_per_stage=0: a byte budget is for ODE blocks; give a whole number, at least 1")
    if thorough and checked.checkpoint == "every":
        raise UserError("thorough=true: checkpoint=every takes the run's own solver; leave one of them out")
    reads = STUDY_READS[name]
    if checked.run is not None:
        kept = ("solver", "runtime", "dataset.root", "dataset.download")
        reads = tuple(r for r in reads if r.startswith(kept))
    of_run = ("study.solvers", "study.n_steps", "study.adaptive_solvers", "study.tolerances", "solver.*")
    for key in given:
        if checked.checkpoint == "every" and any(fnmatchcase(key, pattern) for pattern in of_run):
            raise UserError(f"{key}: checkpoint=every takes the run's own solver; leave it out")
        if not any(fnmatchcase(key, pattern) for pattern in (*reads, "study.*", "hydra.run.dir")):
            taken = ", ".join((*(k for k in composed.study if k != "name"), *reads))
            who = f"study {name}" + (" with run=DIR" if checked.run is not None else "")
            raise UserError(f"{key}: {who} does not use it; it uses {taken}")
    if checked.run is not None:
        folders = checked.run.split(",") if name in SEVERAL_RUNS else [checked.run]
        task, runs = OF_TASK.get(name, "classification"), [typed(read_config(Path(f))) for f in folders]
        for folder, other in zip(folders, runs, strict=True):
            if other.task.name != task:
                raise UserError(f"study {name}: is for runs of task={task}, {folder} is of task={other.task.name}")
        recorded = runs[0]
        for key in ("root", "download"):
            if f"dataset.{key}" in given:
                setattr(recorded.dataset, key, getattr(config.dataset, key))
        config = replace(config, model=recorded.model, dataset=recorded.dataset, seed=recorded.seed)
        if checked.checkpoint == "every" or name == "batchnorm":
            config = replace(config, solver=recorded.solver)
    elif name in SEVERAL_RUNS:
        kind = f"a run with {SEVERAL_RUNS[name]}"
        raise UserError(f"study {name}: needs run=DIR, {kind}, or run=DIR,DIR for several")
    if name == "evolution" and (checked.run is None or config.model.evolution == "none"):
        raise UserError("study evolution: needs run=DIR, a run with model.evolution=reaction_diffusion_advection")
    adaptive = ("study.tolerances", "study.adaptive_solvers", "solver.max_evaluations", "solver.min_step")
    if name == "gradient_error":  # it has its own list of solvers
        joint = config.model.evolution != "none" and config.model.evolution_coupling == "joint"
        for key in (k for k in given if k in adaptive):
            if joint or (not checked.adaptive_solvers and key != "study.adaptive_solvers"):
                need = "model.evolution_coupling other than joint" if joint else "study.adaptive_solvers"
                raise UserError(f"{key}: has no effect here; it needs {need}")
        for key, of in zip(_REVERSIBLE, ("alf", "reversible_rk", "reversible_rk"), strict=True):
            if key in given and of not in checked.solvers:
                raise UserError(f"{key}: has no effect here; it needs {of} among study.solvers")
        given = [key for key in given if not key.startswith("solver")]
    check_used(given, [config])
    return config, checked
