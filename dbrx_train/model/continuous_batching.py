"""Continuous batching: many prompts of any lengths are continued at once, and one that is done makes room for
the next (Orca, OSDI 2022).

Prompts are read in chunks between the steps of those that are being continued, so that these never wait for
long. What prompts have in common is read once: several samples of one prompt, or questions after the same
examples.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from dbrx_train.model.decoder import Dbrx
from dbrx_train.model.generation import check_options, sample
from dbrx_train.model.slot_cache import SlotCache

__all__ = ["ContinuousBatch", "Request", "Token", "complete"]

_WORTH_SHARING = 32  # tokens; a prompt waits for one that is being read to read so many for it


@dataclass(frozen=True)
class Request:
    """A prompt and how it is to be continued."""

    prompt: Sequence[int]
    max_new_tokens: int
    temperature: float = 0.0
    """0: the likeliest token."""
    top_p: float = 1.0
    seed: int = 0
    """Of its random numbers, one a token: what is drawn does not depend on what else is in the batch."""
    stop_ids: Collection[int] = ()
    """Tokens that end it; the one that did is its last."""
    is_done: Callable[[list[int]], bool] = lambda ids: False
    """Says of the new tokens so far whether they are enough."""


class Token(NamedTuple):
    """A new token of a request."""

    key: int
    token: int
    is_last: bool


@dataclass
class _Slot:
    """A request at work, or what one has left."""

    request: Request | None = None
    key: int = -1
    read: list[int] = field(default_factory=list)
    """The prompt but for its last token, which is what the first new token follows from."""
    filled: int = 0
    """How many tokens the cache holds of it."""
    new: list[int] = field(default_factory=list)
    random: random.Random = field(default_factory=random.Random)

    @property
    def is_reading(self) -> bool:
        return self.request is not None and self.filled < len(self.read)

    @property
    def is_writing(self) -> bool:
        return self.request is not None and self.filled >= len(self.read)


class ContinuousBatch:
    """Requests that one model continues together.

    Args:
        slots: how many are at work at a time; each has room in the cache for ``capacity`` tokens, prompt and
            new ones.
        chunk: tokens of prompts that a forward pass reads at most.
    """

    def __init__(self, model: Dbrx, slots: int, capacity: int, chunk: int = 512) -> None:
        if slots < 1:
            raise ValueError(f"slots: must be at least 1, not {slots}")
        if not 2 <= capacity <= model.config.max_seq_len:
            raise ValueError(
                f"capacity: must be at least 2 and at most max_seq_len {model.config.max_seq_len}, "
                f"not {capacity}"
            )
        self.model, self.chunk = model, chunk
        self.device = model.input_device
        self.cache = SlotCache(model.config.n_layers, slots, capacity, self.device)
        self.slots = [_Slot() for _ in range(slots)]
        self.queue: deque[tuple[int, Request]] = deque()
        self._reads_next = True

    def add(self, key: int, request: Request) -> None:
        """Take a request up, or queue it; its tokens come under ``key``.

        Raises:
            ValueError: it cannot fit, or an option is out of range.
        """
        check_options(
            len(request.prompt),
            request.max_new_tokens,
            self.cache.capacity,
            request.temperature,
            request.top_p,
        )
        self.queue.append((key, request))

    @property
    def is_idle(self) -> bool:
        """Whether all is done."""
        return not self.queue and all(slot.request is None for slot in self.slots)

    @torch.no_grad()
    def step(self) -> list[Token]:
        """One forward pass: a chunk of prompts, or a token more for each request that is past its prompt.

        With nothing to do it is a pass of one token, for a sharded model is run by all ranks or none.
        """
        self._admit()
        reading = [i for i, slot in enumerate(self.slots) if slot.is_reading]
        writing = [i for i, slot in enumerate(self.slots) if slot.is_writing]
        if reading and (self._reads_next or not writing):
            self._reads_next = False
            self._read(reading)
            return []
        self._reads_next = True
        if writing:
            return self._write(writing)
        self.model(torch.zeros(1, 1, dtype=torch.long, device=self.device))
        return []

    def _admit(self) -> None:
        """Give free slots to requests, with what other slots already hold of their prompts."""
        free = [i for i, slot in enumerate(self.slots) if slot.request is None]
        while self.queue and free:
            key, request = self.queue[0]
            read = list(request.prompt[:-1])
            shared, source = max((_shared(slot, read), -i) for i, slot in enumerate(self.slots))
            source = -source
            held = min(shared, self.slots[source].filled)
            if shared - held >= _WORTH_SHARING:
                return
            target = source if source in free else free[0]
            free.remove(target)
            if held and target != source:
                self.cache.copy(source, target, held)
            self.slots[target] = _Slot(request, key, read, held, [], random.Random(request.seed))
            self.queue.popleft()

    def _read(self, reading: list[int]) -> None:
        longest = max(len(self.slots[i].read) - self.slots[i].filled for i in reading)
        width = min(longest, self.chunk)
        rows = reading[: max(1, self.chunk // width)]
        parts = [self.slots[i].read[self.slots[i].filled :][:width] for i in rows]
        self._forward(rows, parts, [])
        for i, part in zip(rows, parts, strict=True):
            self.slots[i].filled += len(part)

    def _write(self, writing: list[int]) -> list[Token]:
        rows = list(range(writing[0], writing[-1] + 1))  # those between are computed for nothing
        parts: list[list[int]] = [[] for _ in rows]
        for i in writing:
            slot = self.slots[i]
            assert slot.request is not None
            parts[i - rows[0]] = [slot.new[-1] if slot.new else slot.request.prompt[-1]]
        logits = self._forward(rows, parts, [i - rows[0] for i in writing])
        requests = [slot.request for i in writing if (slot := self.slots[i]).request]
        drawn = sample(
            logits,
            [request.temperature for request in requests],
            [request.top_p for request in requests],
            [self.slots[i].random.random() for i in writing],
        ).tolist()
        found = [self._take(self.slots[i], token) for i, token in zip(writing, drawn, strict=True)]
        self._close_gaps()
        return found

    def _take(self, slot: _Slot, token: int) -> Token:
        request = slot.request
        assert request is not None
        slot.filled += 1
        slot.new.append(token)
        is_last = (
            len(slot.new) >= request.max_new_tokens or token in request.stop_ids or request.is_done(slot.new)
        )
        if is_last:
            # What is held of the prompt may serve another.
            slot.request, slot.filled = None, min(slot.filled, len(slot.read))
        return Token(slot.key, token, is_last)

    def _close_gaps(self) -> None:
        """Once nothing waits for a slot, have those at work lie together."""
        while not self.queue:
            busy = [i for i, slot in enumerate(self.slots) if slot.request is not None]
            free = next((i for i, slot in enumerate(self.slots) if slot.request is None), len(self.slots))
            if not busy or free > busy[-1]:
                return
            self.cache.copy(busy[-1], free, self.slots[busy[-1]].filled)
            self.slots[free], self.slots[busy[-1]] = self.slots[busy[-1]], _Slot()

    def _forward(self, rows: list[int], parts: list[list[int]], at: list[int]) -> torch.Tensor:
        """Logits [len(at), V] of the first token of the rows ``at``; all tokens are kept in the cache."""
        layout = self.cache.begin(rows, [self.slots[i].filled for i in rows], [len(part) for part in parts])
        width = layout.positions.shape[1]
        ids = torch.tensor([part + [0] * (width - len(part)) for part in parts], device=self.device)
        places = torch.tensor(at, dtype=torch.long, device=self.device) * width
        logits: torch.Tensor | None = self.model(
            ids, cache=self.cache, layout=layout, logits_at=places
        ).logits
        assert logits is not None
        return logits


def _shared(slot: _Slot, read: list[int]) -> int:
    """How many tokens a slot's prompt and another one begin with alike."""
    other, low, high = slot.read, 0, min(len(slot.read), len(read))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if other[low:middle] == read[low:middle] else (low, middle - 1)
    return low


def complete(
    batch: ContinuousBatch,
    requests: Iterable[tuple[int, Request]],
    go_on: Callable[[bool], bool] = bool,
) -> Iterator[tuple[int, list[int]]]:
    """The new tokens of each numbered request, as they are done.

    ``go_on`` hears before each step whether this process has something left to do, and says whether any has.
    """
    new: dict[int, list[int]] = {}
    for key, request in requests:
        new[key] = []
        batch.add(key, request)
    while go_on(not batch.is_idle):
        for key, token, is_last in batch.step():
            new[key].append(token)
            if is_last:
                yield key, new.pop(key)
