"""The command line in a new process, in which torch and the other libraries are already imported.

The process is forked from one that has imported them and done nothing else, so a command takes as long as its own work:
importing them takes five seconds. Tests of what is imported, and of the interpreter's start, start one themselves.
"""

import gc
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

IMPORTED = ["anode_exp.commands.reproduce", "anode_exp.commands.together", "anode_exp.studies.bench",
            "anode_exp.studies.study", "hydra.main", "matplotlib.pyplot", "sklearn.datasets", "torch._dynamo",
            "torch.utils.tensorboard"]  # fmt: skip

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(IMPORTED)


def _main(arguments: tuple[str, ...], cwd: str, environment: dict[str, str], out: str, err: str, first: str) -> None:
    import torch

    gc.freeze()  # what was imported stays: the garbage collector need not check it again
    torch.set_num_threads(1)  # OMP_NUM_THREADS was read when torch was imported
    for file, path in ((sys.stdout, out), (sys.stderr, err)):
        os.dup2(os.open(path, os.O_WRONLY), file.fileno())
    os.fsync = lambda file: None  # no test is about a loss of power
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = ["anode_exp", *arguments]
    exec(first, {})
    from anode_exp.__main__ import main

    main()


class Begun:
    """A command that has begun; its process may be signalled before its end.

    Args:
        first: code that the process runs before the command.
    """

    def __init__(self, cwd: Path, *arguments: str, first: str = "", **environment: str) -> None:
        self.arguments = arguments
        self._folder = tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name) / name for name in ("out", "err")]
        for file in self._files:
            file.touch()
        full = {**os.environ, **environment}
        self.process = _forks.Process(target=_main, args=(arguments, str(cwd), full, *map(str, self._files), first))
        self.process.start()

    def end(self, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Wait for the end. Raises subprocess.TimeoutExpired."""
        with self._folder:
            self.process.join(timeout)
            if self.process.is_alive():
                self.process.kill()
                self.process.join()
                raise subprocess.TimeoutExpired(self.arguments, timeout)
            assert self.process.exitcode is not None
            outputs = (file.read_text() for file in self._files)
            return subprocess.CompletedProcess(self.arguments, self.process.exitcode, *outputs)


def command(
    cwd: Path, *arguments: str, first: str = "", timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess[str]:
    """``python -m anode_exp`` with these arguments, in a folder, on one thread.

    Raises subprocess.TimeoutExpired.
    """
    return Begun(cwd, *arguments, first=first, **environment).end(timeout)
