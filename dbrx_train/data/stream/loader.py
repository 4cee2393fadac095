"""From samples to a batch of tensors."""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dbrx_train.data.stream.dataset import ScheduledDataset
from dbrx_train.data.stream.worker_signals import ignore_signals_of_others
from dbrx_train.model.documents import document_starts
from dbrx_train.model.loss import IGNORE_INDEX

__all__ = ["Batch", "Count", "TimedLoader", "build_loader", "collate", "document_ids"]

Batch: TypeAlias = dict[str, Any]
"""Tensors, and lists of numbers that the host needs; each with an entry a sample."""
Count: TypeAlias = Callable[[Batch], Tensor]
"""(batch) -> [batch], how many terms of the loss each sample has."""

_LONGEST_TEMPORARY = 75
"""Of the 107 characters that a Unix socket's path may have, less those of multiprocessing's names."""


def document_ids(tokens: Tensor, eos_id: int) -> Tensor:
    """Number the documents within each sample from 0; an eos token belongs to the document that it ends.

    ``tokens`` is [..., sequence]; the result is int64 and alike.
    """
    ends = (tokens == eos_id).long()
    return ends.cumsum(-1) - ends


def collate(
    samples: Sequence[dict[str, Any]], *, eos_id: int, pad_id: int, count: Count | None = None
) -> Batch:
    """Batch samples: ``input_ids``, ``labels`` and ``document_ids``, int64 [batch, sequence].

    ``document_starts`` [batch, documents] is what the model would otherwise ask a GPU for, and ``loss_terms``
    what ``count`` says, as a list: a loader's process has them in the host's memory.
    ``source`` and ``sample_id`` [batch] say where each is from. The labels are the inputs: the loss
    shifts them. In samples that come with a ``loss`` mask, labels are -100 where it is False, and padding
    belongs to document -1. What samples have as ``reference`` is stacked.
    """
    tokens = torch.stack([torch.as_tensor(sample["tokens"]) for sample in samples])
    labels, documents = tokens.clone(), document_ids(tokens, eos_id)
    for row, sample in enumerate(samples):
        if "loss" in sample:
            labels[row, ~torch.as_tensor(sample["loss"])] = IGNORE_INDEX
            documents[row, tokens[row] == pad_id] = -1
    references = [torch.as_tensor(sample["reference"]) for sample in samples if "reference" in sample]
    batch: Batch = {
        "input_ids": tokens,
        "labels": labels,
        "document_ids": documents,
        "document_starts": document_starts(documents),
        "source": torch.tensor([sample["source"] for sample in samples]),
        "sample_id": torch.tensor([sample["sample_id"] for sample in samples]),
    }
    if references:
        batch["reference"] = torch.stack(references)
    if count is not None:
        batch["loss_terms"] = count(batch).tolist()
    return batch


class TimedLoader(DataLoader[list[dict[str, Any]]]):
    """A DataLoader that knows for how long it was waited for, and calls ``arrived`` when it has a batch."""

    waited = 0.0
    """Seconds, of all batches so far."""

    def __init__(
        self, dataset: ScheduledDataset, arrived: Callable[[], None], endless: bool, **options: Any
    ) -> None:
        super().__init__(dataset, **options)
        self.arrived, self.endless = arrived, endless

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = super().__iter__()
        scheduled = cast(ScheduledDataset, self.dataset)
        numbers: Iterable[int] = itertools.count() if self.endless else range(scheduled.batches_left)
        for _ in numbers:
            begin = time.monotonic()
            batch = next(batches, None)
            self.waited += time.monotonic() - begin
            if batch is None:
                return
            self.arrived()
            yield batch


def build_loader(
    dataset: ScheduledDataset,
    *,
    eos_id: int,
    pad_id: int,
    num_workers: int = 0,
    pin_memory: bool = False,
    arrived: Callable[[], None] = lambda: None,
    endless: bool = False,
    count: Count | None = None,
) -> TimedLoader:
    """A DataLoader of this rank's batches; the dataset makes them, as they need not be of one size.

    It ends with the dataset's clock; ``endless``: goes on beyond, with the last mix. ``arrived`` is called
    for each batch, once it is there. ``count``: see ``collate``.

    Raises:
        ValueError: the path of the folder for temporary files is too long for workers' sockets, in which case
            they would wait for each other for ever.
    """
    place = tempfile.gettempdir()
    if num_workers and len(os.fsencode(place)) > _LONGEST_TEMPORARY:
        raise ValueError(
            f"TMPDIR: {place} has {len(os.fsencode(place))} characters, and sockets of data.num_workers need "
            f"one of at most {_LONGEST_TEMPORARY}"
        )
    return TimedLoader(
        dataset,
        arrived,
        endless,
        batch_size=None,
        num_workers=num_workers,
        collate_fn=partial(collate, eos_id=eos_id, pad_id=pad_id, count=count),
        pin_memory=pin_memory,
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=ignore_signals_of_others,
    )
