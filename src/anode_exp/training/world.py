"""The processes that train one network together."""

from collections.abc import Iterable

from torch import Tensor


class World:
    """One process, so far: what several would exchange stays as it is.

    A training step and the trainer ask this class wherever the answer depends on all processes, and nothing else knows
    of them.

    Attributes:
        rank: this process's number, from 0; process 0 writes records.
        size: how many there are.
    """

    rank, size = 0, 1

    def mean_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its mean over all processes."""

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over all processes."""

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return flag


ALONE = World()
