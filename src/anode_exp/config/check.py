"""From a composed configuration to checked types: a wrong setting is refused before anything slow is imported."""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from anode_exp.config.schema import (
    SOLVERS,
    TASKS,
    TORCHDIFFEQ_METHODS,
    GradientConfig,
    SolverConfig,
    StudyConfig,
    T,
    TrainConfig,
)
from anode_exp.errors import UserError


def yaml_or_text(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:  # refused later, with the type that is expected
        return text


def split_settings(schema: type[T], arguments: list[str], verb: str) -> tuple[T, list[str]]:
    """A verb's own settings from its command line, and the other arguments, which are settings of runs.

    Raises UserError for a flag, or a value of the wrong type or out of range.
    """
    types = {f.name: str(f.type) for f in fields(schema)}  # type: ignore[arg-type]
    own: dict[str, Any] = {}
    rest = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if argument.startswith("-"):
            raise UserError(f"{argument}: {verb} takes no flags but --help; settings are key=value")
        if not equals or key not in types:
            rest.append(argument)
        elif key in own:
            raise UserError(f"{argument}: {key} is given twice")
        else:
            own[key] = value if types[key].startswith("str") else yaml_or_text(value)
    return to_object(schema, OmegaConf.create(own)), rest


_WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a word",
          "list[int]": "a list of whole numbers", "list[float]": "a list of numbers",
          "list[str]": "a list of words"}  # fmt: skip

UNITS = {"": 1, "B": 1, **{f"{p}B": 1000**i for i, p in enumerate("kMGT", 1)}, "KB": 1000,
         **{f"{p}iB": 1024**i for i, p in enumerate("KMGT", 1)}}  # fmt: skip


def parse_bytes(text: str, key: str = "gradient.memory") -> int:
    """Bytes from ``2GiB``, ``500 MB`` or ``1000000``; UserError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2] not in UNITS or float(match[1]) <= 0:
        raise UserError(f"{key}={text}: give a number of bytes above 0 with a unit, such as 2GiB or 500MB")
    return int(float(match[1]) * UNITS[match[2]])


def _expected(annotation: str) -> str:
    """A type as an error message names it."""
    base, _, optional = annotation.partition(" | ")
    return _WORDS[base] + (" or null" if optional else "")


def _expected_at(schema: type, key: str) -> str | None:
    """The type that a setting may have, as text, by its dotted key; None if there is no such setting."""
    group, _, leaf = key.split("[")[0].rpartition(".")
    node = get_type_hints(schema).get(group) if group else schema
    types = {f.name: str(f.type) for f in fields(node)} if is_dataclass(node) else {}
    return _expected(types[leaf]) if types.get(leaf, "").partition(" | ")[0] in _WORDS else None


def _check(config: Any, path: str = "") -> None:
    """Check ranges and choices, which types do not express."""
    for f in fields(config):
        key, value = f"{path}{f.name}", getattr(config, f.name)
        entries = {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
        if all(is_dataclass(entry) for entry in entries.values()):
            for path_of_entry, entry in entries.items():
                _check(entry, f"{path_of_entry}.")
            continue
        numbers = value if isinstance(value, list) else [value]
        for number in numbers:
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"{key}={number}: give a finite number")
        if value is None:
            continue
        if "one_of" in f.metadata and value not in f.metadata["one_of"]:
            raise UserError(f"{key}={value}: choose one of {', '.join(map(str, f.metadata['one_of']))}")
        if "at_least" in f.metadata and any(n < f.metadata["at_least"] for n in numbers):
            raise UserError(f"{key}={value}: give {_expected(str(f.type))}, at least {f.metadata['at_least']}")
        if "below" in f.metadata and value >= f.metadata["below"]:
            raise UserError(
                f"{key}={value}: give a number from {f.metadata['at_least']} to below {f.metadata['below']}"
            )
        if "above" in f.metadata and value <= f.metadata["above"]:
            raise UserError(f"{key}={value}: give {_expected(str(f.type))} above {f.metadata['above']}")


def _refuse(*cases: tuple[bool, str]) -> None:
    """Raise UserError for the first case that is true."""
    for wrong, message in cases:
        if wrong:
            raise UserError(message)


def _check_gradient(gradient: GradientConfig, prefix: str) -> None:
    """Check that ``unit`` and ``states`` fit the mode."""
    mode, unit, states, whole = gradient.name, gradient.unit, gradient.states, gradient.name == "dto_checkpoint"
    units, kinds = ("block", "input") if whole else ("step or stage", "keep or rebuild")
    _refuse(
        (unit is not None and (unit == "block") != whole,
         f"{prefix}unit={unit}: {mode} takes {units}; unit block is for dto_checkpoint"),
        (states is not None and (states == "input") != whole, f"{prefix}states={states}: {mode} takes {kinds}"),
    )  # fmt: skip


def to_object(schema: type[T], config: DictConfig, prefix: str = "") -> T:
    """The configuration as the schema's class; UserError for a value of the wrong type, or out of range."""
    try:
        plain = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    except OmegaConfBaseException as error:  # an interpolation that cannot be resolved
        raise UserError(f"{error.full_key}: {str(error.msg or error).splitlines()[0]}") from error
    try:
        checked = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), plain))
    except OmegaConfBaseException as error:
        key = error.full_key or "configuration"
        value = OmegaConf.select(plain, key) if error.full_key else None
        expected = _expected_at(schema, key)
        reason = f"give {expected}" if expected else str(error.msg).splitlines()[0]
        raise UserError(f"{prefix}{key}={'null' if value is None else value}: {reason}") from error
    _check(checked, prefix)
    return cast(T, checked)


