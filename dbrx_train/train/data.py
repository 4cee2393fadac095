"""Data loaders of a run, with the token counts that Composer weighs losses by."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from composer import DataSpec, Evaluator
from composer.utils import dist
from torch.utils.data import DataLoader, Dataset

from dbrx_train.config import ConfigError, RunConfig, naming
from dbrx_train.data.manifest import Manifest, check_dataset
from dbrx_train.data.stream.dataset import EvalDataset, Sample, ScheduledDataset
from dbrx_train.data.stream.held_out import HeldOutSamples, held_out_samples
from dbrx_train.data.stream.loader import build_loader, collate, samples_of
from dbrx_train.data.stream.shards import Source
from dbrx_train.data.tokenizer import Tokenizer
from dbrx_train.model.decoder import shift_labels
from dbrx_train.model.loss import IGNORE_INDEX
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
            _check_kind(config, source.local, check())
        except ValueError as error:
            raise ConfigError(f"data.sources.{name}: {error}") from None
    if config.evaluation.max_samples:
        deque(_held_out(config, tokenizer), maxlen=0)


def _held_out(config: RunConfig, tokenizer: Tokenizer) -> Iterator[HeldOutSamples]:
    most, vocab_size = config.evaluation.max_samples, config.model.vocab_size
    with naming(""):
        yield from held_out_samples(config.data.sources, config.sample_lengths, tokenizer, vocab_size, most)


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
        num_workers=config.data.num_workers,
        pin_memory=torch.cuda.is_available(),
        arrived=arrived,
    )
    count: Callable[[Batch], dict[str, int]] = count_pairs
    if config.preferences.beta is None:
        count = partial(count_tokens, mask_documents=config.model.mask_documents)
    split = partial(split_batch, seq_len=config.data.seq_len)
    return DataSpec(loader, get_num_tokens_in_batch=count, split_batch=split)


class EvenlyShared(Dataset[Sample]):
    """The first ``size`` samples of ``dataset``, and up to ``ranks`` - 1 more without labels or pairs.

    So all ranks take part in equally many forward passes.
    """

    def __init__(self, dataset: EvalDataset, size: int, ranks: int) -> None:
        self.dataset, self.size = dataset, size
        self.length = -(-size // ranks) * ranks

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if index < self.size:
            return self.dataset[index]
        sample = self.dataset[0]
        unlabelled = {"loss": np.zeros(len(sample["tokens"]), dtype=bool)}
        if "reference" in sample:
            unlabelled["reference"] = np.full_like(sample["reference"], np.nan)
        return sample | unlabelled


def evaluators(config: RunConfig, tokenizer: Tokenizer) -> list[Evaluator]:
    """One per source that has a held-out split, labelled ``eval/<source>``.

    Every sample counts once, on whatever number of ranks.
    """
    if config.evaluation.max_samples == 0:
        return []
    result = []
    for part in _held_out(config, tokenizer):
        name = part.source
        if part.dataset is None:
            warnings.warn(f"data.sources.{name}: nothing is held out, so it is not evaluated", stacklevel=2)
            continue
        even = EvenlyShared(part.dataset, part.samples, dist.get_world_size())
        loader: DataLoader[Batch] = DataLoader(
            even,
            batch_size=samples_of(config.evaluation.batch_size, config.data.seq_len, part.dataset.seq_len),
            sampler=dist.get_sampler(even, shuffle=False),
            collate_fn=partial(collate, eos_id=tokenizer.eos_id),
            generator=torch.Generator(),  # an iterator draws a number: not one of training's
        )
        interval = config.clock.interval(config.evaluation.interval)
        # A batch is one forward pass, and the last one may be small.
        spec = DataSpec(loader, split_batch=lambda batch, _: [batch])
        result.append(Evaluator(label=f"eval/{name}", dataloader=spec, eval_interval=interval))
    return result
