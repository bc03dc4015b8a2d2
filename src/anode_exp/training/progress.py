"""Progress on a terminal: bars that vanish when done, and log lines that do not break them."""

from __future__ import annotations

import logging
import sys
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


def bar(total: int, description: str, unit: str = "step") -> tqdm[Any]:
    """A progress bar on standard error; silent where that is no terminal."""
    return tqdm(total=total, desc=description, unit=unit, leave=False, dynamic_ncols=True, disable=None)
