"""What is wrong with a configuration, in one line that names the key."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

__all__ = ["ConfigError", "naming", "nearest", "require"]

_RENAMED = {
    "hangs": "watchdog",
    "stopping": "preemption",
    "grace": "grace_period",
    "deviations": "mad_threshold",
    "pass_over": "skip_data",
    "reach": "interpolation",
}
"""Keys as they were once called."""


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


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a line about a name that is not ``known``: which one may have been meant."""
    names = [*map(str, known)]
    if _RENAMED.get(name) in names:
        return f"; it is called {_RENAMED[name]} now"
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(names)}"