def typed_study(config: DictConfig) -> StudyConfig:
    """The settings of a study, checked; UserError for a value of the wrong type, or out of range."""
    study = to_object(StudyConfig, config, "study.")
    if study.checkpoint not in ("best", "last", "every") and not study.checkpoint.isdecimal():
        raise UserError(f"checkpoint={study.checkpoint}: choose best, last, the number of an epoch, or every")
    for budget in study.budgets:
        parse_bytes(budget, "study.budgets")
    for solver in set(study.adaptive_solvers) - set(solvers_that("embedded")):
        choice = f"choose from {', '.join(solvers_that('embedded'))}"
        raise UserError(f"study.adaptive_solvers: {solver} has no error estimate; {choice}")
    for precision in set(study.precisions) - {"fp64", "fp32", "tf32", "bf16"}:
        raise UserError(f"study.precisions: {precision} is not a precision; choose from fp64, fp32, tf32, bf16")
    for label, gradient in study.gradients.items():
        if gradient.name == "budget" and study.name != "memory":
            raise UserError(f"study.gradients.{label}: study {study.name} does not take budgets; see study budget")
        if gradient.baseline is not None and study.name != "memory":
            raise UserError(f"study.gradients.{label}.baseline: study {study.name} does not use it; study memory does")
        _check_gradient(gradient, f"study.gradients.{label}.")
    return study


def solvers_that(can: str) -> list[str]:
    """The solvers with an ability, by the name of its attribute in ``Method``."""
    return [name for name, method in SOLVERS.items() if getattr(method, can)]


def _check_solver(config: TrainConfig) -> None:
    """Check that the solver supports what the configuration asks for."""
    name, gradient = config.solver.name, config.gradient
    _refuse(
        (name in SOLVERS and SOLVERS[name].implicit and config.runtime.precision not in ("fp32", "fp64"),
         f"runtime.precision={config.runtime.precision}: Newton's method in {name} needs fp32 or fp64; set "
         f"it, or choose solver={', '.join(solvers_that('explicit'))}"),
        (name in SOLVERS and SOLVERS[name].implicit and config.runtime.compile,
         f"runtime.compile=true: not with {name}, whose Jacobians are not compiled; leave it out"),
        (not 0.5 < config.solver.damping <= 1.0,
         f"solver.damping={config.solver.damping:g}: give a number above 0.5, at most 1, which is undamped"),
        (not 0.0 < config.solver.coupling <= 1.0,
         f"solver.coupling={config.solver.coupling:g}: give a number above 0, at most 1, such as 0.99"),
    )  # fmt: skip
    refused = lacking(name, gradient) if name in SOLVERS else None
    _refuse(
        (config.solver.adaptive and name in SOLVERS and not SOLVERS[name].embedded,
         f"solver.adaptive=true: {name} has no error estimate; choose solver={', '.join(solvers_that('embedded'))}"),
        (refused is not None, f"gradient={gradient.name}: {refused}"),
    )  # fmt: skip


