"""Data loaders of a run, with the token counts that Composer weighs losses by."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial

import torch
from composer import DataSpec

from dbrx_train.config import ConfigError, RunConfig
from dbrx_train.data.manifest import Manifest, check_dataset
from dbrx_train.data.stream.dataset import ScheduledDataset
from dbrx_train.data.stream.loader import build_loader
from dbrx_train.data.stream.shards import Source
from dbrx_train.data.tokenizer import Tokenizer
from dbrx_train.model.decoder import shift_labels
from dbrx_train.model.loss import IGNORE_INDEX
from dbrx_train.schedule import samples_of
from dbrx_train.train.evaluators import held_out
from dbrx_train.train.preferences import Batch, pairs_present


def check_sources(config: RunConfig, tokenizer: Tokenizer) -> None:
    """Every source is whole, and was prepared at its sequence length with this tokenizer.

    Raises:
        ConfigError: one is not; the line names it.
    """
    lengths = config.sample_lengths
    for name, source in config.data.sources.items():
        check = partial(
            check_dataset,
            source.local,
            lengths.get(name),
            tokenizer.fingerprint,
            config.model.vocab_size,
            remote=source.remote,
        )
        try:
            manifest = check()
            _check_kind(config, source.local, manifest)
            if name in lengths:
                _check_allowed(source.local, manifest)
        except ValueError as error:
            raise ConfigError(f"data.sources.{name}: {error}") from None
    if config.evaluation.max_samples:
        deque(held_out(config, tokenizer), maxlen=0)


def _check_allowed(folder: str, manifest: Manifest) -> None:
    known = manifest.governance
    if not known.allows("train"):
        raise ValueError(
            f"{folder}: may be used for {', '.join(known.allowed)} alone, and the mix trains on it; set its "
            f"weight to 0, or have `data prepare --allowed train` say that it may be"
        )


def _check_kind(config: RunConfig, folder: str, manifest: Manifest) -> None:
    pairs = bool(manifest.chat and manifest.chat["preferences"])
    if pairs and config.preferences.beta is None:
        raise ValueError(f"{folder}: holds preferences; set preferences.beta, or prepare other data")
    if not pairs and config.preferences.beta is not None:
        raise ValueError(
            f"{folder}: holds no preferences, which preferences.beta asks for; prepare them with "
            f"`data prepare-chat --preferences`"
        )
    if manifest.chat and not config.model.mask_documents:
        raise ValueError(f"{folder}: holds conversations, to be kept apart; set model.mask_documents=true")


def count_pairs(batch: Batch) -> dict[str, int]:
    """All tokens of a batch, and its pairs, each of which counts alike in the loss."""
    return {"total": batch["input_ids"].numel(), "loss_generating": int(pairs_present(batch).sum())}


def count_tokens(batch: Batch, *, mask_documents: bool) -> dict[str, int]:
    """All tokens of a batch, and those whose prediction counts in the loss."""
    labels = shift_labels(batch["labels"], batch["document_ids"], mask_documents)
    return {"total": batch["input_ids"].numel(), "loss_generating": int((labels != IGNORE_INDEX).sum())}


def split_batch(batch: Batch, microbatch_size: int, *, seq_len: int) -> list[Batch]:
    """Parts of as many tokens as ``microbatch_size`` samples of ``seq_len`` have, a sample at least."""
    samples = samples_of(microbatch_size, seq_len, batch["input_ids"].shape[1])
    parts = zip(*(torch.split(tensor, samples) for tensor in batch.values()), strict=True)
    return [dict(zip(batch, part, strict=True)) for part in parts]


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
    loader = build_loader(
        train_dataset(config),
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        num_workers=config.data.num_workers,
        pin_memory=torch.cuda.is_available(),
        arrived=arrived,
        endless=True,  # the Trainer ends
    )
    count: Callable[[Batch], dict[str, int]] = count_pairs
    if config.preferences.beta is None:
        count = partial(count_tokens, mask_documents=config.model.mask_documents)
    split = partial(split_batch, seq_len=config.data.seq_len)
    return DataSpec(loader, get_num_tokens_in_batch=count, split_batch=split)
