"""Progress on a terminal: bars that disappear when done, and log lines that do not break them."""

import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from tqdm import tqdm


class BarSafeHandler(logging.Handler):
    """Writes messages above any progress bar, to standard output; a traceback goes to the file only."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(record.getMessage(), file=sys.stdout)
            sys.stdout.flush()
        except Exception:
            self.handleError(record)


_run: ContextVar[Path | None] = ContextVar("run", default=None)


def say_nothing() -> None:
    """No bars, and log lines of errors only: another process of the same run shows the rest."""
    global _silent
    _silent = True
    logging.basicConfig(level=logging.ERROR, handlers=[BarSafeHandler()], force=True)


_silent = False


def log_to(*directories: Path) -> None:
    """Send log lines to the terminal and, with times and tracebacks, to ``train.log`` in a run's directory.

    With several runs, each file gets the lines logged within ``logging_for`` its run, and those outside of any.
    """
    if _silent:
        return
    handlers: list[logging.Handler] = [BarSafeHandler()]
    for directory in directories:
        directory.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(directory / "train.log")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        file.addFilter(lambda record, directory=directory: _run.get() in (None, directory))  # type: ignore[misc]
        handlers.append(file)
    logging.basicConfig(level=logging.INFO, handlers=handlers, force=True)


@contextmanager
def logging_for(directory: Path) -> Iterator[None]:
    """Log lines in this context belong to the run in that directory."""
    token = _run.set(directory)
    try:
        yield
    finally:
        _run.reset(token)


def bar(total: int, description: str, done: int = 0, iterable: Iterable[Any] | None = None) -> "tqdm[Any]":
    """A progress bar of steps on standard error, around an iterable if one is given; silent without a terminal."""
    look: dict[str, Any] = {"unit": "step", "leave": False, "dynamic_ncols": True, "disable": _silent or None}
    return tqdm(iterable, total=total, initial=done, desc=description, **look)
