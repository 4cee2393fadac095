"""Fields that mean something to other programs and are not read here: to be told of, not passed over."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

__all__ = ["OF_DOCUMENT", "OF_LINE", "OF_TURN", "unread"]

_MEDIA = {"audio", "audios", "image", "images", "videos"}
_TRAINED = {"loss", "loss_mask", "masked", "train", "weight"}

OF_DOCUMENT = frozenset({*_MEDIA, *_TRAINED})
"""Beside a document's text."""
OF_LINE = frozenset(
    {
        *(*_MEDIA, *_TRAINED, "documents", "functions", "history", "label", "margin", "tools"),
        *(f"{side}_{word}" for side in ("chosen", "rejected") for word in ("rating", "score")),
        *(f"{word}_{side}" for side in ("chosen", "rejected") for word in ("rating", "score")),
    }
)
"""Beside a conversation."""
OF_TURN = frozenset(
    {
        *(*_MEDIA, "loss", "loss_mask", "train_detail", "name", "prefix", "tool_calls", "function_call"),
        *("reasoning", "reasoning_content", "thinking"),
    }
)


def unread(values: Mapping[str, Any], names: frozenset[str], read: Collection[str] = ()) -> list[str]:
    """Which of these fields ``values`` has, with more than a usual value (none, off, a weight of 1).

    Those that were ``read`` do not count.
    """
    if names.isdisjoint(values):
        return []
    found = names.intersection(values).difference(read)
    return sorted(name for name in found if _says_something(name, values[name]))


def _says_something(name: str, value: Any) -> bool:
    if value is None or value is False or value in ("", [], {}):
        return False
    return not (name in ("train", "weight") and value == 1)
