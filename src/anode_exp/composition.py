"""Composing a command line's configurations before anything runs, so that every mistake gets one clear line."""

from __future__ import annotations

import difflib
import re
import shutil
import textwrap
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from anode_exp.config import (
    TEST_BATCH_SIZE,
    BenchSettings,
    StudyConfig,
    TrainConfig,
    check_used,
    read_config,
    split_settings,
    typed,
    typed_study,
)
from anode_exp.errors import UserError

_PACKAGED = Path(__file__).parent / "conf"
CONF = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[2] / "conf"
"""conf/: inside the package when installed, at the top of the repository when editable."""

_OCCUPIED = "already holds files; nothing is overwritten, choose another folder"

LONGEST_NAME = 180
"""Characters of a job's folder name: file systems allow 255 bytes, and the job's number comes before."""


def path_safe(*parts: object) -> str:
    """The parts that are not empty, joined by ``_``; ``-`` for what a shell or Hydra would want quoted."""
    text = "_".join(str(part) for part in parts if part != "")
    return re.sub(r"[^A-Za-z0-9_.+-]", "-", text)[:LONGEST_NAME]


OmegaConf.register_new_resolver("path_safe", path_safe, replace=True)


def options(group: str) -> list[str]:
    """The choices of a configuration group, from its files."""
    names = (f.relative_to(CONF / group).with_suffix("").as_posix() for f in (CONF / group).rglob("[!_]*.yaml"))
    return sorted(name for name in names if not name.startswith("thorough/"))


PRESETS = ("experiment", "length", "compat")
"""Groups that change settings of other groups, and may be left out."""


def groups() -> list[str]:
    return sorted(d.name for d in CONF.iterdir() if d.is_dir() and d.name not in ("hydra", "study", "reproduce"))


@dataclass(frozen=True)
class About:
    """What the head of a configuration file says: its commands, indented there, and a description in sentences."""

    commands: list[str]
    text: str

    @property
    def line(self) -> str:
        """The first sentence."""
        return re.split(r"(?<!Fig)(?<!Figs)(?<!Sec)\. ", self.text)[0].rstrip(".;")


def about(group: str, option: str) -> About:
    """A configuration file's own words."""
    head = []
    for line in (CONF / group / f"{option}.yaml").read_text().splitlines():
        if not line.startswith("#"):
            break
        if "@package" not in line:
            head.append(line.removeprefix("#"))
    return About(
        [line.strip() for line in head if line.startswith("   ")],
        " ".join(line.strip() for line in head if not line.startswith("   ")),
    )


def comments(path: Path) -> dict[str, str]:
    """What a configuration file says of each of its settings, by dotted key from the top of the configuration."""
    found: dict[str, str] = {}
    text = path.read_text()
    group = path.relative_to(CONF).parts[:-1]
    package = () if "@package _global_" in text else group
    parents: list[tuple[int, str]] = []
    key = ""
    for line in text.splitlines():
        setting = re.match(r"( *)([\w.]+):", line)
        words = re.search(r"(?:^|\s)#\s+(.*)", line)
        if setting:
            parents = [(indent, name) for indent, name in parents if indent < len(setting[1])]
            key = ".".join([*package, *(name for _, name in parents), setting[2]])
            parents.append((len(setting[1]), setting[2]))
            if words:
                found[key] = words[1]
        elif words and line.startswith(" ") and key in found:
            found[key] += f" {words[1]}"
    return found


def described(config: DictConfig, files: Iterable[Path]) -> list[tuple[str, str]]:
    """Rows of help: every setting of a configuration as ``key=value``, and what the files say of it."""
    said: dict[str, str] = {}
    for file in files:
        said |= comments(file) if file.exists() else {}
    plain = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    rows = []
    for key, value in _flat(plain).items():
        if key.partition(".")[2] != "name":
            shown = str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
            rows.append((f"{key}={shown.replace(', ', ',')}", said.get(key, "")))
    return rows


def composed_settings(overrides: list[str]) -> DictConfig:
    """A configuration as composed, for its help.

    Raises:
        UserError: for a setting that cannot be composed.
    """
    first = _lines(overrides, _parse(overrides), True, "")[0]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = _compose(first)
    return OmegaConf.masked_copy(config, [str(k) for k in config if k != "hydra"])


def wrapped(text: str, indent: int = 0) -> str:
    """Text in lines as wide as the terminal."""
    room = max(30, shutil.get_terminal_size((120, 24)).columns - indent)
    return "\n".join(textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False)) or ""


