"""Records of a JSON line each, which a killed process or a full disk may leave with a line unfinished."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON lines; what a killed process or a full disk left unfinished is no line."""
    lines = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        if line.endswith("\n"):
            with suppress(json.JSONDecodeError):
                lines.append(json.loads(line))
    return lines


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Add a JSON line, on a line of its own also after one that was left unfinished."""
    torn = path.exists() and not path.read_text().endswith("\n")
    with path.open("a") as file:
        file.write("\n" * torn + json.dumps(line) + "\n")
