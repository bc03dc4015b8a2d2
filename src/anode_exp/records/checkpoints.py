"""Checkpoints of a run: replaced atomically, read without running code."""

import logging
import pickle
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from anode_exp.errors import UserError
from anode_exp.records.reading import write_atomically

log = logging.getLogger(__name__)


class Checkpoints:
    """``last.pt``, ``previous.pt`` (the last before it), ``best.pt``, and epochs kept by number, in one folder.

    If the process is killed, each file is whole or absent, and last or previous exists as soon as one was saved.

    Args:
        read_only: save nothing, because another process of the same run does.
    """

    def __init__(self, directory: Path, read_only: bool = False) -> None:
        self.directory, self.read_only = directory, read_only

    def path(self, name: str) -> Path:
        return self.directory / f"{name}.pt"

    def epochs(self) -> list[int]:
        """The epochs kept by number."""
        return sorted(int(path.stem.removeprefix("epoch-")) for path in self.directory.glob("epoch-*.pt"))

    def save(self, state: dict[str, Any], best: bool = False, epoch: int | None = None) -> None:
        """Save the state as last. If it is the best, save it as best first, so that a run resumed from last has it.

        Args:
            epoch: keep the network under this number too, without what only a resumed run needs.

        Raises UserError if it cannot be written; earlier checkpoints are kept.
        """
        if self.read_only:
            return
        to_save = {"best": state} if best else {}
        if epoch is not None:
            to_save[f"epoch-{epoch}"] = {key: state[key] for key in ("progress", "network", "averaged")}
        for name, content in {**to_save, "last": state}.items():
            keep = self.path("previous") if name == "last" else None
            data = BytesIO()  # torch's own file writer fails on a full disk with an internal assertion
            torch.save(content, data)
            try:
                write_atomically(self.path(name), data.getvalue(), keep)
            except OSError as error:
                remedy = f"make room, then continue with train resume={self.directory.parent}"
                raise UserError(f"{self.path(name)}: cannot be written ({error.strerror}); {remedy}") from error

    def load(self, name: str = "last") -> dict[str, Any] | None:
        """The named checkpoint, on the CPU, or None if there is none. If ``last`` is truncated, the previous one.

        Raises UserError if there are files but none can be read.
        """
        names = ["last", "previous"] if name == "last" else [name]
        paths = [path for path in map(self.path, names) if path.exists()]
        for path in paths:
            try:
                state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
                state["progress"]
            except (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
                log.warning(f"{path}: truncated or not a checkpoint ({type(error).__name__})")
                continue
            if path != paths[0]:
                log.warning(f"using {path} instead")
            return state
        if paths:
            raise UserError(f"{', '.join(map(str, paths))}: truncated or not a checkpoint; nothing to continue from")
        return None