def two_columns(rows: Iterable[tuple[str, str]], indent: int = 2) -> str:
    """Names, and what is said of each, in columns as wide as the terminal allows."""
    rows = list(rows)
    wide = max((len(name) for name, _ in rows), default=0)
    wide = min(wide, 44)
    lines = []
    for name, text in rows:
        first, *others = wrapped(text, indent + wide + 2).split("\n")
        if len(name) > wide:
            lines.append(" " * indent + name)
            name = ""
        lines.append(f"{' ' * indent}{name:<{wide}}  {first}".rstrip())
        lines += [" " * (indent + wide + 2) + line for line in others]
    return "\n".join(lines)


def catalogue() -> str:
    """Every group's choices, each with the first sentence of its file."""
    parts = []
    for group in [*groups(), "study", "reproduce"]:
        head = f"{group}=" if group in groups() else f"{group} NAME"
        parts.append(f"{head}\n{two_columns((option, about(group, option).line) for option in options(group))}")
    return "\n\n".join(parts)


def near(word: str, allowed: Iterable[str]) -> str:
    """A hint at the nearest allowed word, or nothing; ``lr`` is near ``recipe.lr``."""
    allowed = list(allowed)
    found = [a for a in allowed if a.rpartition(".")[2] == word] or difflib.get_close_matches(
        word, allowed, n=1, cutoff=0.6
    )
    return f"; did you mean {found[0]}?" if found else ""


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
    parsed = _parse(overrides)
    _check_folders(parsed, ("hydra.sweep.dir", "hydra.sweep.subdir") if multirun else ("hydra.run.dir",))
    lines = _lines(overrides, parsed, multirun, "add -m for a sweep over them")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = [_compose(line) for line in lines]
    key = "hydra.sweep.dir" if multirun else "hydra.run.dir"
    directory = _folder_of(composed[0], key)
    # What a start that failed leaves behind, such as one without its data, may be started over.
    files = (f.relative_to(directory) for f in directory.rglob("*") if f.is_file())
    if any(f.name != "train.log" and ".hydra" not in f.parts for f in files):
        raise UserError(f"{key}={directory}: {_OCCUPIED}")
    configs = [_typed(config) for config in composed]
    check_used(_given(parsed), configs)
    return Jobs(
        configs=configs,
        directory=directory,
        given=any(override.get_key_element() == key for override in parsed),
        fixed=sorted(
            {o.get_key_element() for o in parsed} - {o.get_key_element() for o in parsed if o.is_sweep_override()}
        ),
    )


_DATA = ("dataset", "dataset.root", "dataset.download", "dataset.train_size", "dataset.validation_size",
         "dataset.mean", "dataset.std")  # fmt: skip
STUDY_READS: dict[str, tuple[str, ...]] = {
    "memory": ("experiment", "model", "model.*", "solver", "solver.n_steps", *_DATA, "seed",
               "runtime.device", "runtime.precision", "runtime.channels_last", "runtime.cuda_graph",
               "runtime.cudnn_benchmark"),
    "budget": ("experiment", "model", "model.*", "solver", "solver.n_steps", *_DATA, "seed",
               "runtime.device", "runtime.precision", "runtime.channels_last", "runtime.cuda_graph",
               "runtime.cudnn_benchmark"),
    "gradient_error": ("experiment", "model", "model.*", "solver.max_evaluations", "solver.min_step", *_DATA, "seed",
                       "runtime.device"),
    "reversibility": ("experiment", "solver", "solver.n_steps", *_DATA[:-2], "seed", "runtime.device"),
    "evolution": (),
    "batchnorm": ("dataset.root", "dataset.download", "runtime.device"),
}  # fmt: skip
"""The settings, besides its own, that each study uses. What a run brings with it is not to be set beside it."""


