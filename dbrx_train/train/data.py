"""Data loaders of a run, with the token counts that Composer weighs losses by."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from composer import DataSpec
from torch import Tensor

from dbrx_train.config import RunConfig
from dbrx_train.data.stream.dataset import ScheduledDataset
from dbrx_train.data.stream.loader import Batch, Count, build_loader
from dbrx_train.data.stream.shards import Source
from dbrx_train.data.tokenizer import Tokenizer
from dbrx_train.model.decoder import shift_labels
from dbrx_train.model.loss import IGNORE_INDEX
from dbrx_train.schedule import samples_of
from dbrx_train.train.preferences import pairs_present


def count_pairs(batch: Batch) -> Tensor:
    """The pairs of each sample, every one of which counts alike in the loss, [batch]."""
    return pairs_present(batch).sum(1)


def count_labels(batch: Batch, *, mask_documents: bool) -> Tensor:
    """The tokens of each sample whose prediction counts in the loss, [batch]."""
    labels = shift_labels(batch["labels"], batch["document_ids"], mask_documents)
    return (labels != IGNORE_INDEX).sum(1)


def count_tokens(batch: Batch) -> dict[str, int]:
    """All tokens of a batch, and its terms of the loss, by numbers that are in the host's memory: Composer
    asks of every microbatch, when it is on its device."""
    return {"total": batch["input_ids"].numel(), "loss_generating": sum(batch["loss_terms"])}


def split_batch(batch: Batch, microbatch_size: int, *, seq_len: int) -> list[Batch]:
    """Parts of as many tokens as ``microbatch_size`` samples of ``seq_len`` have, a sample at least."""
    samples = samples_of(microbatch_size, seq_len, batch["input_ids"].shape[1])
    starts = range(0, len(batch["input_ids"]), samples)
    return [{key: value[i : i + samples] for key, value in batch.items()} for i in starts]


def train_dataset(config: RunConfig) -> ScheduledDataset:
    """The scheduled mix, this rank's share of each global batch."""
    data = config.data
    return ScheduledDataset(
        {name: Source(source.local, source.remote) for name, source in data.sources.items()},
        config.mix_schedule(),
        config.clock,
        shuffle=data.shuffle,
        shuffle_seed=data.shuffle_seed,
        predownload=data.predownload,
        cache_limit=data.cache_limit,
    )


def train_data(
    config: RunConfig, tokenizer: Tokenizer, arrived: Callable[[], None] = lambda: None
) -> DataSpec:
    """``train_dataset`` in batches, with the token counts of each; ``arrived`` is called for every batch."""
    count: Count = count_pairs
    if config.preferences.beta is None:
        count = partial(count_labels, mask_documents=config.model.mask_documents)
    loader = build_loader(
        train_dataset(config),
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        num_workers=config.data.num_workers,
        pin_memory=torch.cuda.is_available(),
        arrived=arrived,
        endless=True,  # the Trainer ends
        count=count,
    )
    split = partial(split_batch, seq_len=config.data.seq_len)
    return DataSpec(loader, get_num_tokens_in_batch=count_tokens, split_batch=split)
