"""Composing a command line's configurations before anything runs, so that every mistake gets one clear line."""

import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from anode_exp.config.check import check_used, typed
from anode_exp.config.describe import CONF, groups, options
from anode_exp.config.overrides import check_folders, check_key, expanded, given_keys, parse, setting_names, values_of
from anode_exp.config.schema import TrainConfig
from anode_exp.errors import UserError

_OCCUPIED = "already holds files; nothing is overwritten, choose another folder"

LONGEST_NAME = 180
"""Characters of a job's folder name: file systems allow 255 bytes, and the job's number comes before."""


def path_safe(*parts: object) -> str:
    """The parts that are not empty, joined by ``_``; ``-`` for what a shell or Hydra would want quoted."""
    text = "_".join(str(part) for part in parts if part != "")
    return re.sub(r"[^A-Za-z0-9_.+-]", "-", text)[:LONGEST_NAME]


OmegaConf.register_new_resolver("path_safe", path_safe, replace=True)


def composed_settings(overrides: list[str]) -> DictConfig:
    """A configuration as composed, for its help; UserError for a setting that cannot be composed."""
    first = expanded(overrides, parse(overrides), True, "")[0]
    with initialize_config_dir(str(CONF), version_base="1.3"):
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
    """Compose and check all of a command line before any of it runs.

    Raises:
        UserError: for the first thing wrong, in one line.
    """
    parsed = parse(overrides)
    check_folders(parsed, ("hydra.sweep.dir", "hydra.sweep.subdir") if multirun else ("hydra.run.dir",))
    lines = expanded(overrides, parsed, multirun, "add -m for a sweep over them")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = [compose_line(line) for line in lines]
    key = "hydra.sweep.dir" if multirun else "hydra.run.dir"
    directory = folder_of(composed[0], key)
    # What a start that failed leaves behind, such as one without its data, may be started over.
    files = (f.relative_to(directory) for f in directory.rglob("*") if f.is_file())
    if any(f.name != "train.log" and ".hydra" not in f.parts for f in files):
        raise UserError(f"{key}={directory}: {_OCCUPIED}")
    configs = [typed_line(config) for config in composed]
    check_used(given_keys(parsed), configs)
    return Jobs(
        configs=configs,
        directory=directory,
        given=any(override.get_key_element() == key for override in parsed),
        fixed=sorted(
            {o.get_key_element() for o in parsed} - {o.get_key_element() for o in parsed if o.is_sweep_override()}
        ),
    )


def folder(overrides: list[str], verb: str) -> Path:
    """Where a study or a benchmark writes: ``hydra.run.dir`` if it is among the settings, else a new one.

    Raises:
        UserError: if it is not empty.
    """
    if "hydra.run.dir" not in given_keys(parse(overrides)):
        return Path("outputs") / f"{datetime.now():%Y-%m-%d/%H-%M-%S-%f}-{verb}"
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose_line([*([f"+study={verb}"] if verb in options("study") else []), *overrides])
    directory = folder_of(config, "hydra.run.dir")
    # What a start that failed leaves behind, its settings and no results, may be started over.
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
    """The checked configuration of one run.

    Args:
        advice: for who lists several values.

    Raises:
        UserError: for the first thing wrong, in one line.
    """
    (line,) = expanded(overrides, parse(overrides), False, advice)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return typed_line(compose_line(line))


def compose_line(overrides: list[str]) -> DictConfig:
    parsed = parse(overrides)
    chosen = [o.input_line or "" for o in parsed if o.key_or_group in (*groups(), "study") and values_of(o)]
    known = setting_names(cast(dict[str, Any], OmegaConf.to_container(compose("train", chosen))))
    for override in parsed:
        check_key(override, known)
    try:
        return compose("train", overrides, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
        raise UserError(" ".join(str(cause).partition("Config search path")[0].split())) from error


def typed_line(config: DictConfig, without: tuple[str, ...] = ("hydra",)) -> TrainConfig:
    checked = typed(OmegaConf.masked_copy(config, [str(k) for k in config if k not in without]))
    for group in ("model", "solver", "gradient", "dataset", "recipe"):
        name = getattr(checked, group).name
        if name not in options(group):
            raise UserError(f"{group}.name={name}: choose one of {', '.join(options(group))}, as {group}=NAME")
    return checked
