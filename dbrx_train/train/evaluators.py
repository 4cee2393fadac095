"""Held-out loss during training: what each rank evaluates."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from composer import DataSpec, Evaluator
from composer.utils import dist
from torch.utils.data import DataLoader, Dataset

from dbrx_train.config import RunConfig, naming
from dbrx_train.data.stream.dataset import EvalDataset, Sample
from dbrx_train.data.stream.held_out import HeldOutSamples, held_out_samples
from dbrx_train.data.stream.loader import Batch, collate
from dbrx_train.data.tokenizer import Tokenizer
from dbrx_train.schedule import samples_of

__all__ = ["EvenlyShared", "evaluators", "held_out"]


def held_out(config: RunConfig, tokenizer: Tokenizer) -> Iterator[HeldOutSamples]:
    """What is held out of each source of a run; raises ConfigError for one that is not as it must be."""
    most, vocab_size = config.evaluation.max_samples, config.model.vocab_size
    with naming(""):
        yield from held_out_samples(config.data.sources, config.sample_lengths, tokenizer, vocab_size, most)


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
    for part in held_out(config, tokenizer):
        name = part.source
        if part.dataset is None:
            warnings.warn(f"data.sources.{name}: {part.lacks}, so it is not evaluated", stacklevel=1)
            continue
        even = EvenlyShared(part.dataset, part.samples, dist.get_world_size())
        loader: DataLoader[Batch] = DataLoader(
            even,
            batch_size=samples_of(config.evaluation.batch_size, config.data.seq_len, part.dataset.seq_len),
            sampler=dist.get_sampler(even, shuffle=False),
            collate_fn=partial(collate, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id),
            generator=torch.Generator(),  # an iterator draws a number: not one of training's
        )
        interval = config.clock.interval(config.evaluation.interval)
        # A batch is one forward pass, and the last one may be small.
        spec = DataSpec(loader, split_batch=lambda batch, _: [batch])
        result.append(Evaluator(label=f"eval/{name}", dataloader=spec, eval_interval=interval))
    return result
