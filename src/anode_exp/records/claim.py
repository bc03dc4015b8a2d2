"""One process at a time writes to a folder."""

import fcntl
from pathlib import Path
from typing import TextIO

from anode_exp.errors import InUse


def claim(directory: Path, what: str) -> TextIO:
    """Claim a folder for this process until the returned file is closed, or the process ends, in any way.

    Raises InUse if another process has claimed it to write ``what``.
    """
    lock = (directory / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise InUse(f"{directory}: another process is writing this {what}; wait for it, or stop it") from error
    return lock
