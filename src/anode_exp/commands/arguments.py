"""Parsing the arguments of a verb: ``--help``, and settings as ``key=value``."""

import argparse
import sys
from collections.abc import Iterable
from dataclasses import fields
from importlib.metadata import version as of
from typing import Any, NoReturn

from anode_exp.config.describe import two_columns, wrapped
from anode_exp.errors import UserError

PROGRAM = "python -m anode_exp"
Tables = Iterable[tuple[str, list[tuple[str, str]]]]
"""Rows of two columns under their titles."""


class Parser(argparse.ArgumentParser):
    """argparse that reports a mistake on one line, which names ``--help``."""

    def __init__(self, verb: str, *positionals: str) -> None:
        super().__init__(prog=f"{PROGRAM} {verb}", add_help=False, allow_abbrev=False)
        for name in positionals:
            self.add_argument(name, nargs="?", metavar=name.upper())
        self.add_argument("settings", nargs="*", metavar="KEY=VALUE")
        self.add_argument("-h", "--help", action="store_true")

    def error(self, message: str) -> NoReturn:
        words = message.removeprefix("unrecognized arguments: ")
        if words != message:
            message = f"{words}: there is no such flag; settings are key=value"
        raise UserError(f"{message}; see {self.prog} --help")


def own_settings(schema: type, names: Iterable[str] | None = None) -> list[tuple[str, str]]:
    """Rows of help for a verb's own settings: ``key=default`` and what it means."""
    chosen = [f for f in fields(schema) if names is None or f.name in names]
    return [(f"{f.name}={_shown(f.default)}", f.metadata["help"]) for f in chosen]


def _shown(value: Any) -> str:
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def help_text(usage: str, about: str, parts: Tables = (), examples: Iterable[str] = (), notes: str = "") -> str:
    """A page of help: usage, what the verb does, tables of settings, notes, and commands to copy."""
    text = [f"usage: {PROGRAM} {usage}", wrapped(about)]
    text += [f"{title}\n{two_columns(rows)}" for title, rows in parts if rows]
    text += [wrapped(notes)] if notes else []
    lines = [f"  {PROGRAM} {example}" for example in examples]
    text += ["\n".join(["examples", *lines])] if lines else []
    return "\n\n".join(text)


def version() -> str:
    """Versions of this program, Python, torch, CUDA and torchvision, on one line."""
    import torch

    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    own = f"anode_exp {of('anode_exp')}, Python {sys.version.split()[0]}"
    return f"{own}, torch {torch.__version__} with {cuda} ({device}), torchvision {of('torchvision')}"