def study(name: str, overrides: list[str], thorough: bool = False) -> tuple[TrainConfig, StudyConfig]:
    """The checked settings of a study, and of the networks and data it measures.

    Args:
        thorough: the values of ``conf/study/thorough`` in place of the defaults.

    Raises:
        UserError: for the first thing wrong, in one line.
    """
    if name not in options("study"):
        raise UserError(
            f"study {name}: there is no such study; choose one of {', '.join(options('study'))}"
            + near(name, options("study"))
        )
    parsed = _parse(overrides)
    _check_folders(parsed, ("hydra.run.dir",))
    _lines(overrides, parsed, False, "a study takes one; its own lists are written [1,2]")
    grid = [f"+study/thorough={name}"] if thorough else []
    if thorough and not (CONF / "study" / "thorough" / f"{name}.yaml").exists():
        raise UserError(f"thorough=true: study {name} has one grid; leave it out")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = _compose([f"+study={name}", *grid, *overrides])
    config = _typed(composed, without=("hydra", "study"))
    checked = typed_study(composed.study)
    for group, names in (("solver", checked.solvers), ("gradient", [g.name for g in checked.gradients.values()])):
        for unknown in set(names) - set(options(group)):
            raise UserError(f"study {name}: {unknown} is no {group}; choose from {', '.join(options(group))}")
    if "run" in composed.study and checked.run is None and any(k == "study.checkpoint" for k in _given(parsed)):
        raise UserError(f"checkpoint={checked.checkpoint}: needs run=DIR, the folder of a trained run")
    if "study.name" in _given(parsed):
        raise UserError("study.name: chosen by the word after study; leave it out")
    if "batch_size" in composed.study and checked.batch_size is None:
        raise UserError("study.batch_size=null: give a whole number, at least 1")
    for grids in (
        ("gradients",),
        ("n_steps", "blocks_per_stage") if name == "memory" else ("solvers", "adaptive_solvers"),
    ):
        if grids[0] in composed.study and not any(composed.study.get(grid) for grid in grids):
            raise UserError(f"study.{grids[0]}: is empty, so there is nothing to measure; list some")
    if thorough and checked.checkpoint == "every":
        raise UserError("thorough=true: checkpoint=every takes the run's own solver; leave one of them out")
    reads = STUDY_READS[name]
    if checked.run is not None:
        reads = tuple(
            r for r in reads if r.startswith(("solver", "runtime")) or r in ("dataset.root", "dataset.download")
        )
    of_run = ("study.solvers", "study.n_steps", "study.adaptive_solvers", "study.tolerances", "solver.*")
    for override in parsed:
        key = _key(override)
        if checked.checkpoint == "every" and any(fnmatchcase(key, pattern) for pattern in of_run):
            raise UserError(f"{key}: checkpoint=every takes the run's own solver; leave it out")
        if not any(fnmatchcase(key, pattern) for pattern in (*reads, "study.*", "hydra.run.dir")):
            taken = ", ".join((*(k for k in composed.study if k != "name"), *reads))
            who = f"study {name}" + (" with run=DIR" if checked.run is not None else "")
            raise UserError(f"{key}: {who} does not use it; it uses {taken}")
    if checked.run is not None:
        folders = checked.run.split(",") if name == "batchnorm" else [checked.run]
        recorded, *_ = [typed(read_config(Path(f))) for f in folders]
        for key in ("root", "download"):
            if f"dataset.{key}" in _given(parsed):
                setattr(recorded.dataset, key, getattr(config.dataset, key))
        config = replace(config, model=recorded.model, dataset=recorded.dataset, seed=recorded.seed)
        if checked.checkpoint == "every" or name == "batchnorm":
            config = replace(config, solver=recorded.solver)
    elif name == "batchnorm":
        raise UserError("study batchnorm: needs run=DIR, or run=DIR,DIR for several trained with runtime.keep_every=1")
    if name == "evolution" and (checked.run is None or config.model.evolution == "none"):
        raise UserError("study evolution: needs run=DIR, a run with model.evolution=reaction_diffusion_advection")
    given = _given(parsed)
    adaptive = ("study.tolerances", "study.adaptive_solvers", "solver.max_evaluations", "solver.min_step")
    if name == "gradient_error":  # which names its solvers itself
        joint = config.model.evolution != "none" and config.model.evolution_coupling == "joint"
        for key in (k for k in given if k in adaptive):
            if joint or (not checked.adaptive_solvers and key != "study.adaptive_solvers"):
                need = "model.evolution_coupling other than joint" if joint else "study.adaptive_solvers"
                raise UserError(f"{key}: has no effect here; it needs {need}")
        given = [key for key in given if not key.startswith("solver")]
    check_used(given, [config])
    return config, checked


