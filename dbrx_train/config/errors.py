"""What is wrong with a configuration, in one line that names the key."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dbrx_train.errors import nearest, where_and_what

__all__ = ["ConfigError", "naming", "nearest", "require", "where_and_what"]


class ConfigError(ValueError):
    """The user's configuration is wrong; the message is one line that names the key."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@contextmanager
def naming(prefix: str) -> Iterator[None]:
    """A ValueError of another room, with its key put in front."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{prefix}{error}") from None
