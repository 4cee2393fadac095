"""Whether a run's data is what it asks for; told without torch, before anything heavy is loaded."""

from __future__ import annotations

from dbrx_train.config import ConfigError, RunConfig
from dbrx_train.data.manifest import Manifest, check_dataset, check_held_out
from dbrx_train.data.tokenizer import Tokenizer

__all__ = ["check_sources"]


def check_sources(config: RunConfig, tokenizer: Tokenizer) -> dict[str, int]:
    """Every source is whole, held-out split included, and was prepared at its length with this tokenizer.

    Returns:
        Samples of each, to train on.

    Raises:
        ConfigError: one is not; the line names it.
    """
    lengths, sizes = config.sample_lengths, dict[str, int]()
    for name, source in config.data.sources.items():
        asked = (source.local, lengths.get(name), tokenizer.fingerprint, config.model.vocab_size)
        try:
            manifest = check_dataset(*asked, remote=source.remote)
            _check_kind(config, source.local, manifest)
            sizes[name] = manifest.splits["train"].samples
            if name in lengths:
                _check_allowed(source.local, manifest)
            if source.val is not None:
                check_held_out(source.val, *asked[1:])
            elif config.evaluation.max_samples and "val" in manifest.splits:
                check_dataset(*asked, split="val", remote=source.remote)
        except ValueError as error:
            raise ConfigError(f"data.sources.{name}: {error}") from None
    return sizes


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
