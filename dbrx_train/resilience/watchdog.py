"""A run that makes no progress is found out, and so is the rank that is behind.

Every rank notes where it is, and a thread tells the others by the launcher's store: which it can do while the
rank itself waits in a collective for ever.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from math import inf
from typing import Any, NamedTuple

__all__ = ["Hangs", "Place", "Progress"]

_TELL_SECONDS = 10.0  # between two signs of life
_STAY_SECONDS = 1.0  # at a place before it is told of
_TURN_SECONDS = 15.0  # for a rank to judge before the next one does


class Place(NamedTuple):
    """Where a rank is in the run."""

    moves: int
    """To get here: equally many are the same place on every rank."""
    step: int
    phase: str
    limit: float | None
    """Seconds that it may stay here; None: any number."""

    def __str__(self) -> str:
        return f"at step {self.step}, {self.phase}"


class Progress:
    """Where this rank is; moved on by the thread that trains, and read by another."""

    def __init__(self) -> None:
        self.place = Place(0, 0, "starting", None)

    def move(self, step: int, phase: str, limit: float | None) -> None:
        """To be called at the same moments on every rank."""
        self.place = Place(self.place.moves + 1, step, phase, limit)


class Hangs:
    """Tells other ranks of this rank's progress, and judges whether all of them have stopped.

    Args:
        progress: of this rank.
        store: one that all ranks share, of torch.distributed; ``prefix`` begins the names used in it.
    """

    def __init__(self, progress: Progress, store: Any, prefix: str, rank: int, ranks: int) -> None:
        self._progress, self._store, self._rank = progress, store, rank
        self._keys = [f"{prefix}/{i}" for i in range(ranks)]
        self._seen = self._told = Place(-1, 0, "", None)
        self._looked = self._told_at = time.monotonic()
        self._judged_at = -inf
        self._stayed = 0.0

    def look(self) -> tuple[str, int] | None:
        """To be called often; tells of a hang (what is to be said, and the rank that is behind) or None."""
        now, place = time.monotonic(), self._progress.place
        # By looks, not by the clock alone: a process that was suspended for hours has not hung.
        self._stayed = self._stayed + min(now - self._looked, 2.0) if place == self._seen else 0.0
        self._seen, self._looked = place, now
        news = place != self._told and self._stayed >= _STAY_SECONDS
        if news or now - self._told_at >= _TELL_SECONDS:
            self._store.set(self._keys[self._rank], json.dumps(place))
            self._told, self._told_at = place, now
        # One rank is enough to judge; the next one does if that one is what hangs.
        if place.limit is None or self._stayed < place.limit + _TURN_SECONDS * self._rank:
            return None
        if now - self._judged_at < _TELL_SECONDS:
            return None
        self._judged_at = now
        return self._judge([self._read(key) for key in self._keys])

    def _read(self, key: str) -> Place | None:
        return Place(*json.loads(self._store.get(key))) if self._store.check([key]) else None

    def _judge(self, places: Sequence[Place | None]) -> tuple[str, int] | None:
        counts = [place.moves if place else -1 for place in places]
        behind = counts.index(min(counts))
        slow, ahead = places[behind], places[counts.index(max(counts))]
        if slow is not None and (slow.limit is None or self._stayed < slow.limit):
            return None  # others may wait for one that saves or evaluates
        said = f"sees no progress for {self._stayed:.0f} s: "
        if min(counts) == max(counts):
            who = "every rank" if len(places) > 1 else "it"
            return f"{said}{who} is {ahead}", behind
        others = [str(rank) for rank, count in enumerate(counts) if count == min(counts)]
        shown = ", ".join(others[:8]) + ("" if len(others) <= 8 else f" and {len(others) - 8} more")
        one = len(others) == 1
        where = f"last seen {slow}" if slow else "never heard of"
        return (
            f"{said}rank{'' if one else 's'} {shown} {'is' if one else 'are'} behind, {where}; "
            f"the foremost is {ahead}"
        ), behind
