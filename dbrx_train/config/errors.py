"""What is wrong with a configuration, in one line that names the key."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import yaml

from dbrx_train.errors import first_line

__all__ = ["ConfigError", "naming", "nearest", "require", "where_and_what"]

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


def where_and_what(error: yaml.YAMLError) -> tuple[str, str]:
    """Of text that is no YAML: ``, line N`` if that is known, and what is wrong there, in a line."""
    place = getattr(error, "problem_mark", None)
    line = f", line {place.line + 1}" if place else ""
    return line, getattr(error, "problem", None) or first_line(error)


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a line about a name that is not ``known``: which one may have been meant."""
    names = [*map(str, known)]
    if _RENAMED.get(name) in names:
        return f"; it is called {_RENAMED[name]} now"
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(names)}"
