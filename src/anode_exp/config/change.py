"""Which settings of a recorded run may change, on resume and for an evaluation."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from anode_exp.config.check import check_used, read_config, typed
from anode_exp.config.compose import check_hydra, check_key, expanded, given_keys, key_of, parse, setting_names
from anode_exp.config.describe import CONF, PRESETS, flat, groups
from anode_exp.config.schema import TEST_BATCH_SIZE, TrainConfig
from anode_exp.errors import UserError

MAY_CHANGE_ON_RESUME = ("recipe.epochs", "dataset.root", "dataset.download", "runtime.check_every",
                        "runtime.keep_every", "runtime.cuda_graph", "runtime.sync_debug")  # fmt: skip
"""Settings that do not affect the results of the epochs already done, or of those to come."""

_SAME_GRADIENT = ("full_backprop", "dto_checkpoint", "step_checkpoint", "stage_checkpoint", "revolve", "equispaced")
"""Modes between which a resumed run may change: they differ in memory and time, and in their gradient by rounding."""
_SAME_WEIGHTS = ("fp32", "tf32", "bf16")
"""Precisions between which a resumed run may change: weights and momentum are float32."""

MAY_CHANGE_TO_EVALUATE = ("solver", "dataset", "runtime", "recipe.test_batch_size", "model.statistics")
_RUNTIME_OF_EVALUATION = ("runtime.device", "runtime.precision", "runtime.channels_last", "runtime.cudnn_benchmark")


def differing(recorded: TrainConfig, asked: TrainConfig) -> list[str]:
    """The settings that differ between two runs and affect their results."""
    mine, theirs = (flat(asdict(config)) for config in (recorded, asked))
    free = {*MAY_CHANGE_ON_RESUME, "runtime.device"} - {"recipe.epochs"}
    batch = "recipe.test_batch_size"
    mine[batch], theirs[batch] = mine[batch] or TEST_BATCH_SIZE, theirs[batch] or TEST_BATCH_SIZE
    if not asked.solver.adaptive:  # then it does not affect the accuracy
        free.add(batch)
    return sorted(k for k in mine.keys() | theirs.keys() if k not in free and mine.get(k) != theirs.get(k))


def may_change_on_resume(key: str) -> bool:
    """Whether a setting that affects results may change, within limits, when a run is resumed: see ``resumed``."""
    return key.startswith("gradient.") or key == "runtime.precision"


def resumed(directory: Path, overrides: list[str]) -> TrainConfig:
    """The configuration with which a recorded run continues.

    Besides ``MAY_CHANGE_ON_RESUME``, two settings may change for another device: the gradient mode, between
    ``full_backprop`` and its checkpointed forms, and the precision, while the weights stay float32.

    Raises UserError if there is no run, or if a setting changes that may not change.
    """
    parsed = parse(overrides)
    (line,) = expanded(parsed, False, "a resumed run takes one")
    check_hydra(parsed, "a resumed run continues in its own folder")
    recorded = read_config(directory)
    given = given_keys(parsed)
    settings = [key for key in given if key.startswith("gradient.")]
    if settings and "gradient" not in given:
        raise UserError(f"{settings[0]}: give gradient=NAME with it; its other settings are then those of a new run")
    allowed = (*MAY_CHANGE_ON_RESUME, "gradient", "runtime.precision")
    config, before = _recomposed(recorded, line, allowed, "a resumed run"), typed(recorded)
    old, new = before.gradient, config.gradient
    if old != new and not {old.name, new.name} <= {*_SAME_GRADIENT}:
        may = f"a resumed run may change it between {', '.join(_SAME_GRADIENT)}"
        raise UserError(f"gradient={new.name}: this run has {old.name}; {may}")
    was, asked = before.runtime.precision, config.runtime.precision
    if was != asked and (old.name == "budget" or not {was, asked} <= {*_SAME_WEIGHTS}):
        may = f"a resumed run may change it between {', '.join(_SAME_WEIGHTS)}, if it has no byte budget"
        raise UserError(f"runtime.precision={asked}: this run has {was}; {may}")
    check_used(given_keys(parsed), [config])
    if config.recipe.schedule == "cosine" and config.recipe.epochs != recorded.recipe.epochs:
        why = f"a cosine schedule depends on it, and this run's has {recorded.recipe.epochs}"
        raise UserError(f"recipe.epochs={config.recipe.epochs}: {why}; start a new run for another length")
    return config


def evaluations(directory: Path, overrides: list[str]) -> list[TrainConfig]:
    """A recorded run's configuration under every combination of the given solvers, steps and data sets.

    Raises UserError if there is no run, or if a setting changes that the trained weights depend on.
    """
    base = read_config(directory)
    parsed = parse(overrides)
    check_hydra(parsed, "an evaluation is recorded in the run's own folder")
    lines = expanded(parsed, True, "")
    configs = [_recomposed(base, line, MAY_CHANGE_TO_EVALUATE, "an evaluation") for line in lines]
    check_used(given_keys(parsed), configs)
    return configs


def check_evaluation(overrides: list[str], calibrate: int) -> None:
    """Refuse settings that may change but that an evaluation does not use; UserError for the first of them."""
    for key in given_keys(parse(overrides)):
        if key in ("dataset.train_size", "dataset.validation_size", "dataset.crop_padding", "dataset.flip"):
            if not calibrate:
                raise UserError(f"{key}: is for training images, which an evaluation uses only with calibrate=N")
        elif key.startswith("runtime.") and key not in _RUNTIME_OF_EVALUATION:
            raise UserError(f"{key}: is for training steps, which an evaluation does not take; leave it out")


def _recomposed(base: DictConfig, overrides: list[str], may_change: tuple[str, ...], who: str) -> TrainConfig:
    base = OmegaConf.create(asdict(typed(base)))  # adds the settings that are newer than the run
    changed = base.copy()
    parsed = parse(overrides)
    for override in parsed:
        key = override.get_key_element()
        if key in PRESETS:
            raise UserError(f"{override.input_line}: a preset is for a new run; give the settings to change")
        if key in groups():
            with initialize_config_dir(str(CONF), version_base="1.3"):
                whole = OmegaConf.to_container(compose("train", [f"{key}={override.value()}"]), resolve=True)
            changed[key] = cast(dict[str, Any], whole)[key]
    for override in parsed:
        group, _, rest = key_of(override).partition(".")
        if group in groups() and rest == "name":
            raise UserError(f"{override.input_line}: give {group}={override.value()}")
        if key_of(override) not in groups():
            check_key(override, setting_names(cast(dict[str, Any], OmegaConf.to_container(changed))))
            OmegaConf.update(changed, key_of(override), override.value())
    before, after = (flat(cast(dict[str, Any], OmegaConf.to_container(c))) for c in (base, changed))
    for key in sorted(after):  # settings that an option's files do not name keep the schema's value
        allowed = any(key == k or key.startswith(k + ".") for k in may_change)
        if not allowed and before.get(key) != after.get(key):
            allows = f"{who} may change {', '.join(may_change)}"
            raise UserError(f"{key}={after.get(key)}: this run has {before.get(key)}; {allows}")
    return typed(changed)
