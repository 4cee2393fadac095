"""Conversations in JSON lines -> ChatML tokens with a loss mask.

A line holds one of

- ``messages``: a list of turns ``{"role": "system" | "user" | "assistant", "content": text}``;
- ``prompt`` and ``response`` (or ``completion``);
- ``instruction``, with ``context`` or ``input`` if there is any, and ``response`` or ``output``;

and for preferences (DPO, arXiv 2305.18290) ``chosen`` and ``rejected``: two answers to ``prompt``, each a
text or a list of turns; or two whole conversations, without ``prompt``, that differ after some turn.

In the tokens, ``<|endoftext|>`` follows each conversation and keeps those of a sample apart (it is never
trained on). A preference is two conversations in a row within one sample, the chosen one first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dbrx_train.data.prepare.documents import Listener, Place, mended, rows
from dbrx_train.data.prepare.sources import Span
from dbrx_train.data.tokenizer import Tokenizer

__all__ = ["ChatFormat", "Conversation", "conversations", "encode"]

ROLES = ("system", "user", "assistant")
Message = dict[str, str]
"""``role`` and ``content``."""

_ANSWERS = ("response", "completion", "output")
_WANTED = "messages, or a prompt (or instruction) and a response"
_WANTED_PAIR = "chosen and rejected, and a prompt if these are answers alone"


@dataclass(frozen=True)
class ChatFormat:
    """What of a conversation is trained on, and what becomes of one that is longer than a sample."""

    loss: str = "assistant"
    """``assistant``: what the assistant says, with the <|im_end|> after it; ``all``: every turn."""
    long: str = "truncate"
    """``truncate``: its beginning is kept; ``drop``: it is left out."""
    preferences: bool = False
    """Lines hold pairs of a chosen and a rejected answer."""

    def __post_init__(self) -> None:
        for key, value, allowed in (
            ("loss", self.loss, ("assistant", "all")),
            ("long", self.long, ("truncate", "drop")),
        ):
            if value not in allowed:
                raise ValueError(f"{key}: {value!r} is not one of {', '.join(allowed)}")
        if self.preferences and self.loss != "assistant":
            raise ValueError("loss: preferences compare answers; it must be 'assistant'")


class Conversation(NamedTuple):
    """What a line gives to a sample."""

    tokens: NDArray[np.uint32]
    loss: NDArray[np.uint8]
    """1 where a token's prediction is trained; as long as ``tokens``."""
    question: str
    """What comes before the first answer, whatever its form; that answer if nothing does."""
    text_bytes: int


def conversations(
    span: Span, form: ChatFormat, tokenizer: Tokenizer, seq_len: int, listener: Listener
) -> Iterator[Conversation]:
    """Each conversation (or pair) of the span, of at most ``seq_len`` tokens.

    Reported, by kind: ``empty`` (no answer, or a blank one; left out), ``truncated`` and ``too_long`` (left
    out: by choice, or as the cut leaves no answer), ``identical`` (a pair's answers, or what a cut leaves of
    them; left out).

    Raises:
        ValueError: ``FILE:LINE: …`` for a line that holds no conversation.
    """
    for where, row in rows(span, _WANTED_PAIR if form.preferences else _WANTED, listener):
        sides = _pair(row, where) if form.preferences else [_messages(row, where)]
        sides = [
            [{**turn, "content": mended(turn["content"], where, listener)} for turn in side] for side in sides
        ]
        shared = _shared_turns(*sides) if form.preferences else 0
        if any(_is_empty(side[shared:]) for side in sides):
            listener.problem("empty", where)
        elif form.preferences and sides[0] == sides[1]:
            listener.problem("identical", where)
        else:
            encoded = [encode(side, tokenizer, form.loss, shared) for side in sides]
            if parts := _fit(encoded, form, seq_len, where, listener):
                tokens, loss = (np.concatenate(column) for column in zip(*parts, strict=True))
                size = sum(len(turn["content"].encode()) for side in sides for turn in side)
                yield Conversation(tokens, loss, _question(sides[0]), size)


def encode(
    messages: Sequence[Message], tokenizer: Tokenizer, loss: str = "assistant", skip: int = 0
) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
    """Ids of a conversation in ChatML with ``<|endoftext|>`` after it, and its loss mask; [tokens] each.

    The ids are those of ``Tokenizer.chat``, except where an answer begins with blanks: it is tokenized apart
    from its header, as the model that writes it begins after the header. ``loss`` as in ``ChatFormat``;
    turns before ``skip`` are never trained on.
    """
    ids, mask = list[int](), list[int]()

    def add(more: list[int], trained: bool) -> None:
        ids.extend(more)
        mask.extend([int(trained)] * len(more))

    for number, message in enumerate(messages):
        role, content = message["role"], message["content"]
        every = loss == "all" and number >= skip
        add(tokenizer.encode("\n") if number else [], every)
        add([tokenizer.im_start_id], every)
        if role == "assistant":
            add(tokenizer.encode("assistant\n"), every)
            add([*tokenizer.encode(content), tokenizer.im_end_id], number >= skip)
        else:
            add([*tokenizer.encode(f"{role}\n{content}"), tokenizer.im_end_id], every)
    add([tokenizer.eos_id], False)
    return np.array(ids, np.uint32), np.array(mask, np.uint8)


