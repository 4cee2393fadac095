"""Loss on what was held out of each source."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path

import torch

from dbrx_train.checkpoint.weights import Weights, load_model, open_weights
from dbrx_train.config import ConfigError, RunConfig, load, naming
from dbrx_train.data.stream.dataset import EvalDataset
from dbrx_train.data.stream.held_out import held_out_samples
from dbrx_train.data.stream.loader import collate
from dbrx_train.data.tokenizer import Tokenizer, load_tokenizer
from dbrx_train.model.decoder import Dbrx
from dbrx_train.model.quantize import quantize
from dbrx_train.schedule import samples_of

__all__ = ["HeldOut", "batches", "check_tokenizer", "held_out", "of_weights"]

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class HeldOut:
    """Of one source."""

    source: str
    loss: float
    """Mean next-token cross-entropy in nats; NaN if there are no labels."""
    labels: int
    """Tokens that it is a mean over."""


def batches(config: RunConfig) -> Iterator[tuple[str, Iterator[Batch]]]:
    """Each source with the samples of its held-out split that a run of ``config`` evaluates on, in batches
    that are read when they are due.

    Sources of which nothing is held out are left out.

    Raises:
        ConfigError: a source is not there, damaged, or not prepared for this model and tokenizer.
    """
    tokenizer = load_tokenizer(config.tokenizer.name, config.tokenizer.vocab_file)
    most = config.evaluation.max_samples
    with naming(""):
        for part in held_out_samples(
            config.data.sources, config.sample_lengths, tokenizer, config.model.vocab_size, most
        ):
            if part.dataset is None:
                continue
            size = samples_of(config.evaluation.batch_size, config.data.seq_len, part.dataset.seq_len)
            yield part.source, _batches(part.dataset, range(part.samples), size, tokenizer)


def _batches(data: EvalDataset, numbers: range, size: int, tokenizer: Tokenizer) -> Iterator[Batch]:
    for begin in range(0, len(numbers), size):
        samples = [data[n] for n in numbers[begin : begin + size]]
        yield collate(samples, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)


def check_tokenizer(config: RunConfig, weights: Weights) -> None:
    """Raise ConfigError if the weights are known to be of another tokenizer than the configuration's."""
    known, options = weights.tokenizer_fingerprint, config.tokenizer
    tokenizer = load_tokenizer(options.name, options.vocab_file)
    if known not in (None, tokenizer.fingerprint):
        raise ConfigError(
            f"tokenizer: {options.vocab_file or options.name} is another one than that which {weights.path} "
            f"was trained with ({tokenizer.fingerprint[:12]}…, not {known[:12]}…)"
        )


@torch.no_grad()
def held_out(model: Dbrx, config: RunConfig) -> Iterator[HeldOut]:
    """The model's loss on each source; every label counts once. Raises as ``batches``."""
    model.eval()
    for name, parts in batches(config):
        total, labels = 0.0, 0
        for batch in parts:
            names = ("labels", "document_ids", "document_starts")
            output = model(batch["input_ids"], **{name: batch[name] for name in names})
            assert output.token_losses is not None
            assert output.num_labels is not None
            total += float(output.token_losses.sum(dtype=torch.float64))
            labels += int(output.num_labels)
        yield HeldOut(name, total / labels if labels else nan, labels)


def of_weights(
    config: Path,
    overrides: Sequence[str],
    weights: Path | None,
    int8: bool,
    aside: Callable[[str], None],
) -> Iterator[HeldOut]:
    """The loss on each source of the run in ``config``, of ``weights``, by default the run's own.

    ``int8``: hold them in 8 bits. ``aside`` hears of checkpoints passed over, and of what 8 bits cost.

    Raises:
        ValueError: there are no weights, they are of another tokenizer, or nothing is held out.
    """
    for override in overrides:
        if override.partition("=")[0].strip().startswith("model."):
            raise ConfigError(f"{override}: the weights say what the model is; leave it out")
    run = load(config, overrides)
    found = open_weights(weights or Path(run.folder), aside)
    check_tokenizer(run, found)
    model = load_model(found)
    run.model = model.config  # its own, which the run's may differ from
    samples = next((batch["input_ids"] for _, parts in batches(run) for batch in parts), None)
    if samples is None:
        raise ValueError(f"{config}: nothing is held out of its sources, or evaluation.max_samples is 0")
    if int8:
        aside(f"int8: logits are off by {quantize(model.eval(), samples):.2%} (root mean square)")
    yield from held_out(model, run)
