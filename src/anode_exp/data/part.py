"""The part of every batch that one of several processes takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """Part ``rank`` of ``size`` consecutive parts, whose sizes differ by at most one entry."""

    rank: int = 0
    size: int = 1

    def of(self, n: int) -> slice:
        """The slice of n entries."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def count(self, n: int) -> int:
        return len(range(n)[self.of(n)])


WHOLE = Part()
