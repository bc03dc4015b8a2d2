"""Composing a command line's configurations before anything runs, so that every mistake gets one clear line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from anode_exp.config import TrainConfig, typed
from anode_exp.errors import UserError

_PACKAGED = Path(__file__).parent / "conf"
CONF = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[2] / "conf"
"""conf/: inside the package when installed, at the top of the repository when editable."""

LONGEST_NAME = 180
"""Characters of a job's folder name: file systems allow 255 bytes, and the job's number comes before."""


def path_safe(text: str) -> str:
    """text with every character that a shell would want quoted replaced by ``-``."""
    return re.sub(r"[^A-Za-z0-9_.,=+-]", "-", text)[:LONGEST_NAME]


OmegaConf.register_new_resolver("path_safe", path_safe, replace=True)


def options(group: str) -> list[str]:
    """The choices of a configuration group, from its files."""
    return sorted(f.relative_to(CONF / group).with_suffix("").as_posix() for f in (CONF / group).rglob("[!_]*.yaml"))


def groups() -> list[str]:
    return sorted(d.name for d in CONF.iterdir() if d.is_dir() and d.name != "hydra")


def near(word: str, allowed: Iterable[str]) -> str:
    """A hint at the nearest allowed word, or nothing."""
    found = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.6)
    return f"; did you mean {found[0]}?" if found else ""


def jobs(overrides: list[str], multirun: bool) -> list[TrainConfig]:
    """The checked configuration of every job that a command line asks for.

    Raises:
        UserError: for the first thing wrong, in one line.
    """
    parsed = _parse(overrides)
    for override in parsed:
        _check_group(override)
    if not multirun:
        for override in parsed:
            if override.is_sweep_override():
                raise UserError(f"{override.input_line}: names several values; add -m for a sweep over them")
        lines = [overrides]
    else:
        lines = [line for batch in BasicSweeper.split_arguments(parsed, None) for line in batch]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = [_compose(line) for line in lines]
    key = "hydra.sweep.dir" if multirun else "hydra.run.dir"
    directory = Path(OmegaConf.select(composed[0], key))
    # What a start that failed leaves behind, such as one without its data, may be started over.
    if directory.is_dir() and {entry.name for entry in directory.iterdir()} - {".hydra", "train.log"}:
        raise UserError(f"{key}={directory}: already holds files; nothing is overwritten, choose another folder")
    return [_typed(config) for config in composed]


def fixed_keys(overrides: list[str]) -> list[str]:
    """The settings of a sweep that are the same in every job."""
    return [
        override.get_key_element().lstrip("+~") for override in _parse(overrides) if not override.is_sweep_override()
    ]


def _parse(overrides: list[str]) -> list[Override]:
    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        try:
            parsed += parser.parse_overrides([text])
        except HydraException as error:
            if "=" not in text:
                raise UserError(f"{text}: not a setting; settings are key=value, such as solver.n_steps=4") from error
            raise UserError(
                f"{text}: cannot be read as key=value; quote special characters, as in 'key=\"a value\"'"
            ) from error
    return parsed


def _values(override: Override) -> list[str]:
    if override.is_choice_sweep():
        return [str(v) for v in override.sweep_string_iterator()]
    return [] if override.is_sweep_override() or override.is_delete() else [str(override.value())]


def _check_group(override: Override) -> None:
    group = override.key_or_group
    if group not in groups() or (group == "experiment" and override.value() is None):
        return
    if override.is_delete():
        raise UserError(f"{override.input_line}: a run needs a {group}; choose one of {', '.join(options(group))}")
    for value in _values(override):
        if value not in options(group):
            raise UserError(
                f"{group}={value}: there is no such {group}; choose one of {', '.join(options(group))}"
                + near(value, options(group))
            )


def _keys(settings: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in settings.items():
        found.append(f"{prefix}{key}")
        if isinstance(value, dict):
            found += _keys(value, f"{prefix}{key}.")
    return found


def _check_key(override: Override, overrides: list[Override]) -> None:
    """Refuse a setting that the chosen groups do not have."""
    key = override.get_key_element().lstrip("+~")
    if key.split(".")[0] == "hydra" or "/" in key or key in groups():
        return
    chosen = [f"{o.key_or_group}={_values(o)[0]}" for o in overrides if o.key_or_group in groups() and _values(o)]
    known = _keys(cast(dict[str, Any], OmegaConf.to_container(compose("train", chosen))))
    if key not in known:
        parent = key.rpartition(".")[0]
        siblings = [k for k in known if parent and k.startswith(parent + ".")] or [k for k in known if "." not in k]
        raise UserError(f"{key}: there is no such setting; there are {', '.join(siblings)}" + near(key, known))
    if override.is_delete() or override.is_add():
        raise UserError(f"{override.input_line}: settings can be changed, not added or removed; write {key}=VALUE")


def _compose(overrides: list[str]) -> DictConfig:
    parsed = _parse(overrides)
    for override in parsed:
        _check_key(override, parsed)
    try:
        return compose("train", overrides, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
        raise UserError(" ".join(str(cause).partition("Config search path")[0].split())) from error


def _typed(config: DictConfig) -> TrainConfig:
    checked = typed(OmegaConf.masked_copy(config, [str(k) for k in config if k != "hydra"]))
    for group in ("model", "solver", "gradient", "dataset"):
        name = getattr(checked, group).name
        if name not in options(group):
            raise UserError(f"{group}.name={name}: choose one of {', '.join(options(group))}, as {group}=NAME")
    return checked
