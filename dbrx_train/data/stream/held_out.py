"""What is held out of each source: the one walk over it, for training and for evaluation alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from dbrx_train.data.manifest import check_dataset, check_held_out
from dbrx_train.data.stream.dataset import EvalDataset
from dbrx_train.data.tokenizer import Tokenizer

__all__ = ["HeldOutSamples", "held_out_samples"]


class Located(Protocol):
    """A prepared folder: ``local``, fetched there from ``remote`` if given.

    ``val``: another one, of held-out data alone, that takes the place of what is held out there.
    """

    local: str
    remote: str | None
    val: str | None


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
            folder, remote = source.local, source.remote
            manifest = check_dataset(*check, remote=remote)
            if source.val is not None:
                folder, remote, manifest = source.val, None, check_held_out(source.val, *check[1:])
            if "val" not in manifest.splits:
                yield HeldOutSamples(name, None, 0, "nothing is held out")
                continue
            if not manifest.governance.allows("eval"):
                yield HeldOutSamples(name, None, 0, f"{folder} may be used for train alone")
                continue
            check_dataset(folder, *check[1:], split="val", remote=remote)
            dataset = EvalDataset(folder, seq_len=manifest.seq_len, name=name, remote=remote)
        except ValueError as error:
            raise ValueError(f"data.sources.{name}: {error}") from None
        yield HeldOutSamples(name, dataset, min(len(dataset), max_samples))
