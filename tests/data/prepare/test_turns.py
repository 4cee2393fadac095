"""What a row says, in each form that data sets have, and what becomes of what is not read."""

from __future__ import annotations

from typing import Any

import pytest

from dbrx_train.data.prepare.chat_rows import read_conversation, read_pair
from dbrx_train.data.prepare.turns import Turn

ASK = {"role": "user", "content": "Hi"}
SAY = {"role": "assistant", "content": "Ho"}
CALL = {"id": "1", "type": "function", "function": {"name": "rain", "arguments": '{"in":"Rome","mm":1e2}'}}
RENDERED = '<tool_call>\n{"name": "rain", "arguments": {"in":"Rome","mm":1e2}}\n</tool_call>'


class Heard:
    def __init__(self) -> None:
        self.kinds: list[str] = []

    def problem(self, kind: str, where: Any) -> None:
        assert where() == "a.jsonl:1"
        self.kinds.append(kind)

    def advance(self, size: int) -> None: ...


def read(row: dict[str, Any]) -> tuple[list[Turn], list[str]]:
    heard = Heard()
    return read_conversation(row, lambda: "a.jsonl:1", heard), heard.kinds


def answers(*turns: dict[str, Any]) -> list[str]:
    """What a conversation's last turn says, and what was not read."""
    said, unread = read({"messages": [ASK, *turns]})
    return [said[-1].content, *unread]


def test_sharegpt_turns_are_those_of_messages() -> None:
    talk = [("system", "Be brief."), ("human", "Hi"), ("gpt", "Ho"), ("tool", "7"), ("function_call", "{}")]
    said, unread = read({"conversations": [{"from": who, "value": what} for who, what in talk]})
    roles = ("system", "user", "assistant", "tool", "assistant")
    assert said == [Turn(role, what) for role, (_, what) in zip(roles, talk, strict=True)]
    assert unread == []
    assert read({"conversations": [ASK, SAY]})[0] == [Turn("user", "Hi"), Turn("assistant", "Ho")]


@pytest.mark.parametrize(
    ("fields", "trained"),
    [
        ({}, None),
        ({"weight": 0}, False),
        ({"weight": 0.0}, False),
        ({"weight": 1}, True),
        ({"weight": None}, None),
        ({"train": False}, False),
        ({"train": True}, True),
        ({"masked": True}, False),
        ({"masked": False}, None),
        ({"masked": False, "weight": 0}, False),
        ({"train": False, "weight": 0, "masked": True}, False),
    ],
)
def test_a_turn_says_whether_it_is_trained_on(fields: dict[str, Any], trained: bool | None) -> None:
    said, unread = read({"messages": [ASK, SAY | fields]})
    assert (said[-1].trained, unread) == (trained, [])
    assert said[-1] == Turn("assistant", "Ho"), "which is nothing to tell turns apart by"


def test_parts_of_text_are_joined() -> None:
    parts = [{"type": "text", "text": "One, "}, {"text": "two."}]
    assert answers(SAY | {"content": parts}) == ["One, two."]
    assert answers(SAY | {"content": []}) == [""]


def test_calls_become_text_to_the_letter() -> None:
    assert answers(SAY | {"content": None, "tool_calls": [CALL]}) == [RENDERED]
    assert answers(SAY | {"tool_calls": [CALL, CALL]}) == [f"Ho\n{RENDERED}\n{RENDERED}"]
    older = {"name": "rain", "arguments": '{"in":"Rome","mm":1e2}'}
    assert answers(SAY | {"content": "", "function_call": older}) == [RENDERED]
    made = SAY | {"tool_calls": [{"name": "f", "arguments": {"é": [1]}}, {"name": "g"}]}
    assert answers(made)[0].splitlines()[2::3] == [
        '{"name": "f", "arguments": {"é": [1]}}',
        '{"name": "g", "arguments": {}}',
    ]
    torn = SAY | {"tool_calls": [{"name": "f", "arguments": '{"a": '}]}
    assert '"arguments": "{\\"a\\": "}' in answers(torn)[0]


