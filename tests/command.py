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


def _main(arguments: tuple[str, ...], cwd: str, environment: dict[str, str], out: str, err: str) -> None:
    import torch

    gc.freeze()  # what was imported stays: the garbage collector need not check it again
    torch.set_num_threads(1)  # OMP_NUM_THREADS was read when torch was imported
    for file, path in ((sys.stdout, out), (sys.stderr, err)):
        os.dup2(os.open(path, os.O_WRONLY), file.fileno())
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = ["anode_exp", *arguments]
    from anode_exp.__main__ import main

    main()


def command(cwd: Path, *arguments: str, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python -m anode_exp`` with these arguments, in a folder, on one thread.

    Raises subprocess.TimeoutExpired.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("out", "err")]
        for file in files:
            file.touch()
        environment = {**os.environ, **environment}
        process = _forks.Process(target=_main, args=(arguments, str(cwd), environment, *map(str, files)))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(arguments, timeout)
        assert process.exitcode is not None
        return subprocess.CompletedProcess(arguments, process.exitcode, *(file.read_text() for file in files))