BASELINES = {
    "eager": "a plain loop: contiguous layout, images on the device, no graph",
    "dataloader": "the same, fed by torchvision's DataLoader with 4 workers",
    "torch_checkpoint": "this project's step with torch.utils.checkpoint around each block",
}
NOT_TIMED = (
    *("length", "recipe.epochs", "recipe.max_steps", "recipe.test_batch_size", "recipe.lr", "recipe.milestones"),
    *("recipe.gamma", "recipe.schedule", "recipe.warmup_epochs", "recipe.evolution_lr", "recipe.restart_momentum"),
    *("recipe.moving_average", "runtime.check_every", "runtime.keep_every", "runtime.sync_debug", "dataset.test_size"),
)
"""Settings of a run that are no part of its training step, as ``bench`` times it."""


def bench_entries(arguments: list[str]) -> tuple[list[tuple[str, TrainConfig, str | None]], int]:
    """What ``bench`` compares: (label, configuration, baseline) each, and how many rounds.

    ``compare=[…]`` lists overrides, several in one entry separated by spaces, beside those that all entries share;
    ``baseline=NAME`` among them is one of ``BASELINES``. Without it the project's step stands beside all of those.

    Raises:
        UserError: for the first thing wrong, in one line.
    """
    own_settings, shared = split_settings(BenchSettings, arguments, "bench")
    try:
        compare = yaml.safe_load(own_settings.compare)
    except yaml.YAMLError:
        compare = None
    if not isinstance(compare, list) or not all(isinstance(entry, str) for entry in compare):
        raise UserError(
            f"compare={own_settings.compare}: give a list of settings, such as "
            "compare='[gradient=dto_checkpoint, gradient=full_backprop solver=rk4]'"
        )
    entries: list[tuple[str, TrainConfig, str | None]] = []
    for key in _given(_parse(shared)):
        if key.startswith(("hydra.", "hydra/")) and key != "hydra.run.dir":
            raise UserError(f"{key}: bench does not use it; give hydra.run.dir=DIR")
    for label in compare or ["", *(f"baseline={name}" for name in BASELINES)]:
        own = label.split()
        named = [word.partition("=")[2] for word in own if word.startswith("baseline=")]
        for name in named:
            if name not in BASELINES:
                raise UserError(f"baseline={name}: choose one of {', '.join(BASELINES)}" + near(name, BASELINES))
        settings = [word for word in own if not word.startswith("baseline=")]
        config = composed([*shared, *settings], "list them in compare")
        check_used(_given(_parse(settings)), [config])
        if len(named) > 1:
            raise UserError(f"compare: {label} names two baselines; write an entry for each")
        own_step = ("gradient*", "runtime.compile", "runtime.cuda_graph", "runtime.channels_last")
        for key in _given(_parse(settings)):
            if key.startswith(("hydra.", "hydra/")):
                raise UserError(f"{key}: not a setting of an entry; give hydra.run.dir=DIR to bench itself")
            unused = own_step[:-1] if named == ["torch_checkpoint"] else own_step[1:]
            if named and any(fnmatchcase(key, pattern) for pattern in unused):
                raise UserError(f"{key}: baseline={named[0]} does not use it; leave it out of its entry")
        for key in _given(_parse([*shared, *settings])):
            if key in NOT_TIMED:
                raise UserError(f"{key}: bench times training steps, of which it is no part; leave it out")
        if config.gradient.name == "budget":
            raise UserError("gradient=budget: its plan is no step of its own; see study budget")
        if config.seeds > 1 and named:
            raise UserError(f"baseline={named[-1]}: takes one seed; set seeds=1")
        entries.append((label or "as composed", config, named[-1] if named else None))
    check_used(_given(_parse(shared)), [config for _, config, _ in entries])
    if len({label for label, *_ in entries}) < len(entries):
        raise UserError("compare: names the same entry twice")
    if len({(c.runtime.device, c.runtime.precision == "tf32", c.runtime.cudnn_benchmark) for _, c, _ in entries}) > 1:
        raise UserError(
            "compare: one process runs on one device, with TF32 or without, with runtime.cudnn_benchmark or without; "
            "compare those in two runs"
        )
    return entries, own_settings.rounds


def folder(overrides: list[str], verb: str) -> Path:
    """Where a study or a benchmark writes: ``hydra.run.dir`` if it is among the settings, else a new one.

    Raises:
        UserError: if it is not empty.
    """
    if "hydra.run.dir" not in _given(_parse(overrides)):
        return Path("outputs") / f"{datetime.now():%Y-%m-%d/%H-%M-%S-%f}-{verb}"
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = _compose([*([f"+study={verb}"] if verb in options("study") else []), *overrides])
    directory = _folder_of(config, "hydra.run.dir")
    # What a start that failed leaves behind, its settings and no results, may be started over.
    left = (f for f in directory.rglob("*") if f.is_file() and f.name not in ("config.yaml", "environment.json"))
    if directory.is_file() or any(f.stat().st_size for f in left):
        raise UserError(f"hydra.run.dir={directory}: {_OCCUPIED}")
    return directory