def test_fields_that_mean_something_and_are_not_read_are_told_of() -> None:
    turn = SAY | {"name": "Bob", "reasoning_content": "Hm.", "tool_calls": [], "prefix": False}
    noticed = [f"field {name!r} of a turn is not read" for name in ("name", "reasoning_content")]
    assert answers(turn) == ["Ho", *noticed]
    assert answers(turn, ASK | {"tool_calls": [CALL]}, turn)[1:] == [
        *noticed, "field 'tool_calls' of a turn is not read"
    ]  # fmt: skip
    row = {"messages": [ASK, SAY], "weight": 0, "tools": [{}], "images": [], "id": 7, "topic": "greeting"}
    assert read(row)[1] == ["field 'tools' is not read", "field 'weight' is not read"]
    assert read({"messages": [ASK, SAY], "weight": 1.0})[1] == []
    assert read({"prompt": "Hi", "input": "you", "response": "a", "output": "b"})[1] == [
        "field 'input' is not read", "field 'output' is not read"
    ]  # fmt: skip
    assert read({"instruction": "Hi", "input": "you", "output": "a"})[1] == []
    heard = Heard()
    pair = {"prompt": "Hi", "chosen": "a", "rejected": [SAY | {"weight": 0}], "chosen_score": 9.0}
    read_pair(pair, lambda: "a.jsonl:1", heard)
    assert heard.kinds == ["field 'chosen_score' is not read"]


@pytest.mark.parametrize("name", ["system", "system_prompt"])
def test_a_system_prompt_beside_the_turns_is_the_first(name: str) -> None:
    system, turns = Turn("system", "Be brief."), [Turn("user", "Hi"), Turn("assistant", "Ho")]
    for row in ({"messages": [ASK, SAY]}, {"prompt": "Hi", "response": "Ho"}):
        assert read({**row, name: "Be brief."}) == ([system, *turns], [])
        assert read({**row, name: ""}) == read({**row, name: None}) == (turns, [])
    given = {"messages": [{"role": "system", "content": "Be brief."}, ASK, SAY]}
    assert read({**given, name: "Be brief."}) == ([system, *turns], [])
    with pytest.raises(ValueError, match=f"a.jsonl:1: field '{name}' is another system prompt than the"):
        read({**given, name: "Be long."})
    pair = {"prompt": "Hi", "chosen": "Ho", "rejected": "No", name: "Be brief."}
    sides = read_pair(pair, lambda: "a.jsonl:1", Heard())
    assert [side[:2] for side in sides] == [[system, turns[0]]] * 2


@pytest.mark.parametrize(
    ("turn", "says"),
    [
        ({"from": "bot", "value": "a"}, r"\.from is 'bot'; it must be one of system, .*human, gpt"),
        ({"from": "gpt", "value": 1}, r"\.value is int; it must be text"),
        (SAY | {"weight": 0.5}, r"\.weight is 0.5; it must be 0 or 1"),
        (SAY | {"weight": [1, 0]}, r"\.weight is \[1, 0\]; it must be 0 or 1"),
        (SAY | {"train": "no"}, r"\.train is 'no'; it must be true or false"),
        (SAY | {"train": True, "weight": 0}, r" is to be trained on and is not, by its weight and train"),
        (
            SAY | {"content": [{"type": "image_url"}]},
            r"\.content\[0\] is a part of type 'image_url'; it must",
        ),
        (SAY | {"content": ["a"]}, r"\.content\[0\] is a part of type 'str'; it must be {\"type\": \"text\""),
        (SAY | {"content": [{"type": "text", "text": None}]}, r"\.content\[0\] is a part of type 'text'; it"),
        (SAY | {"tool_calls": "f()"}, r"\.tool_calls is str; it must be a list of calls"),
        (SAY | {"tool_calls": [{"id": 1}]}, r"\.tool_calls\[0\] is no call; it must have a function's name"),
        ({"role": "tool", "content": {"a": 1}}, r"\.content is dict; it must be text"),
    ],
)
def test_what_is_no_turn_is_refused(turn: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=rf"^a.jsonl:1: messages\[1\]{says}") as caught:
        read({"messages": [ASK, turn]})
    assert "\n" not in str(caught.value)
