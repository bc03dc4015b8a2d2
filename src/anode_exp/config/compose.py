"""Composing a command line's configurations before anything runs, so that every mistake gets one clear line."""

import re
import warnings
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from anode_exp.config.check import check_used, typed
from anode_exp.config.describe import CONF, PRESETS, groups, near, options
from anode_exp.config.schema import TrainConfig
from anode_exp.errors import UserError

_OCCUPIED = "already holds files; nothing is overwritten, choose another folder"

LONGEST_NAME = 180
"""Characters of a job's folder name: file systems allow 255 bytes, and the job's number comes before."""


def path_safe(*parts: object) -> str:
    """The parts that are not empty, joined by ``_``; ``-`` replaces characters that a shell or Hydra wants quoted."""
    text = "_".join(str(part) for part in parts if part != "")
    return re.sub(r"[^A-Za-z0-9_.+-]", "-", text)[:LONGEST_NAME]


def gpus_of_a_job() -> int:
    import torch

    return min(1, torch.cuda.device_count())


# conf/hydra/launcher/ray.yaml has the name of the launcher's own schema, and sets the defaults of this project's jobs.
warnings.filterwarnings("ignore", r"\n'hydra/launcher/ray' is validated against", UserWarning)

OmegaConf.register_new_resolver("path_safe", path_safe, replace=True)
OmegaConf.register_new_resolver("gpus_of_a_job", gpus_of_a_job, replace=True)


def quoted(value: object) -> str:
    """Any text as a quoted value of a Hydra override."""
    return "'" + re.sub(r"(\\*)'", r"\1\1\'", str(value)) + "'"


LAUNCHERS = {
    "joblib": ("hydra_joblib_launcher", "launchers"),
    "slurm": ("hydra_submitit_launcher", "launchers"),
    "submitit_slurm": ("hydra_submitit_launcher", "launchers"),
    "submitit_local": ("hydra_submitit_launcher", "launchers"),
    "ray": ("hydra_ray_launcher", "ray"),
}
"""Launchers that start jobs in parallel: the plugin, and the extra that installs it."""


def check_launcher(name: object) -> None:
    """Refuse a launcher whose plugin is not installed."""
    plugin, extra = LAUNCHERS.get(str(name), ("", ""))
    # Without any plugin there is no hydra_plugins, in which find_spec could look.
    if plugin and (find_spec("hydra_plugins") is None or find_spec(f"hydra_plugins.{plugin}") is None):
        raise UserError(f"launcher {name}: is not installed; pip install 'anode_exp[{extra}]'")


def check_gpus(config: DictConfig) -> None:
    """Refuse more GPUs than a job uses."""
    gpus = OmegaConf.select(config, "hydra.launcher.ray.remote.num_gpus")
    if gpus is not None and gpus > 1:
        several = "for several use torchrun, or slurm with hydra.launcher.tasks_per_node"
        raise UserError(f"hydra.launcher.ray.remote.num_gpus={gpus}: a job takes one GPU or a part of it; {several}")


def key_of(override: Override) -> str:
    return str(override.get_key_element()).lstrip("+~")


def given_keys(parsed: list[Override]) -> list[str]:
    return [key_of(override) for override in parsed]


def check_folders(parsed: list[Override], used: tuple[str, ...]) -> None:
    """Refuse Hydra's folders where nothing is written to them."""
    for key in given_keys(parsed):
        if key in ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir") and key not in used:
            raise UserError(f"{key}: not used here; {f'give {used[0]}=DIR' if used else 'leave it out'}")


def check_hydra(parsed: list[Override], why: str) -> None:
    for override in parsed:
        if override.key_or_group.split(".")[0].split("/")[0] == "hydra":
            raise UserError(f"{override.input_line}: {why}; leave it out")


def expanded(parsed: list[Override], multirun: bool, advice: str) -> list[list[str]]:
    """The overrides of every job: one job, or one per combination of the settings that list several values."""
    for override in parsed:
        check_group(override)
        if override.is_sweep_override() and not multirun:
            raise UserError(f"{override.input_line}: names several values; {advice}")
    if not multirun:
        return [[override.input_line or "" for override in parsed]]
    return [line for batch in BasicSweeper.split_arguments(parsed, None) for line in batch]


def parse(overrides: list[str]) -> list[Override]:
    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        try:
            parsed += parser.parse_overrides([text])
        except HydraException as error:
            why = "cannot be read as key=value; quote special characters, as in 'key=\"a value\"'"
            if "=" not in text:
                why = "not a setting; settings are key=value, such as solver.n_steps=4"
            raise UserError(f"{text}: {why}") from error
    return parsed


def values_of(override: Override) -> list[str]:
    if override.is_choice_sweep():
        return [str(v) for v in override.sweep_string_iterator()]
    return [] if override.is_sweep_override() or override.is_delete() else [str(override.value())]


def check_group(override: Override) -> None:
    group = override.key_or_group
    if group not in groups():
        return
    if group in PRESETS and (override.is_delete() or override.value() is None):
        raise UserError(f"{override.input_line}: {group} is a preset; leave it out for none")
    if override.is_delete():
        raise UserError(f"{override.input_line}: a run needs a {group}; choose one of {', '.join(options(group))}")
    allowed = options(group)
    for value in (v for v in values_of(override) if v not in allowed):
        choice = f"choose one of {', '.join(allowed)}{near(value, allowed)}"
        raise UserError(f"{group}={value}: there is no such {group}; {choice}")


