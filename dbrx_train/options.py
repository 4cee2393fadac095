"""Options as dataclass fields that say what they mean and which values they take, checked in one walk."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Bounds", "check", "option"]


@dataclass(frozen=True)
class Bounds:
    """Which values an option takes; numbers have to be finite, too."""

    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None
    one_of: tuple[str, ...] = ()

    def allow(self, value: Any) -> bool:
        if self.one_of:
            return value in self.one_of
        return (
            math.isfinite(value)
            and (self.gt is None or value > self.gt)
            and (self.ge is None or value >= self.ge)
            and (self.lt is None or value < self.lt)
            and (self.le is None or value <= self.le)
        )

    def __str__(self) -> str:
        """In words, to follow "must"."""
        if self.one_of:
            return f"be one of {', '.join(self.one_of)}"
        if (self.ge, self.lt, self.le) == (0, None, None):
            return "not be negative"
        if (self.gt, self.lt, self.le) == (0, None, None):
            return "be positive"
        limits = (("above", self.gt), ("at least", self.ge), ("below", self.lt), ("at most", self.le))
        return "be " + " and ".join(f"{word} {limit:,}" for word, limit in limits if limit is not None)


def option(
    doc: str,
    default: Any = dataclasses.MISSING,
    *,
    gt: float | None = None,
    ge: float | None = None,
    lt: float | None = None,
    le: float | None = None,
    one_of: Sequence[str] = (),
) -> Any:
    """A dataclass field: what it means, its default (a callable makes one), and the bounds of its values.

    Where its type allows None, so do its bounds.
    """
    bounds = Bounds(gt, ge, lt, le, tuple(one_of))
    metadata = {"doc": doc} | ({} if bounds == Bounds() else {"bounds": bounds})
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def check(options: Any, prefix: str = "") -> None:
    """Hold a dataclass, and all dataclasses in it, against the bounds of their fields; then let each check
    what its fields ask of each other, by its method ``check`` if it has one.

    Raises:
        ValueError: one line that begins with the option's key.
    """
    for each in dataclasses.fields(options):
        value, key = getattr(options, each.name), f"{prefix}{each.name}"
        if "bounds" in each.metadata and value is not None:
            _check_bounds(key, value, each)
        for name, inner in _inside(key, value):
            check(inner, f"{name}.")
    if hasattr(options, "check"):
        options.check()


def _check_bounds(key: str, value: Any, declared: Any) -> None:
    bounds: Bounds = declared.metadata["bounds"]
    if bounds.allow(value):
        return
    if bounds.one_of:
        raise ValueError(f"{key}: {value!r} is not one of {', '.join(bounds.one_of)}")
    null = " or null" if type(None) in getattr(declared.type, "__args__", ()) else ""
    raise ValueError(f"{key}: must {bounds}{null}, not {value}")


def _inside(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The dataclasses that are a value, or in it, with their keys."""
    if dataclasses.is_dataclass(value):
        yield key, value
    elif isinstance(value, dict):
        yield from ((f"{key}.{name}", item) for name, item in value.items() if dataclasses.is_dataclass(item))
    elif isinstance(value, list):
        found = ((f"{key}[{i}]", item) for i, item in enumerate(value))
        yield from (each for each in found if dataclasses.is_dataclass(each[1]))