def lacking(name: str, gradient: GradientConfig) -> str | None:
    """What a solver lacks that the gradient mode needs, and which solvers have it; None where it lacks nothing."""
    mode, unit = gradient.name, gradient.unit
    no_stages = "has no stages with an adjoint of their own; use gradient.unit=step or gradient=step_checkpoint"
    explicit = "only explicit Runge–Kutta methods step a continuous adjoint"
    needs = (
        (mode == "stage_checkpoint" or unit == "stage", "stages", f"{name} {no_stages}"),
        (mode in ("reverse_adjoint", "stored_adjoint"), "explicit", f"{explicit}, {name} is not one"),
        (mode == "batched_adjoint", "stages", f"{name} has no stages"),
        (mode == "budget", "static", f"{name} does not perform the same operations each step"),
        (mode == "reversible", "reversible", f"a step of {name} has no inverse"),
    )
    for asked, can, text in needs:
        if asked and not getattr(SOLVERS[name], can):
            return f"{text}; choose solver={', '.join(solvers_that(can))}"
    return None


def check_shared(config: TrainConfig, processes: int) -> None:
    """Refuse what several processes cannot share; UserError with what to do instead."""
    recipe, method = config.recipe, SOLVERS[config.solver.name]
    synchronised = config.model.norm_sync and "batch" in (config.model.norm, config.model.field_norm)
    norms = "use model.norm_sync=false or model.norm=group"
    few = f"recipe.batch_size={recipe.batch_size}"
    for refused, text in (
        (config.seeds > 1, f"seeds={config.seeds}: run them without torchrun, or one at a time"),
        (config.gradient.name == "budget", "gradient=budget: its plan is for one process; use another gradient mode"),
        (config.task.name == "trajectory", "task=trajectory: a batch is one trajectory, which cannot be divided"),
        (config.solver.adaptive, "solver.adaptive=true: steps are chosen for a whole batch; use solver.adaptive=false"),
        (recipe.batch_size < processes, f"{few}: give at least one sample to each process"),
        (method.implicit and synchronised, f"solver={config.solver.name}: each process has its own Newton iterations, "
         f"but BatchNorm's statistics are those of all; {norms}"),
        (config.runtime.compile and synchronised, f"runtime.compile=true: f exchanges BatchNorm's statistics; {norms}"),
    ):  # fmt: skip
        if refused:
            raise UserError(f"{text}; {processes} processes share every batch")


def lacking_in_torchdiffeq(config: TrainConfig) -> str | None:
    """Why torchdiffeq's adjoint cannot differentiate these solves; None where it can."""
    methods = TORCHDIFFEQ_METHODS[config.solver.adaptive]
    if config.solver.name not in methods:
        steps = "adaptive" if config.solver.adaptive else "fixed"
        return f"torchdiffeq has no {config.solver.name} on {steps} steps; choose solver={', '.join(methods)}"
    if config.model.evolution != "none" and config.model.evolution_coupling == "joint":
        return "weights that evolve with the activations differ in every step; set model.evolution=none"
    return None


