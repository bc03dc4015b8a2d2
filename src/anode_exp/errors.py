"""Exceptions for mistakes that the user can fix, and how they are reported."""

import os
import sys
from contextlib import suppress
from typing import NoReturn


class UserError(Exception):
    """A mistake that the user can fix. The message says what was given, what is allowed and what to do next."""


class InUse(UserError):
    """Another process is writing this run or study; leave it to that process."""


class Ended(UserError):
    """The run has ended and cannot be continued."""


class OtherProcessFailed(RuntimeError):
    """Another process that trains the same network failed or has ended; its own output says why."""


def is_first_process() -> bool:
    """Whether this process is the first of those that torchrun started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def fail(message: str) -> NoReturn:
    """Print the message of a user's mistake on one line, and exit with code 2.

    Before the processes of torchrun have joined, all of them find the same mistake, so only the first prints it. After
    that, the process that finds a mistake prints it.
    """
    with suppress(OSError):  # standard output may be on the full disk that is reported
        sys.stdout.flush()
    distributed = sys.modules.get("torch.distributed")
    joined = distributed is not None and distributed.is_initialized()
    if joined or is_first_process():
        print(f"anode_exp: {message}", file=sys.stderr)
    sys.exit(2)