def _folder_of(config: DictConfig, key: str) -> Path:
    try:
        return Path(OmegaConf.select(config, key))
    except OmegaConfBaseException as error:
        raise UserError(f"{key}: {str(error.msg or error).splitlines()[0]}") from error


MAY_CHANGE_ON_RESUME = (
    "recipe.epochs",
    "dataset.root",
    "dataset.download",
    "runtime.check_every",
    "runtime.keep_every",
    "runtime.cuda_graph",
    "runtime.sync_debug",
)
"""Settings that change no number of the epochs already done, or of those to come."""

MAY_CHANGE_TO_EVALUATE = ("solver", "dataset", "runtime", "recipe.test_batch_size", "model.statistics")


def composed(overrides: list[str], advice: str = "a run takes one") -> TrainConfig:
    """The checked configuration of one run.

    Args:
        advice: for who lists several values.

    Raises:
        UserError: for the first thing wrong, in one line.
    """
    (line,) = _lines(overrides, _parse(overrides), False, advice)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return _typed(_compose(line))


def differing(recorded: TrainConfig, asked: TrainConfig) -> list[str]:
    """Settings in which two runs differ that change a number of them."""
    mine, theirs = (_flat(asdict(config)) for config in (recorded, asked))
    free = {*MAY_CHANGE_ON_RESUME, "runtime.device"} - {"recipe.epochs"}
    batch = "recipe.test_batch_size"
    mine[batch], theirs[batch] = mine[batch] or TEST_BATCH_SIZE, theirs[batch] or TEST_BATCH_SIZE
    if not asked.solver.adaptive:  # then it changes no accuracy
        free.add(batch)
    return sorted(k for k in mine.keys() | theirs.keys() if k not in free and mine.get(k) != theirs.get(k))


def resumed(directory: Path, overrides: list[str]) -> TrainConfig:
    """The configuration of a recorded run, to go on with.

    Raises:
        UserError: if there is no run, or a setting is to change that may not.
    """
    parsed = _parse(overrides)
    (line,) = _lines(overrides, parsed, False, "a run goes on with one")
    _check_hydra(parsed, "a resumed run continues in its own folder")
    recorded = read_config(directory)
    config = _recomposed(recorded, line, MAY_CHANGE_ON_RESUME, "a resumed run")
    check_used(_given(parsed), [config])
    if config.recipe.schedule == "cosine" and config.recipe.epochs != recorded.recipe.epochs:
        raise UserError(
            f"recipe.epochs={config.recipe.epochs}: a cosine schedule depends on it, and this run's has "
            f"{recorded.recipe.epochs}; train anew for another length"
        )
    return config


def evaluations(directory: Path, overrides: list[str]) -> list[TrainConfig]:
    """A recorded run's configuration under every combination of the given solvers, steps and data sets.

    Raises:
        UserError: if there is no run, or a setting is to change that the trained weights depend on.
    """
    base = read_config(directory)
    parsed = _parse(overrides)
    _check_hydra(parsed, "an evaluation is recorded in the run's own folder")
    lines = _lines(overrides, parsed, True, "")
    configs = [_recomposed(base, line, MAY_CHANGE_TO_EVALUATE, "an evaluation") for line in lines]
    check_used(_given(parsed), configs)
    return configs


def check_evaluation(overrides: list[str], calibrate: int) -> None:
    """Refuse settings that may change, and that an evaluation does not use.

    Raises:
        UserError: for the first of them.
    """
    for key in _given(_parse(overrides)):
        if key in ("dataset.train_size", "dataset.validation_size", "dataset.crop_padding", "dataset.flip"):
            if not calibrate:
                raise UserError(f"{key}: of training images, which an evaluation uses only with calibrate=N")
        elif key.startswith("runtime.") and key not in (
            "runtime.device",
            "runtime.precision",
            "runtime.channels_last",
            "runtime.cudnn_benchmark",
        ):
            raise UserError(f"{key}: of training steps; an evaluation takes none, leave it out")