def _check_task(config: TrainConfig) -> None:
    """Check that model, data set and recipe fit the task, and the settings that only one task has."""
    task, trajectory = config.task.name, config.task.name == "trajectory"
    if task not in TASKS:
        raise UserError(f"task.name={task}: choose one of {', '.join(TASKS)}, as task=NAME")
    for group in ("model", "dataset", "recipe"):
        name = getattr(config, group).name
        for other, parts in TASKS.items():
            if other != task and name in getattr(parts, group):
                choice = f"which takes {', '.join(getattr(TASKS[task], group))}; choose one, or task={other}"
                raise UserError(f"{group}={name}: not with task={task}, {choice}")
    precision, mode = config.runtime.precision, config.gradient.name
    modes = "gradient=batched_adjoint, stage_checkpoint or step_checkpoint"
    _refuse(
        (precision == "bf16" and task == "density",
         "runtime.precision=bf16: a density's trace needs more digits; use fp32, tf32 or fp64"),
        (task == "density" and config.model.activation not in ("softplus", "gelu"),
         f"model.activation={config.model.activation}: a density contains its derivative; choose softplus or gelu"),
        (task == "density" and config.model.blocks_per_stage == 0,
         "model.blocks_per_stage=0: a density has no layers but its ODE blocks; give a whole number, at least 1"),
        (mode == "batched_adjoint" and not trajectory,
         f"gradient=batched_adjoint: for the small states of task=trajectory; with task={task} use stage_checkpoint"),
        (mode == "budget" and trajectory, f"gradient=budget: does not plan for task=trajectory; use {modes}"),
        (config.runtime.compile and trajectory, "runtime.compile=true: not with task=trajectory; leave it out"),
        (trajectory and config.recipe.steps_per_epoch is None,
         "recipe.steps_per_epoch=null: give the training steps that are recorded together, such as 100"),
        (trajectory and config.task.loss is None, "task.loss=null: choose one of mae, mse"),
        (task == "density" and config.task.trace is None, "task.trace=null: choose one of exact, gaussian, rademacher"),
        (trajectory and config.dataset.points is None, "dataset.points=null: give a whole number, at least 2"),
        (config.dataset.name == "van_der_pol" and config.dataset.stiffness is None,
         "dataset.stiffness=null: give a number above 0"),
    )  # fmt: skip


def typed(config: DictConfig) -> TrainConfig:
    """The composed configuration, checked.

    ``model.block=residual`` is one Euler step with full backpropagation (ANODE Eq. 1): the result has this solver and
    this gradient mode.

    Raises:
        UserError: for a value of the wrong type, out of range, or in conflict with another setting.
    """
    checked = to_object(TrainConfig, config)
    model, solver, gradient, recipe = checked.model, checked.solver, checked.gradient, checked.recipe
    _check_task(checked)
    mean, std = checked.dataset.mean, checked.dataset.std
    _refuse(
        (len(mean) != 3 or len(std) != 3 or min(std) <= 0,
         "dataset.mean and dataset.std: give three numbers each, one per channel, std above 0"),
        (checked.seed + checked.seeds > 2**31, f"seed={checked.seed}: give a whole number below 2147483648"),
        (model.width is not None and not (model.width * 8).is_integer(),
         f"model.width={model.width}: give a multiple of 1/8, such as 0.5, 1 or 2"),
    )  # fmt: skip
    _check_gradient(gradient, "gradient.")
    if gradient.name != "dto_checkpoint":
        gradient.passes = None  # only dto_checkpoint has a block's graph
    planned, residual = gradient.memory is not None, model.block == "residual"
    if gradient.memory is not None:
        parse_bytes(gradient.memory)
    _refuse(
        (recipe.optimizer == "sgd" and recipe.nesterov and recipe.momentum == 0,
         "recipe.nesterov=true: needs recipe.momentum above 0"),
        ((recipe.patience is None) and recipe.schedule == "plateau",
         "recipe.schedule=plateau: needs recipe.patience, epochs without a better score, such as 10"),
        (planned and checked.seeds > 1, "gradient=budget: plans for one run on its device; set seeds=1"),
        (planned and not residual and model.blocks_per_stage == 0,
         "gradient=budget: plans for ODE blocks, and model.blocks_per_stage=0 has none; give at least 1"),
        (planned and solver.adaptive, "gradient=budget: plans for a known number of steps; set solver.adaptive=false"),
    )  # fmt: skip
    _check_solver(checked)
    timed, evolving = model.norm_affine == "by_time", model.evolution != "none"
    joint = evolving and model.evolution_coupling == "joint"
    _refuse(
        (timed and model.field_norm != "batch",
         f"model.norm_affine=by_time: model.field_norm={model.field_norm} has one weight for all times; "
         "set model.field_norm=batch, or model.norm_affine=shared"),
        (timed and residual, "model.norm_affine=by_time: a residual block has one time; set model.block=ode"),
        (evolving and residual,
         f"model.evolution={model.evolution}: a residual block has one step; set model.block=ode"),
        (joint and (solver.adaptive or solver.n_steps == 1),
         "model.evolution_coupling=joint: every step has its own weights, the first the initial ones; use "
         "solver.adaptive=false and solver.n_steps=2 or more, or model.evolution_coupling=first"),
    )  # fmt: skip
    if residual:
        checked.solver = SolverConfig(name="euler", n_steps=1)
        checked.gradient = GradientConfig(name="full_backprop")
    return checked