def _fit(
    sides: list[tuple[NDArray[np.uint32], NDArray[np.uint8]]],
    form: ChatFormat,
    seq_len: int,
    where: Place,
    listener: Listener,
) -> list[tuple[NDArray[np.uint32], NDArray[np.uint8]]]:
    """The sides cut to ``seq_len`` tokens together; nothing if they are to be left out."""
    sizes = [len(ids) for ids, _ in sides]
    if sum(sizes) <= seq_len:
        return sides
    if form.long == "truncate":
        fair = seq_len // len(sides)
        spare = sum(max(0, fair - size) for size in sizes)
        cut = [_cut(*side, fair + spare) for side in sides]
        trained = [ids[loss == 1] for ids, loss in cut]
        if form.preferences and len(trained[0]) and np.array_equal(*trained):
            listener.problem("identical", where)
            return []
        if all(map(len, trained)):
            listener.problem("truncated", where)
            return cut
    listener.problem("too_long", where)
    return []


def _cut(
    ids: NDArray[np.uint32], loss: NDArray[np.uint8], size: int
) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
    """The first tokens, still with the end-of-text that keeps conversations apart."""
    if len(ids) <= size:
        return ids, loss
    return np.append(ids[: size - 1], ids[-1:]), np.append(loss[: size - 1], loss[-1:])


def _messages(row: dict[str, Any], where: Place) -> list[Message]:
    if "messages" in row:
        return _turns(row["messages"], "messages", where)
    asked = next((key for key in ("prompt", "instruction") if key in row), None)
    answer = next((key for key in _ANSWERS if key in row), None)
    if asked and answer:
        more = [key for key in ("context", "input") if asked == "instruction" and row.get(key)]
        question = "\n\n".join(_text(row, key, where) for key in (asked, *more))
        return [_turn("user", question), _turn("assistant", _text(row, answer, where))]
    names = ", ".join(map(repr, list(row)[:8])) or "none"
    raise ValueError(f"{where()}: no conversation; it must have {_WANTED}, and has the fields {names}")


def _pair(row: dict[str, Any], where: Place) -> list[list[Message]]:
    """The chosen and the rejected conversation."""
    if not {"chosen", "rejected"} <= row.keys():
        names = ", ".join(map(repr, list(row)[:8])) or "none"
        raise ValueError(f"{where()}: no preference; it must have {_WANTED_PAIR}, and has the fields {names}")
    prompt = row.get("prompt", [])
    asked = [_turn("user", prompt)] if isinstance(prompt, str) else _turns(prompt, "prompt", where)
    sides = []
    for key in ("chosen", "rejected"):
        answer = row[key]
        said = [_turn("assistant", answer)] if isinstance(answer, str) else _turns(answer, key, where)
        if not asked and isinstance(answer, str):
            raise ValueError(f"{where()}: {key} is an answer alone; there must be a prompt")
        # Some data sets repeat the prompt at the head of each side
        repeats = said[: len(asked)] == asked
        is_asked = any(turn["role"] == "user" for turn in asked)
        if is_asked and not repeats and (extra := _before_answer(said)):
            raise ValueError(
                f"{where()}: {key} begins with a turn of {extra[0]['role']} but not with the prompt; "
                f"it must begin with all of the prompt, or with the answer"
            )
        sides.append(said if repeats else asked + said)
    return sides


def _turns(value: Any, key: str, where: Place) -> list[Message]:
    if not isinstance(value, list):
        raise ValueError(f"{where()}: {key} is {type(value).__name__}; it must be a list of turns")
    turns = []
    for number, turn in enumerate(value):
        name = f"{key}[{number}]"
        if not isinstance(turn, dict):
            raise ValueError(f"{where()}: {name} is {type(turn).__name__}; it must have role and content")
        role, content = turn.get("role"), turn.get("content")
        if role not in ROLES:
            raise ValueError(f"{where()}: {name}.role is {role!r}; it must be one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise ValueError(f"{where()}: {name}.content is {type(content).__name__}; it must be text")
        turns.append(_turn(role, content))
    return turns


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _text(row: dict[str, Any], key: str, where: Place) -> str:
    if not isinstance(row[key], str):
        raise ValueError(f"{where()}: field {key!r} holds {type(row[key]).__name__}; it must hold text")
    return str(row[key])


def _shared_turns(chosen: list[Message], rejected: list[Message]) -> int:
    """Turns that both sides begin with, up to the answers in which they differ."""
    equal = (a == b for a, b in zip(chosen, rejected, strict=False))
    shared = next((number for number, same in enumerate(equal) if not same), min(len(chosen), len(rejected)))
    return min(shared, len(chosen) - 1, len(rejected) - 1)


def _is_empty(turns: list[Message]) -> bool:
    answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    return not answers or not all(answer.strip() for answer in answers)


def _before_answer(turns: list[Message]) -> list[Message]:
    first = (number for number, turn in enumerate(turns) if turn["role"] == "assistant")
    return turns[: next(first, len(turns))]


def _question(messages: list[Message]) -> str:
    """An answer with nothing before it stands for itself, or all such lines would share a split."""
    return json.dumps(_before_answer(messages) or messages[:1])
