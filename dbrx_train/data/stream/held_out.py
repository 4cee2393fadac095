"""What is held out of each source: the one walk over it, for training and for evaluation alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from dbrx_train.data.manifest import check_dataset
from dbrx_train.data.stream.dataset import EvalDataset
from dbrx_train.data.tokenizer import Tokenizer

__all__ = ["HeldOutSamples", "held_out_samples"]


class Located(Protocol):
    """A prepared folder: ``local``, fetched there from ``remote`` if given."""

    local: str
    remote: str | None


@dataclass(frozen=True)
class HeldOutSamples:
    """Of one source."""

    source: str
    dataset: EvalDataset | None
    """None if there is nothing to evaluate on."""
    samples: int
    """How many of its first count."""
    lacks: str = ""
    """Why there is nothing."""


def held_out_samples(
    sources: Mapping[str, Located],
    lengths: Mapping[str, int],
    tokenizer: Tokenizer,
    vocab_size: int,
    max_samples: int,
) -> Iterator[HeldOutSamples]:
    """Each source's held-out samples, at most ``max_samples``, once its folder is known to fit the run.

    Args:
        sources: by name; a ``remote`` one is fetched as it is read.
        lengths: tokens of a sample, of the sources that training reads; others have those of their shards.
        tokenizer: that they must have been prepared with.
        vocab_size: of the model.

    Raises:
        ValueError: a source is not there, damaged, or prepared otherwise; the line names it.
    """
    for name, source in sources.items():
        check = (source.local, lengths.get(name), tokenizer.fingerprint, vocab_size)
        try:
            manifest = check_dataset(*check, remote=source.remote)
            if "val" not in manifest.splits:
                yield HeldOutSamples(name, None, 0, "nothing is held out")
                continue
            if not manifest.governance.allows("eval"):
                yield HeldOutSamples(name, None, 0, f"{source.local} may be used for train alone")
                continue
            check_dataset(*check, split="val", remote=source.remote)
            seq_len = manifest.seq_len
            dataset = EvalDataset(source.local, seq_len=seq_len, name=name, remote=source.remote)
        except ValueError as error:
            raise ValueError(f"data.sources.{name}: {error}") from None
        yield HeldOutSamples(name, dataset, min(len(dataset), max_samples))
