"""Progress on a terminal: bars that vanish when done, and log lines that do not break them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm


class BarSafeHandler(logging.Handler):
    """Writes log records above any progress bar, to standard output."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except Exception:
            self.handleError(record)


class OneLine(logging.Formatter):
    """The message alone: a traceback belongs in the file, not on the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return record.getMessage()


def log_to(directory: Path) -> None:
    """Send log lines to the terminal and, with times and tracebacks, to ``train.log`` in a run's directory."""
    directory.mkdir(parents=True, exist_ok=True)
    terminal = BarSafeHandler()
    terminal.setFormatter(OneLine())
    file = logging.FileHandler(directory / "train.log")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[terminal, file], force=True)


def bar(total: int, description: str, done: int = 0, iterable: Iterable[Any] | None = None) -> tqdm[Any]:
    """A progress bar of steps on standard error, around an iterable if one is given; silent without a terminal."""
    return tqdm(
        iterable,
        total=total,
        initial=done,
        desc=description,
        unit="step",
        leave=False,
        dynamic_ncols=True,
        disable=None,
    )
