"""The parts of a paper's reproduction: figures, methods, seeds, and the run of each combination."""

import json
import shlex
from copy import deepcopy
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import yaml

from anode_exp.config.check import check_used, split_settings
from anode_exp.config.compose import composed
from anode_exp.config.describe import CONF, near, options
from anode_exp.config.schema import ReproduceSettings, TrainConfig
from anode_exp.config.studies import STUDY_READS
from anode_exp.errors import UserError

MOST_SEEDS = 1000


@dataclass(frozen=True)
class Cell:
    """One run of a reproduction, or a study, which has no method, seed or configuration.

    Attributes:
        paper, figure: where the run belongs. ``shown_in`` is the figure of the reproduction that asks for it, which
            differs if reproductions share the run.
        settings: the overrides that compose it, for ``train`` or ``study``.
        of_runs: whether it is a study of its figure's runs, which are in subfolders of its folder.
        optional: whether it is left out if the file of its data set is missing.
    """

    paper: str
    length: str
    figure: str
    directory: Path
    settings: list[str]
    method: str | None = None
    seed: int | None = None
    config: TrainConfig | None = None
    study: str | None = None
    shown_in: str | None = None
    of_runs: bool = False
    optional: bool = False

    @property
    def name(self) -> str:
        if self.method is None:
            return f"{self.figure}, study {self.study}"
        return f"{self.figure}, {self.method}, seed {self.seed}"

    @property
    def command(self) -> str:
        verb = "train" if self.study is None else f"study {self.study}"
        return f"python -m anode_exp {verb} {shlex.join(self.settings)}".rstrip()

    def describe(self) -> str:
        """The content of ``cell.json``, which tells a report where the run belongs."""
        keys = ("paper", "length", "figure", "method", "seed", "study", "settings")
        return json.dumps({**{k: getattr(self, k) for k in keys}, "command": self.command}, indent=2) + "\n"


def specification(paper: str) -> dict[str, Any]:
    """A paper's methods, figures and published numbers, from ``conf/reproduce``; UserError for an unknown paper."""
    if paper not in (papers := options("reproduce")):
        raise UserError(f"{paper}: no such reproduction; choose one of {', '.join(papers)}{near(paper, papers)}")
    text = (CONF / "reproduce" / f"{paper}.yaml").read_text()
    spec = {"name": paper, **cast(dict[str, Any], yaml.safe_load(text))}
    for figure in spec["figures"].values():  # a list of settings may contain a list that figures share
        for key in ("settings", *options("length")):
            parts = [[s] if isinstance(s, str) else s for s in figure.get(key, [])]
            figure[key] = [setting for part in parts for setting in part]
    return spec


def directories(paper: str, length: str, base: Path) -> list[Path]:
    """The folders of a reproduction's runs: its own, and those of reproductions with which it shares runs."""
    figures = specification(paper)["figures"].values()
    papers = dict.fromkeys([paper, *(f["shares"]["paper"] for f in figures if "shares" in f)])
    return [base / of / length for of in papers]


def _chosen(what: str, given: str | None, allowed: list[str]) -> list[str]:
    names = allowed if given is None else given.strip("[]").replace(" ", "").split(",")
    for name in names:
        if name not in allowed:
            raise UserError(f"{what}={name}: choose from {', '.join(allowed)}" + near(name, allowed))
    return [name for name in allowed if name in names]


def _seeds(given: str) -> list[int]:
    """``3`` is seeds 0, 1 and 2; ``[4]`` or ``[0,7]`` names them."""
    listed = given.startswith("[") and given.endswith("]")
    words = given.strip("[]").replace(" ", "").split(",")
    counted = all(word.isdecimal() for word in words) and (listed or len(words) == 1)
    if not counted or (not listed and not 1 <= int(words[0]) <= MOST_SEEDS):
        count = f"give how many, such as 3 for 0, 1 and 2 (at most {MOST_SEEDS})"
        raise UserError(f"seeds={given}: {count}, or list them, such as [0,7]")
    return list(dict.fromkeys(int(word) for word in words)) if listed else list(range(int(words[0])))


