"""The runs below any folders, grouped by the settings in which they differ."""

import json
import shlex
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from anode_exp.config.change import differing
from anode_exp.config.check import read_config, typed
from anode_exp.config.describe import flat
from anode_exp.records.cells import COPIES, Record, read_record


def read_runs(folders: Iterable[Path]) -> list[Record]:
    """Every run below the folders that has begun, by folder, without copies next to a report, studies and benchmarks.

    Raises UserError for a configuration that cannot be read.
    """
    found: dict[Path, Record] = {}
    for place in folders:
        for path in sorted(place.rglob("config.yaml")):
            folder = path.parent
            begun = any((folder / name).exists() for name in ("metrics.jsonl", "results.json"))
            if not begun or COPIES in path.relative_to(place).parts[:-1] or folder.resolve() in found:
                continue
            config = typed(read_config(folder))
            cell = {"seed": config.seed, "command": command_of(folder)}
            found[folder.resolve()] = read_record(folder, cell, config)
    return list(found.values())


def command_of(folder: Path) -> str:
    """The command of the run in a folder, which may have started runs of other seeds too."""
    for place in (folder, folder.parent):
        path = place / ".hydra" / "overrides.yaml"
        if path.exists():
            overrides = cast(list[str], OmegaConf.to_container(OmegaConf.load(path)))
            return f"python -m anode_exp train {shlex.join(overrides)}".rstrip()
    if (folder / "cell.json").exists():  # a run of reproduce
        return cast(str, json.loads((folder / "cell.json").read_text())["command"])
    return f"not recorded; the settings are in {folder / 'config.yaml'}"


def grouped(records: list[Record]) -> dict[str, list[Record]]:
    """Runs that differ only in their seed, by the settings that distinguish them from the others: ``key=value, …``.

    Only settings that affect the results count. If several divide the runs in the same way, the first is named: that of
    a group, such as ``gradient=revolve``, comes before the settings that it changes, and ``model.block`` before all: no
    gradient mode is used without ODE blocks.
    """
    configs = [record.config for record in records]
    assert all(config is not None for config in configs)
    whole = cast(list[Any], configs)
    settings = [flat(asdict(config)) for config in whole]
    varied = {key for other in whole[1:] for key in differing(whole[0], other)} - {"seed"}
    names = sorted(varied, key=lambda key: (key != "model.block", not key.endswith(".name"), key))

    def parts(keys: list[str]) -> list[tuple[str, ...]]:
        return [tuple(json.dumps(s.get(key)).strip('"') for key in keys) for s in settings]

    chosen: list[str] = []
    for key in names:
        if len(set(parts([*chosen, key]))) > len(set(parts(chosen))):
            chosen.append(key)
    found: dict[str, list[Record]] = {}
    for record, values in zip(records, parts(chosen), strict=True):
        pairs = zip(chosen, values, strict=True)
        label = ", ".join(f"{key.removesuffix('.name')}={value}" for key, value in pairs if value != "null")
        found.setdefault(label or "as set by default", []).append(record)
    return found
