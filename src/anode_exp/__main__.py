"""The command line: runs the module of a verb and sets the exit code."""

import errno
import os
import sys
from importlib import import_module

from anode_exp.errors import UserError, fail

# How long idle OpenMP threads spin before they sleep. On a CPU, a step of thousands of small kernels is up to 3 times
# slower if they sleep at once, and up to 20 times slower if they spin long next to another busy process. OpenMP reads
# this when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""Errors of a disk that is full, over a quota or a size limit, or broken."""

VERBS = ("train", "evaluate", "study", "bench", "reproduce", "report", "list")
"""Each is a module of ``commands`` with a one-line ``ABOUT`` and ``main``, which takes the arguments after the verb."""


def help_page() -> str:
    from anode_exp.commands.arguments import help_text

    return help_text(
        "VERB [KEY=VALUE …]",
        "Trains networks whose layers are ODE solves, and measures what each gradient mode costs.",
        [
            ("verbs, each with --help", [(verb, import_module(f"anode_exp.commands.{verb}").ABOUT) for verb in VERBS]),
            ("flags", [("-h, --help", "this page"), ("--version", "versions of this program, Python, torch and CUDA")]),
        ],
        [
            "train experiment=digits                     # a small real run, no download",
            "train model=squeezenext solver=rk2          # the paper's network on CIFAR-10",
            "train -m gradient=full_backprop,dto_checkpoint,reverse_adjoint",
        ],
        "Runs are recorded under outputs/; watch them with: tensorboard --logdir outputs",
    )


def main() -> None:
    """Entry point of ``python -m anode_exp`` and ``anode-exp``.

    Exit codes: 0 completed or diverged, 1 a bug, 2 the user's mistake, 130 and 143 interrupted.
    """
    verb, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    try:
        if verb in ("-h", "--help", "help"):
            print(help_page())
        elif verb == "--version":
            from anode_exp.commands.arguments import version

            print(version())
        elif not verb:
            raise UserError(f"no verb given; verbs are {', '.join(VERBS)}; see python -m anode_exp --help")
        elif verb not in VERBS:
            from anode_exp.config.describe import near

            hint = f"; did you mean: python -m anode_exp train {verb} …" if "=" in verb or verb.startswith("-") else ""
            raise UserError(f"{verb}: no such verb; verbs are {', '.join(VERBS)}{hint or near(verb, VERBS)}")
        elif verb != "train" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(f"{verb}: torchrun is for train; start {verb} as one process")
        else:
            import_module(f"anode_exp.commands.{verb}").main(arguments)
    except UserError as error:
        fail(str(error))
    except BrokenPipeError:  # the reader of the pipe, such as head, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)
    except OSError as error:
        if error.filename is None and error.errno not in DISK:  # an error in writing to an open file has no file name
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        fail(f"{where}{error.strerror}; choose another folder or make room")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
