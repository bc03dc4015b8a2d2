"""The one exception that means: the user can mend this."""

import os
import sys
from contextlib import suppress
from typing import NoReturn


class UserError(Exception):
    """What was got, what is allowed, what to do next."""


class InUse(UserError):
    """Another process is writing this run; leave it to that process."""


class Ended(UserError):
    """The run is over; there is nothing to go on with."""


class OtherProcessFailed(RuntimeError):
    """Another process that trains the same network failed or is gone; its own output says why."""


def fail(message: str) -> NoReturn:
    """Answer a user's mistake: one line, and exit code 2.

    Processes that torchrun started find the same mistake until they have joined: the first says it. Later ones are
    those of one process, which says them itself.
    """
    with suppress(OSError):  # a full disk below standard output may be what is reported
        sys.stdout.flush()
    distributed = sys.modules.get("torch.distributed")
    joined = distributed is not None and distributed.is_initialized()
    if joined or os.environ.get("RANK", "0") == "0":
        print(f"anode_exp: {message}", file=sys.stderr)
    sys.exit(2)
