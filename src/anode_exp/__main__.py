"""The command line: which module answers a verb, and with which exit code."""

import errno
import os
import sys
from importlib import import_module

from anode_exp.errors import UserError, fail

# Threads that wait for the next of thousands of small kernels: sleeping at once makes a step up to 3 times slower on a
# CPU, spinning for long up to 20 times slower beside another busy process. Read by OpenMP when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""What a disk answers that is full, over a quota or a limit, or broken."""

VERBS = ("train", "evaluate", "study", "bench", "reproduce", "report", "list")
"""Each is a module of ``commands`` with ``ABOUT``, a line, and ``main``, which takes the words after the verb."""


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
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)
    except OSError as error:
        if error.filename is None and error.errno not in DISK:  # writes to an open file do not know its name
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        fail(f"{where}{error.strerror}; choose another folder or make room")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
