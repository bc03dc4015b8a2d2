"""The groups and options in conf/, and their descriptions in its files."""

import difflib
import re
import shutil
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf

_PACKAGED = Path(__file__).parents[1] / "conf"

CONF = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[3] / "conf"
"""conf/: inside the package when installed, at the top of the repository when editable."""


def options(group: str) -> list[str]:
    """The choices of a configuration group, from its files."""
    names = (f.relative_to(CONF / group).with_suffix("").as_posix() for f in (CONF / group).rglob("[!_]*.yaml"))
    return sorted(name for name in names if not name.startswith("thorough/"))


PRESETS = ("experiment", "length", "compat")
"""Groups that change settings of other groups, and may be left out."""


def groups() -> list[str]:
    return sorted(d.name for d in CONF.iterdir() if d.is_dir() and d.name not in ("hydra", "study", "reproduce"))


def files_of(group: str, option: str) -> list[Path]:
    """An option's file, after the files of its group that it includes."""
    path = CONF / group / f"{option}.yaml"
    defaults = (yaml.safe_load(path.read_text()) or {}).get("defaults", [])
    bases = [entry.partition("@")[0] for entry in defaults if isinstance(entry, str)]
    return [file for base in bases if base != "_self_" for file in files_of(group, base)] + [path]


@dataclass(frozen=True)
class About:
    """The head of a configuration file: its commands, which are indented there, and its description."""

    commands: list[str]
    text: str

    @property
    def line(self) -> str:
        """The first sentence."""
        return re.split(r"(?<!Fig)(?<!Figs)(?<!Sec)\. ", self.text)[0].rstrip(".;")


def about(group: str, option: str) -> About:
    """Read the head of a configuration file."""
    head = []
    for line in (CONF / group / f"{option}.yaml").read_text().splitlines():
        if not line.startswith("#"):
            break
        if "@package" not in line:
            head.append(line.removeprefix("#"))
    commands = [line.strip() for line in head if line.startswith("   ")]
    return About(commands, " ".join(line.strip() for line in head if not line.startswith("   ")))


def comments(path: Path) -> dict[str, str]:
    """A configuration file's comments on its settings, by dotted key from the top of the configuration."""
    found: dict[str, str] = {}
    text = path.read_text()
    package = () if "@package _global_" in text else path.relative_to(CONF).parts[:-1]
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
    """Rows of help: every setting of a configuration as ``key=value``, and the files' comment on it."""
    said: dict[str, str] = {}
    for file in files:
        said |= comments(file) if file.exists() else {}
    plain = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    rows = []
    for key, value in flat(plain).items():
        if key.partition(".")[2] != "name":
            shown = str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
            rows.append((f"{key}={shown.replace(', ', ',')}", said.get(key, "")))
    return rows


def wrapped(text: str, indent: int = 0) -> str:
    """Text in lines as wide as the terminal."""
    room = max(30, shutil.get_terminal_size((120, 24)).columns - indent)
    return "\n".join(textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False)) or ""


def two_columns(rows: Iterable[tuple[str, str]], indent: int = 2) -> str:
    """Names and their descriptions, in two columns as wide as the terminal allows."""
    rows = list(rows)
    wide = min(44, max((len(name) for name, _ in rows), default=0))
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
    found = [a for a in allowed if a.rpartition(".")[2] == word] or difflib.get_close_matches(word, allowed, n=1)
    return f"; did you mean {found[0]}?" if found else ""


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted key."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
