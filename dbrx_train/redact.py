"""Secrets, masked in whatever is shown or kept: logs, errors, MLflow, checkpoints' manifests, reports.

Masked are the credentials of a URL (``https://user:password@host``), values whose key says that they are
secret (``?token=...``, ``password=...``), and wherever they turn up the values of such environment variables.
"""

from __future__ import annotations

import logging
import os
import re
import traceback
from typing import Any

__all__ = ["MASK", "mask", "mask_argument", "mask_logs", "mask_tree"]

MASK = "***"

_SECRET_KEY = re.compile(
    r"passw(or)?d|passphrase|secret|credential|bearer|(api|access|account|private|encryption)[_-]?key"
    r"|(^|[^a-z])(pass|pwd|token|signature|sig|apikey)([^a-z]|$)",
    re.IGNORECASE,
)
# To the last @ before the path; a password may hold a slash, unless what is before it is a port.
_USERINFO = re.compile(r"(?<=://)(?:[^/\s'\"?#]*|[^/\s:@'\"]+:(?!\d+/)[^\s'\"]*)@")
_PAIR = re.compile(r"([\w.-]+)=([^\s&;,'\"()\[\]{}]+)")
_SHORTEST = 6
"""Environment values that are shorter are words and switches rather than secrets."""


def mask(text: str) -> str:
    """``text`` with ``***`` for each secret in it."""
    for value in _environment():
        text = text.replace(value, MASK)
    text = _USERINFO.sub(f"{MASK}@", text)
    return _PAIR.sub(lambda pair: f"{pair[1]}={MASK}" if _is_secret(pair[1]) else pair[0], text)


def mask_argument(argument: str) -> str:
    """One argument of a command line, such as ``key=value``, whose value may have spaces."""
    key, equals, _ = argument.partition("=")
    return f"{key}={MASK}" if equals and _is_secret(key) else mask(argument)


def mask_tree(tree: Any, key: str = "") -> Any:
    """Dicts, lists and scalars with every secret text in them masked, by its content or its key."""
    if isinstance(tree, dict):
        return {mask(k) if isinstance(k, str) else k: mask_tree(v, str(k)) for k, v in tree.items()}
    if isinstance(tree, list):
        return [mask_tree(value, key) for value in tree]
    if isinstance(tree, str):
        return MASK if tree and _is_secret(key) else mask(tree)
    return tree


def mask_logs() -> None:
    """Have every log record of this process masked, those of other libraries too."""
    make = logging.getLogRecordFactory()

    def masked(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        record.msg, record.args = mask(record.getMessage()), ()
        if isinstance(record.exc_info, tuple):
            record.exc_text = mask("".join(traceback.format_exception(*record.exc_info)))
        return record

    logging.setLogRecordFactory(masked)


def _is_secret(key: str) -> bool:
    return _SECRET_KEY.search(key.rpartition(".")[2]) is not None


def _environment() -> list[str]:
    """Secrets in the environment, the longest first. A path to a secret is none."""
    found = {
        value
        for key, value in os.environ.items()
        if len(value) >= _SHORTEST and not value.startswith(("/", "~", ".")) and _is_secret(key)
    }
    return sorted(found, key=len, reverse=True)
