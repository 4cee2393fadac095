"""The conversation, or the pair of them, that a row of a data set holds.

A row holds one of

- ``messages`` or ``conversations``: a list of turns (:mod:`.turns`);
- ``prompt`` and ``response`` (or ``completion``);
- ``instruction``, with ``context`` or ``input`` if there is any, and ``response`` or ``output``;

and for preferences (DPO, arXiv 2305.18290) ``chosen`` and ``rejected``: two answers to ``prompt``, each a
text or a list of turns; or two whole conversations, without ``prompt``, that differ after some turn. A system
prompt beside any of these, ``system`` or ``system_prompt``, is a turn before the first.
"""

from __future__ import annotations

from typing import Any

from dbrx_train.data.prepare.records import Listener, Place
from dbrx_train.data.prepare.turns import Turn, read_turns
from dbrx_train.data.prepare.unread import OF_LINE, unread

__all__ = ["FIELDS", "WANTED", "WANTED_PAIR", "before_answer", "read_conversation", "read_pair"]

WANTED = "messages, or a prompt (or instruction) and a response, or ShareGPT's conversations"
WANTED_PAIR = "chosen and rejected, and a prompt if these are answers alone"

_LISTS = ("messages", "conversations", "conversation")
_ASKED = ("prompt", "instruction")
_MORE = ("context", "input")
_ANSWERS = ("response", "completion", "output")
_SYSTEM = ("system", "system_prompt")
_PAIR = ("chosen", "rejected")
FIELDS = OF_LINE.union(_LISTS, _ASKED, _MORE, _ANSWERS, _SYSTEM, _PAIR)
"""Fields that mean something: each form of a row reads some of these, and the others are told of."""


class _Row:
    """A row and which of its fields have been read."""

    def __init__(self, values: dict[str, Any], where: Place) -> None:
        self.values, self.where = values, where
        self._read: set[str] = set()
        self.unread_of_turns: set[str] = set()

    def first(self, names: tuple[str, ...]) -> str | None:
        """The first of these fields that the row has; a null is none."""
        return next((name for name in names if self.values.get(name) is not None), None)

    def value(self, name: str) -> Any:
        self._read.add(name)
        return self.values[name]

    def text(self, name: str) -> str:
        value = self.value(name)
        if not isinstance(value, str):
            raise ValueError(
                f"{self.where()}: field {name!r} holds {type(value).__name__}; it must hold text"
            )
        return value

    def turns(self, name: str, otherwise: str) -> list[Turn]:
        """The field's turns, or its text as the one turn of role ``otherwise``."""
        value = self.value(name)
        if isinstance(value, str):
            return [Turn(otherwise, value)]
        return read_turns(value, name, self.where, self.unread_of_turns)

    def with_system(self, turns: list[Turn]) -> list[Turn]:
        """The turns, after the system prompt that the row gives beside them."""
        name = next(filter(self.values.get, _SYSTEM), None)
        if name is None:
            return turns
        system = Turn("system", self.text(name))
        if turns and turns[0].role == "system":
            if turns[0] != system:
                raise ValueError(
                    f"{self.where()}: field {name!r} is another system prompt than the first turn; keep one"
                )
            return turns
        return [system, *turns]

    def report(self, listener: Listener) -> None:
        """Tell of the fields that were not read, though they mean something."""
        for name in unread(self.values, FIELDS, self._read):
            listener.problem(f"field {name!r} is not read", self.where)
        for name in sorted(self.unread_of_turns):
            listener.problem(f"field {name!r} of a turn is not read", self.where)

    def fields(self) -> str:
        """Names of fields, for an error."""
        held = [name for name, value in self.values.items() if value is not None]
        return ", ".join(map(repr, held[:8])) or "none"


def read_conversation(values: dict[str, Any], where: Place, listener: Listener) -> list[Turn]:
    """The row's one conversation; reports fields that are not read.

    Raises:
        ValueError: ``FILE:LINE: …`` for a row without one.
    """
    row = _Row(values, where)
    asked, answer = row.first(_ASKED), row.first(_ANSWERS)
    if (turns := row.first(_LISTS)) is not None:
        said = read_turns(row.value(turns), turns, where, row.unread_of_turns)
    elif asked and answer:
        more = [name for name in _MORE if asked == "instruction" and values.get(name)]
        question = "\n\n".join(row.text(name) for name in (asked, *more))
        said = [Turn("user", question), Turn("assistant", row.text(answer))]
    else:
        raise ValueError(
            f"{where()}: no conversation; it must have {WANTED}, and has the fields {row.fields()}"
        )
    said = row.with_system(said)
    row.report(listener)
    return said


def read_pair(values: dict[str, Any], where: Place, listener: Listener) -> list[list[Turn]]:
    """The row's chosen and its rejected conversation; reports fields that are not read.

    Raises:
        ValueError: ``FILE:LINE: …`` for a row without them, or with sides that do not begin alike.
    """
    row = _Row(values, where)
    if not {*_PAIR} <= values.keys():
        raise ValueError(
            f"{where()}: no preference; it must have {WANTED_PAIR}, and has the fields {row.fields()}"
        )
    asked = row.turns("prompt", "user") if values.get("prompt") is not None else []
    sides = []
    for key in _PAIR:
        if not asked and isinstance(values[key], str):
            raise ValueError(f"{where()}: {key} is an answer alone; there must be a prompt")
        said = row.turns(key, "assistant")
        # Some data sets repeat the prompt at the head of each side
        repeats = said[: len(asked)] == asked
        is_asked = any(turn.role == "user" for turn in asked)
        if is_asked and not repeats and (extra := before_answer(said)):
            raise ValueError(
                f"{where()}: {key} begins with a turn of {extra[0].role} but not with the prompt; "
                f"it must begin with all of the prompt, or with the answer"
            )
        sides.append(row.with_system(said if repeats else asked + said))
    row.report(listener)
    return sides


def before_answer(turns: list[Turn]) -> list[Turn]:
    """The turns before the assistant's first."""
    first = (number for number, turn in enumerate(turns) if turn.role == "assistant")
    return turns[: next(first, len(turns))]
