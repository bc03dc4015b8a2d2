"""Signals that ask a run to stop."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class StopRequest:
    """The signal that asked to stop, or None."""

    signal: int | None = None


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """SIGINT and SIGTERM ask training to stop after the current step; a second signal ends the process at once."""
    stop = StopRequest()

    def request(number: int, frame: FrameType | None) -> None:
        if stop.signal is not None:
            sys.stdout.flush()
            os._exit(128 + number)
        stop.signal = number

    try:
        before = {s: signal.signal(s, request) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread, where the interpreter allows no handlers
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