def _key(override: Override) -> str:
    return str(override.get_key_element()).lstrip("+~")


def _given(parsed: list[Override]) -> list[str]:
    return [_key(override) for override in parsed]


def _check_folders(parsed: list[Override], used: tuple[str, ...]) -> None:
    """Refuse Hydra's folders where nothing is written to them."""
    for key in _given(parsed):
        if key in ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir") and key not in used:
            raise UserError(f"{key}: not used here; {f'give {used[0]}=DIR' if used else 'leave it out'}")


def _check_hydra(parsed: list[Override], why: str) -> None:
    for override in parsed:
        if override.key_or_group.split(".")[0].split("/")[0] == "hydra":
            raise UserError(f"{override.input_line}: {why}; leave it out")


def _lines(overrides: list[str], parsed: list[Override], multirun: bool, advice: str) -> list[list[str]]:
    """The overrides of every job: one, or the product of what lists several values."""
    for override in parsed:
        _check_group(override)
        if override.is_sweep_override() and not multirun:
            raise UserError(f"{override.input_line}: names several values; {advice}")
    if not multirun:
        return [overrides]
    return [line for batch in BasicSweeper.split_arguments(parsed, None) for line in batch]


def _recomposed(base: DictConfig, overrides: list[str], may_change: tuple[str, ...], who: str) -> TrainConfig:
    base = OmegaConf.create(asdict(typed(base)))  # with the settings that are newer than the run
    changed = base.copy()
    parsed = _parse(overrides)
    for override in parsed:
        key = override.get_key_element()
        if key in PRESETS:
            raise UserError(f"{override.input_line}: a preset is for a new run; give the settings to change")
        if key in groups():
            with initialize_config_dir(str(CONF), version_base="1.3"):
                whole = OmegaConf.to_container(compose("train", [f"{key}={override.value()}"]), resolve=True)
            changed[key] = cast(dict[str, Any], whole)[key]
    for override in parsed:
        if _key(override) not in groups():
            _check_key(override, _keys(cast(dict[str, Any], OmegaConf.to_container(changed))))
            OmegaConf.update(changed, _key(override), override.value())
    before, after = (_flat(cast(dict[str, Any], OmegaConf.to_container(c))) for c in (base, changed))
    for key in sorted(before.keys() | after.keys()):
        allowed = any(key == k or key.startswith(k + ".") for k in may_change)
        if not allowed and before.get(key) != after.get(key):
            raise UserError(
                f"{key}={after.get(key)}: this run has {before.get(key)}; {who} may change {', '.join(may_change)}"
            )
    return typed(changed)


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    return {
        path: leaf
        for key, value in settings.items()
        for path, leaf in (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        ).items()
    }


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
    if group not in groups():
        return
    if group in PRESETS and (override.is_delete() or override.value() is None):
        raise UserError(f"{override.input_line}: {group} is a preset; leave it out for none")
    if override.is_delete():
        raise UserError(f"{override.input_line}: a run needs a {group}; choose one of {', '.join(options(group))}")
    for value in _values(override):
        if value not in options(group):
            raise UserError(
                f"{group}={value}: there is no such {group}; choose one of {', '.join(options(group))}"
                + near(value, options(group))
            )


def _keys(settings: dict[str, Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for key, value in settings.items():
        found.append(f"{prefix}{key}")
        if isinstance(value, dict):
            found += _keys(value, f"{prefix}{key}.")
    return found


def _check_key(override: Override, known: list[str]) -> None:
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


def _compose(overrides: list[str]) -> DictConfig:
    parsed = _parse(overrides)
    chosen = [o.input_line or "" for o in parsed if o.key_or_group in (*groups(), "study") and _values(o)]
    known = _keys(cast(dict[str, Any], OmegaConf.to_container(compose("train", chosen))))
    for override in parsed:
        _check_key(override, known)
    try:
        return compose("train", overrides, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
        raise UserError(" ".join(str(cause).partition("Config search path")[0].split())) from error


def _typed(config: DictConfig, without: tuple[str, ...] = ("hydra",)) -> TrainConfig:
    checked = typed(OmegaConf.masked_copy(config, [str(k) for k in config if k not in without]))
    for group in ("model", "solver", "gradient", "dataset", "recipe"):
        name = getattr(checked, group).name
        if name not in options(group):
            raise UserError(f"{group}.name={name}: choose one of {', '.join(options(group))}, as {group}=NAME")
    return checked
