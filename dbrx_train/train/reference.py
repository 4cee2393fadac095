"""The reference of preference optimisation: log-probabilities under the weights that training begins with.

They are computed once, before the first step, and lie in the run's folder, so that a resumed run reads them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from composer import Trainer
from composer.core import get_precision_context
from composer.utils import dist
from numpy.typing import NDArray

from dbrx_train.config import ConfigError, RunConfig
from dbrx_train.data.stream.dataset import EvalDataset
from dbrx_train.data.stream.loader import collate
from dbrx_train.data.tokenizer import Tokenizer
from dbrx_train.files import atomic_write
from dbrx_train.parallel.gather import gather_objects
from dbrx_train.schedule import samples_of
from dbrx_train.train.preferences import document_log_probs

__all__ = ["set_reference"]

Table = NDArray[np.float32]


def set_reference(config: RunConfig, trainer: Trainer, tokenizer: Tokenizer, *, made: bool) -> None:
    """Give the run's data sets the reference of every sample: from the run's folder if it was ``made``.

    Raises:
        ConfigError: it is not there, or of other data.
    """
    train, trained = trainer.state.train_dataloader.dataset, dict[str, Table]()
    for name, source in config.data.sources.items():
        if name in train.sample_lengths:
            data = EvalDataset(
                source.local,
                seq_len=train.sample_lengths[name],
                split="train",
                name=name,
                remote=source.remote,
            )
            trained[name] = _table(config, trainer, tokenizer, data, f"{name}-train", made)
    train.reference = _alike(trained)
    for evaluator in trainer.state.evaluators:
        data = evaluator.dataloader.dataloader.dataset.dataset  # inside EvenlyShared
        data.reference = _table(config, trainer, tokenizer, data, f"{data.store.name}-val", made)


def _table(
    config: RunConfig, trainer: Trainer, tokenizer: Tokenizer, data: EvalDataset, name: str, made: bool
) -> Table:
    """What ``preferences.document_log_probs`` gives for every sample: [samples, documents], NaN for none."""
    path = Path(config.folder) / "reference" / f"{name}.npy"
    if made:
        table: Table = _read(path)
        if len(table) != len(data):
            raise ConfigError(
                f"{path}: is of {len(table)} samples, but the source has {len(data)}; give the run another "
                f"run_name= to start afresh"
            )
        return table
    table = _computed(config, trainer, tokenizer, data)
    if dist.get_local_rank() == 0:  # hosts need not share the folder
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as partial, partial.open("wb") as file:
            np.save(file, table)
    return table


def _read(path: Path) -> Table:
    try:
        table: Table = np.load(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: what the first model made of the data cannot be read ({error}); restore it, or give "
            f"the run another run_name= to start afresh"
        ) from None
    return table


def _computed(config: RunConfig, trainer: Trainer, tokenizer: Tokenizer, data: EvalDataset) -> Table:
    state, ranks = trainer.state, dist.get_world_size()
    size = samples_of(config.evaluation.batch_size, config.data.seq_len, data.seq_len)
    mine, broken = list[tuple[int, Table]](), list[int]()
    state.model.eval()
    with torch.no_grad(), get_precision_context(state.precision):
        for first in range(0, len(data), ranks * size):
            start = first + dist.get_global_rank() * size
            # A rank that has none left repeats the first sample, for all must take part.
            numbers = list(range(start, min(start + size, len(data)))) or [0]
            samples = [data[number] for number in numbers]
            batch = collate(samples, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
            output = state.model(state.device.batch_to_device(batch))
            documents = int(batch["document_ids"].max()) + 1
            ids = batch["document_ids"].to(output.log_probs.device)
            sums = document_log_probs(output.log_probs, ids, documents).cpu().numpy()
            absent = np.arange(documents) > batch["document_ids"].max(1, keepdim=True).values.numpy()
            wrong = ~(absent | np.isfinite(sums)).all(1)
            broken += [number for number, is_wrong in zip(numbers, wrong, strict=True) if is_wrong]
            mine.append((start, np.where(absent, np.nan, sums)))
    state.model.train()
    if found := [number for part in gather_objects(broken) for number in part]:
        raise ConfigError(
            f"data.sources.{data.store.name}: an answer in sample {min(found)} of {data.store.folder} has no "
            f"finite log-probability under the weights of init_from; see that these are whole"
        )
    return _joined(gather_objects(mine), len(data))


def _joined(parts: list[list[tuple[int, Table]]], samples: int) -> Table:
    found = [(start, rows) for part in parts for start, rows in part if start < samples]
    table = np.full((samples, max(rows.shape[1] for _, rows in found)), np.nan, np.float32)
    for start, rows in found:
        table[start : start + len(rows), : rows.shape[1]] = rows
    return table


def _alike(tables: dict[str, Table]) -> dict[str, Table]:
    """The same with as many columns each, as samples of several sources share a batch."""
    width = max(table.shape[1] for table in tables.values())
    return {
        name: np.pad(table, ((0, 0), (0, width - table.shape[1])), constant_values=np.nan)
        for name, table in tables.items()
    }
