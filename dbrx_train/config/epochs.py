"""A run's length in epochs, where it reads a single source: as many samples as that has."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from dbrx_train.config.errors import naming, require
from dbrx_train.data.manifest import read_manifest

if TYPE_CHECKING:
    from dbrx_train.config.run import RunConfig

__all__ = ["in_samples"]

_EPOCHS = re.compile(r"\s*(\d+(?:\.\d+)?)\s*ep\s*")


def in_samples(config: RunConfig) -> str:
    """``max_duration``, with epochs as the samples of the whole steps that they last.

    Raises:
        ConfigError: the run mixes sources, which have no epoch in common; or its source is not there.
    """
    match = _EPOCHS.fullmatch(config.max_duration)
    named = {name for point in config.data.mix for name, weight in point.weights.items() if weight}
    sources = {k: v for k, v in config.data.sources.items() if k in (named or config.data.sources)}
    if not match or not sources:
        return config.max_duration
    sizes = {}
    for name, source in sources.items():
        with naming(f"max_duration: {config.max_duration!r} is told by data.sources.{name}: "):
            manifest = read_manifest(source.local)
            require("train" in manifest.splits, f"{source.local} holds held-out data alone")
            sizes[name] = manifest.splits["train"].samples
    samples, size = int(float(match[1]) * sum(sizes.values())), config.optimization.global_batch_size
    whole = max(samples - samples % max(size, 1), size)
    require(
        len(sources) == 1,
        f"max_duration: {config.max_duration!r} is of a single source, and a mix of {len(sources)} has no "
        f"epoch in common; {whole}sp reads as many samples as {match[1]} of all of them, and `dbrx-train "
        f"data mix` shows how often each source is read then",
    )
    return f"{whole}sp"
