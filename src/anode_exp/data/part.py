"""The part of every batch that one of several processes takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """Part ``rank`` of ``size`` parts, which are in order and differ by one entry at most."""

    rank: int = 0
    size: int = 1

    def of(self, n: int) -> slice:
        """Which of n entries."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def count(self, n: int) -> int:
        return len(range(n)[self.of(n)])


WHOLE = Part()
