"""Reading and writing records: JSON lines, results, and files replaced atomically."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

Row = dict[str, Any]
"""A record, or one line of a file of several: values by name."""


def read_lines(path: Path) -> list[Row]:
    """JSON lines, without lines that a killed process or a full disk left incomplete."""
    lines = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        if line.endswith("\n"):
            with suppress(json.JSONDecodeError):
                lines.append(json.loads(line))
    return lines


def append_line(path: Path, line: Row) -> None:
    """Append a JSON line; if the last line is incomplete, start a new one first."""
    torn = path.exists() and not path.read_text().endswith("\n")
    with path.open("a") as file:
        file.write("\n" * torn + json.dumps(line) + "\n")


def write_atomically(path: Path, content: str | bytes, keep: Path | None = None) -> None:
    """Write next to the file, then move it into place: readers see the old one or the new one.

    File and folder are synced, so that a power failure loses neither.

    Args:
        keep: where to move the old file, if there is one; ``path`` is then absent for a moment.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if keep is not None and path.exists():
        path.replace(keep)
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, record: Any) -> None:
    """Write JSON atomically, with indentation."""
    write_atomically(path, json.dumps(record, indent=2) + "\n")


def read_metrics(directory: Path) -> list[Row]:
    """The lines of ``metrics.jsonl``."""
    return read_lines(directory / "metrics.jsonl")


def read_results(directory: Path) -> Row | None:
    """``results.json``; None before the run has ended."""
    path = directory / "results.json"
    return json.loads(path.read_text()) if path.exists() else None
