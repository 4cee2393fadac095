"""Turns of a conversation, from the forms in which data sets hold them.

A turn is ``{"role": …, "content": …}``, or ``{"from": …, "value": …}`` as ShareGPT has it. Its content is a
text or a list of text parts, ``[{"type": "text", "text": …}]``. What an assistant calls (``tool_calls``, or
``function_call``) becomes text after its content, in the form of Hermes and Qwen::

    <tool_call>
    {"name": "weather", "arguments": {"city": "Rome"}}
    </tool_call>

What a tool answers is a turn of its own, of role ``tool``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dbrx_train.data.prepare.records import Place
from dbrx_train.data.prepare.unread import OF_TURN, unread

__all__ = ["Turn", "read_turns"]


@dataclass(frozen=True)
class Turn:
    """Who says what. Turns are equal if these are."""

    role: str
    content: str
    trained: bool | None = field(default=None, compare=False)
    """What its data say of training on it, if they do."""


_ROLES = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "developer": "system",
    "function": "tool",
}
_SHAREGPT_ROLES = _ROLES | {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
_OF_ANSWER = OF_TURN - {"tool_calls", "function_call"}
# What a value says of training on the turn; a mask that is off says nothing
_TRAINED: dict[str, tuple[dict[Any, bool | None], str]] = {
    "weight": ({0: False, 1: True}, "0 or 1"),
    "train": ({False: False, True: True}, "true or false"),
    "masked": ({True: False, False: None}, "true or false"),
}


def read_turns(value: Any, key: str, where: Place, not_read: set[str]) -> list[Turn]:
    """The turns in the list ``value``, called ``key`` in errors; names of fields not read go to ``not_read``.

    Raises:
        ValueError: ``FILE:LINE: KEY[NUMBER]…`` for what is no turn, or is not of text.
    """
    if not isinstance(value, list):
        raise ValueError(f"{where()}: {key} is {type(value).__name__}; it must be a list of turns")
    return [_read_turn(turn, f"{key}[{number}]", where, not_read) for number, turn in enumerate(value)]


def _read_turn(turn: Any, name: str, where: Place, not_read: set[str]) -> Turn:
    if not isinstance(turn, dict):
        raise ValueError(f"{where()}: {name} is {type(turn).__name__}; it must have role and content")
    who, what, roles = "role", "content", _ROLES
    if "from" in turn and "role" not in turn:
        who, what, roles = "from", "value", _SHAREGPT_ROLES
    given, content = turn.get(who), turn.get(what)
    role = roles.get(given) if isinstance(given, str) else None
    if role is None:
        raise ValueError(f"{where()}: {name}.{who} is {given!r}; it must be one of {', '.join(roles)}")
    calls = _calls(turn, name, where) if role == "assistant" else []
    text = "" if content is None and calls else _text(content, f"{name}.{what}", where)
    not_read.update(unread(turn, _OF_ANSWER if role == "assistant" else OF_TURN))
    return Turn(role, "\n".join([text, *calls] if text else calls), _trained(turn, name, where))


def _text(content: Any, name: str, where: Place) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"{where()}: {name} is {type(content).__name__}; it must be text")
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            known = 'it must be {"type": "text", "text": …}, other parts cannot be trained on'
            raise ValueError(f"{where()}: {name}[{number}] is a part of type {kind!r}; {known}")
        texts.append(part["text"])
    return "".join(texts)


def _calls(turn: Mapping[str, Any], name: str, where: Place) -> list[str]:
    """Each call of the turn as text."""
    calls = turn.get("tool_calls")
    if not calls and turn.get("function_call") is not None:  # OpenAI's older form
        return [_call(turn["function_call"], f"{name}.function_call", where)]
    if not calls:
        return []
    if not isinstance(calls, list):
        raise ValueError(
            f"{where()}: {name}.tool_calls is {type(calls).__name__}; it must be a list of calls"
        )
    return [_call(call, f"{name}.tool_calls[{number}]", where) for number, call in enumerate(calls)]


def _call(call: Any, name: str, where: Place) -> str:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where()}: {name} is no call; it must have a function's name and arguments")
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        text = json.dumps({} if arguments is None else arguments, ensure_ascii=False)
    elif _is_json(arguments):
        text = arguments  # to the letter, as the model has to write it
    else:
        text = json.dumps(arguments, ensure_ascii=False)
    called = json.dumps(function["name"], ensure_ascii=False)
    return f'<tool_call>\n{{"name": {called}, "arguments": {text}}}\n</tool_call>'


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _trained(turn: Mapping[str, Any], name: str, where: Place) -> bool | None:
    """Whether the turn's fields say to train on it; None if they say nothing."""
    if turn.keys().isdisjoint(_TRAINED):
        return None
    said: dict[str, bool] = {}
    for key, (meanings, wanted) in _TRAINED.items():
        value = turn.get(key)
        if value is None:
            continue
        if not isinstance(value, int | float) or value not in meanings:
            raise ValueError(f"{where()}: {name}.{key} is {value!r}; it must be {wanted}")
        if (meaning := meanings[value]) is not None:
            said[key] = meaning
    if len({*said.values()}) > 1:
        fields = " and ".join(said)
        raise ValueError(f"{where()}: {name} is to be trained on and is not, by its {fields}; keep one")
    return next(iter(said.values()), None)
