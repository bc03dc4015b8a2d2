"""Reading a command line's overrides, so that every mistake gets one clear line."""

from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from anode_exp.config.describe import PRESETS, groups, near, options
from anode_exp.errors import UserError


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


def expanded(overrides: list[str], parsed: list[Override], multirun: bool, advice: str) -> list[list[str]]:
    """The overrides of every job: one, or the product of what lists several values."""
    for override in parsed:
        check_group(override)
        if override.is_sweep_override() and not multirun:
            raise UserError(f"{override.input_line}: names several values; {advice}")
    if not multirun:
        return [overrides]
    return [line for batch in BasicSweeper.split_arguments(parsed, None) for line in batch]


def parse(overrides: list[str]) -> list[Override]:
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
    for value in values_of(override):
        if value not in options(group):
            raise UserError(
                f"{group}={value}: there is no such {group}; choose one of {', '.join(options(group))}"
                + near(value, options(group))
            )


def setting_names(settings: dict[str, Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for key, value in settings.items():
        found.append(f"{prefix}{key}")
        if isinstance(value, dict):
            found += setting_names(value, f"{prefix}{key}.")
    return found


def check_key(override: Override, known: list[str]) -> None:
    """Refuse a setting that the chosen groups do not have."""
    key = override.get_key_element().lstrip("+~")
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
