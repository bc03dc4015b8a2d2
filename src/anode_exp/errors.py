"""The one exception that means: the user can mend this."""

import sys
from contextlib import suppress
from typing import NoReturn


class UserError(Exception):
    """What was got, what is allowed, what to do next."""


class InUse(UserError):
    """Another process is at it; it may be left to that."""


class Ended(UserError):
    """The run is over; there is nothing to go on with."""


def fail(message: str) -> NoReturn:
    """Answer a user's mistake: one line, exit code 2."""
    with suppress(OSError):  # a full disk below standard output may be what is reported
        sys.stdout.flush()
    print(f"anode_exp: {message}", file=sys.stderr)
    sys.exit(2)