def runs(spec: dict[str, Any], seeds: str, figures: list[str], methods: list[str]) -> list[tuple[int, str, str]]:
    """(seed, figure, method) of a paper's runs. Every method has a run of one seed before any has a second.

    Raises UserError for seeds that are not as ``reproduce`` takes them.
    """
    of_figures = [(name, m) for name in figures for m in spec["figures"][name].get("methods", []) if m in methods]
    return [(seed, name, method) for seed in _seeds(seeds) for name, method in of_figures]


def cells(paper: str, arguments: list[str]) -> list[Cell]:
    """The cells in order: studies, runs, studies of runs. Every method has a run of one seed before any has a second.

    Args:
        arguments: ``figure=``, ``method=`` (several separated by commas), ``seeds=``, ``length=``, ``directory=`` (runs
            go to directory/paper/length), and settings for every run. ``launcher=`` has no effect on them.

    Raises UserError for the first mistake.
    """
    spec = specification(paper)
    asked, shared = split_settings(ReproduceSettings, arguments, "reproduce")
    figures = _chosen("figure", asked.figure, list(spec["figures"]))
    methods = _chosen("method", asked.method, list(spec["methods"]))
    of_methods = {setting.partition("=")[0] for m in methods for setting in spec["methods"][m]["settings"]}
    for argument in shared:
        key = argument.partition("=")[0].lstrip("+~")
        if key in ("seed", "experiment") or key.startswith(("hydra.", "hydra/")):
            raise UserError(f"{argument}: chosen by reproduce; give seeds=, directory=, figure= or launcher=")
        if key == "model" or key in of_methods:
            raise UserError(f"{argument}: is set by the figure or method; give figure= or method=")
    lengths = _chosen("length", asked.length, options("length"))
    if len(lengths) > 1:
        raise UserError(f"length={asked.length}: a reproduction has one; run it once for each")
    (length,) = lengths

    base = Path(asked.directory)
    found: list[Cell] = []
    studies: list[Cell] = []
    composed_runs: dict[tuple[str, ...], TrainConfig] = {}  # by their settings without the seed
    for seed, name, method in runs(spec, asked.seeds, figures, methods):
        figure = spec["figures"][name]
        optional = figure.get("needs_file", False) and asked.figure is None
        shares = figure.get("shares", {})
        of, place = paper, name
        if method in shares.get("methods", []):
            of, place = shares["paper"], shares["figure"]
        recipe = [f"experiment={of}/{place}", f"length={length}", *figure.get(length, [])]
        settings = [*recipe, *spec["methods"][method]["settings"], *shared, f"seed={seed}"]
        directory = base / of / length / place / f"{method}_seed-{seed}"
        of_any_seed = tuple(settings[:-1])
        if of_any_seed not in composed_runs:
            composed_runs[of_any_seed] = composed(settings)
        config = replace(deepcopy(composed_runs[of_any_seed]), seed=seed)
        found.append(
            Cell(of, length, place, directory, settings, method, seed, config, shown_in=name, optional=optional)
        )
    for name in figures:
        figure, kind = spec["figures"][name], spec["figures"][name].get("study")
        of_runs = any(cell.shown_in == name for cell in found)
        if kind is None or not (of_runs or (asked.method is None and "methods" not in figure)):
            continue
        taken = ("dataset.root", "runtime.device") if of_runs else (*STUDY_READS[kind], "study.*")
        given = [a for a in shared if any(fnmatchcase(a.partition("=")[0].lstrip("+~"), key) for key in taken)]
        own = [*figure["settings"], *([] if of_runs else figure.get(length, []))]
        settings = [s for s in own if s.partition("=")[0] not in {a.partition("=")[0] for a in given}] + given
        studies.append(Cell(paper, length, name, base / paper / length / name, settings, study=kind, of_runs=of_runs))
    if not found and not studies:
        raise UserError(f"method={asked.method}: none of the chosen figures has it")
    configs = [cell.config for cell in found if cell.config is not None]
    only_runs = [a for a in shared if not any(a in cell.settings for cell in studies)]
    only_runs += [a for a in arguments if a.startswith("seeds=")]
    if only_runs and not configs:
        what = "is a study, which takes no settings of runs and no seeds"
        raise UserError(f"{only_runs[0]}: figure={asked.figure} {what}")
    if configs:
        check_used([a.partition("=")[0].lstrip("+~") for a in shared], configs)
    return [c for c in studies if not c.of_runs] + found + [c for c in studies if c.of_runs]