_OF_SOLVES = ("solver*", "gradient*", "model.statistics")
_OF_ADAPTIVE = ("solver.rtol", "solver.atol", "solver.max_evaluations", "solver.min_step")
NEEDS: tuple[tuple[tuple[str, ...], str, Callable[[TrainConfig], bool]], ...] = (
    (_OF_SOLVES, "model.block=ode", lambda c: c.model.block == "ode"),
    (_OF_SOLVES, "model.blocks_per_stage above 0", lambda c: c.model.blocks_per_stage > 0),
    (_OF_ADAPTIVE, "solver.adaptive=true", lambda c: c.solver.adaptive),
    (("solver.n_steps",), "solver.adaptive=false", lambda c: not c.solver.adaptive),
    (
        ("solver.linear", "solver.newton_*"),
        "an implicit solver, such as solver=crank_nicolson",
        lambda c: c.solver.name in SOLVERS and SOLVERS[c.solver.name].implicit,
    ),
    (("solver.damping",), "solver=alf", lambda c: c.solver.name == "alf"),
    (("solver.tableau", "solver.coupling"), "solver=reversible_rk", lambda c: c.solver.name == "reversible_rk"),
    (("model.statistics",), "model.field_norm=batch", lambda c: c.model.field_norm == "batch"),
    (("model.norm_intervals",), "model.norm_affine=by_time, or solver.adaptive=true with model.statistics=by_time",
     lambda c: c.model.norm_affine == "by_time" or (c.solver.adaptive and c.model.statistics == "by_time"
                                                    and c.model.field_norm == "batch")),
    (("model.field_gain",), "model.field_norm other than none", lambda c: c.model.field_norm != "none"),
    (("model.evolution_*", "recipe.evolution_lr"), "model.evolution=reaction_diffusion_advection",
     lambda c: c.model.evolution != "none"),
    (("model.evolution_steps",), "model.evolution_activation=tanh", lambda c: c.model.evolution_activation != "none"),
    (("recipe.milestones",), "recipe.schedule=steps", lambda c: c.recipe.schedule == "steps"),
    (("recipe.gamma",), "recipe.schedule=steps or plateau", lambda c: c.recipe.schedule in ("steps", "plateau")),
    (("recipe.patience",), "recipe.schedule=plateau", lambda c: c.recipe.schedule == "plateau"),
    (("recipe.momentum", "recipe.nesterov", "recipe.restart_momentum"), "recipe.optimizer=sgd",
     lambda c: c.recipe.optimizer == "sgd"),
    (("recipe.restart_momentum",), "recipe.momentum above 0", lambda c: c.recipe.momentum > 0),
    (("recipe.decay_all",), "recipe.weight_decay above 0", lambda c: c.recipe.weight_decay > 0),
    (("runtime.channels_last", "runtime.cudnn_benchmark"), "task=classification",
     lambda c: c.task.name == "classification"),
    (("dataset.root", "dataset.download"), "dataset=cifar10 or cifar100, or a table such as miniboone",
     lambda c: c.dataset.name.startswith("cifar") or c.dataset.name in ("power", "miniboone", "bsds300")),
)  # fmt: skip
"""Settings, what they need to have an effect, and whether a configuration meets that."""


def check_used(keys: Iterable[str], configs: list[TrainConfig]) -> None:
    """Refuse given settings that no run of the command line uses; the error says what the first of them needs.

    Args:
        keys: dotted keys of the given settings; groups by their names.
    """
    for key in keys:
        for patterns, need, holds in NEEDS:
            if any(fnmatchcase(key, p) for p in patterns) and not any(holds(c) for c in configs):
                raise UserError(f"{key}: has no effect here; it needs {need}")


def read_config(directory: Path) -> DictConfig:
    """The resolved configuration of a recorded run; UserError if there is none, or it cannot be read."""
    path = directory / "config.yaml"
    if not path.is_file():
        remedy = "give the folder of one, such as outputs/DATE/TIME"
        raise UserError(f"{directory}: holds no run (no config.yaml); {remedy}")
    try:
        return cast(DictConfig, OmegaConf.load(path))
    except (yaml.YAMLError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())[:80]})") from error
