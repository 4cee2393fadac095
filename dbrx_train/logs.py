"""What the project's own loggers say: ``DBRX_TRAIN_LOG=debug`` in the environment for all of it."""

from __future__ import annotations

import logging
import os

from dbrx_train.redact import mask_logs

__all__ = ["begin"]

_LEVELS = ("debug", "info", "warning")


def begin() -> None:
    """Show the records of this process on stderr, with its rank and the time, secrets masked.

    Raises:
        ValueError: DBRX_TRAIN_LOG is no level.
    """
    mask_logs()
    level = os.environ.get("DBRX_TRAIN_LOG", "warning")
    if level not in _LEVELS:
        raise ValueError(f"DBRX_TRAIN_LOG: {level!r} is not one of {', '.join(_LEVELS)}")
    handler = logging.StreamHandler()
    rank = os.environ.get("RANK", "0")
    handler.setFormatter(logging.Formatter(f"%(asctime)s rank {rank} %(name)s: %(message)s"))
    logger = logging.getLogger("dbrx_train")
    logger.handlers = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False