def setting_names(settings: dict[str, Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for key, value in settings.items():
        found += [f"{prefix}{key}", *(setting_names(value, f"{prefix}{key}.") if isinstance(value, dict) else [])]
    return found


def check_key(override: Override, known: list[str]) -> None:
    """Refuse a setting that the chosen groups do not have."""
    key = key_of(override)
    if key.startswith("study.gradients.") and override.is_add():
        return  # the one place where users add entries of their own
    if key.split(".")[0] == "hydra" or "/" in key or key in (*groups(), "study"):
        return
    if key not in known:
        parent = key.rpartition(".")[0]
        siblings = [k for k in known if parent and k.startswith(parent + ".")] or [k for k in known if "." not in k]
        raise UserError(f"{key}: there is no such setting; there are {', '.join(siblings)}" + near(key, known))
    if override.is_delete() or override.is_add():
        raise UserError(f"{override.input_line}: settings can be changed, not added or removed; write {key}=VALUE")


def composed_settings(overrides: list[str]) -> DictConfig:
    """A configuration as composed, for its help; UserError for a setting that cannot be composed."""
    first = expanded(parse(overrides), True, "")[0]
    config = compose_line(first)
    return OmegaConf.masked_copy(config, [str(k) for k in config if k != "hydra"])


@dataclass(frozen=True)
class Jobs:
    """What a command line of ``train`` asks for: every job's checked configuration, and the folder to write to."""

    configs: list[TrainConfig]
    directory: Path
    given: bool  # whether the user named the folder
    fixed: list[str]  # the settings that the user gave and that are the same in every job


def jobs(overrides: list[str], multirun: bool) -> Jobs:
    """Compose and check every job of a command line before any job runs; UserError for the first mistake."""
    parsed = parse(overrides)
    check_folders(parsed, ("hydra.sweep.dir",) if multirun else ("hydra.run.dir",))
    lines = expanded(parsed, multirun, "add -m for a sweep over them")
    composed = [compose_line(line) for line in lines]
    key = "hydra.sweep.dir" if multirun else "hydra.run.dir"
    directory = folder_of(composed[0], key)
    # Files of a start that failed, such as one without its data, do not count, so that it can be started again.
    files = (f.relative_to(directory) for f in directory.rglob("*") if f.is_file())
    if any(f.name != "train.log" and ".hydra" not in f.parts for f in files):
        raise UserError(f"{key}={directory}: {_OCCUPIED}")
    configs = [typed_line(config) for config in composed]
    check_used(given_keys(parsed), configs)
    given = {o.get_key_element() for o in parsed}
    varied = {o.get_key_element() for o in parsed if o.is_sweep_override()}
    return Jobs(configs, directory, given=key in given, fixed=sorted(given - varied))


def folder(overrides: list[str], verb: str) -> Path:
    """Where a study or a benchmark writes: ``hydra.run.dir`` if it is among the settings, else a new one.

    Raises UserError if it is not empty.
    """
    if "hydra.run.dir" not in given_keys(parse(overrides)):
        return Path("outputs") / f"{datetime.now():%Y-%m-%d/%H-%M-%S-%f}-{verb}"
    config = compose_line([*([f"+study={verb}"] if verb in options("study") else []), *overrides])
    directory = folder_of(config, "hydra.run.dir")
    # Files of a start that failed, its settings and empty results, do not count, so that it can be started again.
    left = (f for f in directory.rglob("*") if f.is_file() and f.name not in ("config.yaml", "environment.json"))
    if directory.is_file() or any(f.stat().st_size for f in left):
        raise UserError(f"hydra.run.dir={directory}: {_OCCUPIED}")
    return directory


def folder_of(config: DictConfig, key: str) -> Path:
    try:
        return Path(OmegaConf.select(config, key))
    except OmegaConfBaseException as error:
        raise UserError(f"{key}: {str(error.msg or error).splitlines()[0]}") from error


def composed(overrides: list[str], advice: str = "a run takes one") -> TrainConfig:
    """The checked configuration of one run; UserError for the first mistake; ``advice`` is for several values."""
    (line,) = expanded(parse(overrides), False, advice)
    return typed_line(compose_line(line))


@cache  # jobs of a sweep and runs of a reproduction share few choices, and each composition takes 0.1 s
def _settings_of(*chosen: str) -> list[str]:
    """The names of the settings under these choices of groups; Hydra must be initialised."""
    return setting_names(cast(dict[str, Any], OmegaConf.to_container(compose("train", list(chosen)))))


def compose_line(overrides: list[str]) -> DictConfig:
    parsed = parse(overrides)
    chosen = [o.input_line or "" for o in parsed if o.key_or_group in (*groups(), "study") and values_of(o)]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        known = _settings_of(*chosen)
        for override in parsed:
            check_key(override, known)
            if override.key_or_group == "hydra/launcher":
                check_launcher(override.value())
        try:
            config = compose("train", overrides, return_hydra_config=True)
            check_gpus(config)
            return config
        except (HydraException, OmegaConfBaseException) as error:
            cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
            raise UserError(" ".join(str(cause).partition("Config search path")[0].split())) from error


def typed_line(config: DictConfig, without: tuple[str, ...] = ("hydra",)) -> TrainConfig:
    checked = typed(OmegaConf.masked_copy(config, [str(k) for k in config if k not in without]))
    for group in ("task", "model", "solver", "gradient", "dataset", "recipe"):
        name = getattr(checked, group).name
        if name not in options(group):
            raise UserError(f"{group}.name={name}: choose one of {', '.join(options(group))}, as {group}=NAME")
    # Not for recorded runs: an evaluation takes no gradient.
    if checked.gradient.name == "batched_adjoint" and checked.runtime.precision == "bf16":
        why = "batched_adjoint would not be the gradient of a solve in bf16"
        raise UserError(f"runtime.precision=bf16: {why}; use fp32, tf32 or fp64, or gradient=stage_checkpoint")
    return checked
