"""A conversation in the terminal, through a pseudo-terminal and through a pipe."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_weights import save_tiny_weights

from dbrx_train import Dbrx
from dbrx_train.checkpoint.weights import open_weights
from dbrx_train.data.tokenizer import load_tokenizer
from dbrx_train.evaluate.chat import Dialogue, Sampling, _check_answers, talk

LIMIT = 64
NO_FORM = {"system": None, "max_new_tokens": 6, "temperature": 0.0, "top_p": 1.0, "seed": 0, "int8": False}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_weights(tmp_path_factory.mktemp("weights"), LIMIT)


@pytest.fixture
def dialogue(weights: Path) -> Dialogue:
    sampling = Sampling(6, 0.0, 1.0, torch.Generator())
    return Dialogue(Dbrx.from_pretrained(weights).eval(), load_tokenizer(), sampling, said.append)


said: list[str] = []


def test_turns_are_kept_and_the_oldest_go_where_there_is_no_room(dialogue: Dialogue) -> None:
    said.clear()
    first = "".join(dialogue.answer("hello", threading.Event()))
    assert [turn["role"] for turn in dialogue.turns] == ["user", "assistant"]
    assert dialogue.turns[1]["content"] == first != ""
    for _ in range(4):
        list(dialogue.answer("hello again and again", threading.Event()))
        assert len(dialogue._ids()) <= LIMIT + 8
    assert dialogue.turns[0]["content"] != "hello"
    assert "the oldest turns are forgotten: there is no room for them" in said
    dialogue.clear()
    assert "".join(dialogue.answer("hello", threading.Event())) == first
    with pytest.raises(ValueError, match=r"^too long: .* tokens, and the model reads 63$"):
        list(dialogue.answer("a " * LIMIT, threading.Event()))
    assert not dialogue.turns


def test_an_answer_stops_where_it_is_asked_to(dialogue: Dialogue) -> None:
    stopped = threading.Event()
    answer = dialogue.answer("hello", stopped)
    piece = next(answer)
    stopped.set()
    rest = "".join(answer)
    assert dialogue.turns[-1]["content"] == piece + rest
    dialogue.clear()
    assert len("".join(dialogue.answer("hello", threading.Event()))) > len(piece + rest)


def test_lines_of_a_pipe_are_turns(
    weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asides: list[str] = []
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n/clear\n\n/nonsense\nhello\n/exit\nnever\n"))
    talk(weights, **NO_FORM, aside=asides.append)  # type: ignore[arg-type]
    lines = capsys.readouterr().out.splitlines()
    assert lines[: len(lines) // 2] == lines[len(lines) // 2 :]
    assert [each.split(":")[0] for each in asides] == ["/nonsense"]


def test_in_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_ends(weights: Path) -> None:
    """In a process of its own, whose terminal sends the signal."""
    child, terminal = pty.fork()
    if child == 0:
        code = f"""
import sys, time
from dbrx_train.evaluate import chat
real = chat.generate
def slow(*a, **k):
    for token in real(*a, **k):
        time.sleep(0.5)
        yield token
chat.generate = slow
chat.talk(__import__('pathlib').Path({str(weights)!r}), **{NO_FORM | {"max_new_tokens": 40}!r}, aside=print)
print("the end", flush=True)
"""
        os.execve(sys.executable, [sys.executable, "-c", code], {**os.environ, "OMP_NUM_THREADS": "1"})
    watchdog = threading.Timer(120, os.kill, (child, signal.SIGKILL))
    watchdog.start()
    shown = ""

    def wait_for(text: str) -> None:
        nonlocal shown
        while text not in shown:
            shown += os.read(terminal, 1000).decode(errors="replace")
        shown = shown.partition(text)[2]

    try:
        wait_for("Ctrl-C stops an answer")
        wait_for("> ")
        os.write(terminal, b"hello\n")
        wait_for("hello\r\n")
        shown += os.read(terminal, 1000).decode(errors="replace")  # a piece of the answer
        os.write(terminal, b"\x03")
        wait_for("> ")
        os.write(terminal, b"\x04")
        wait_for("the end")
    finally:
        watchdog.cancel()
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(terminal)


def test_a_model_that_has_seen_text_alone_is_refused(weights: Path, workplace: Path, tmp_path: Path) -> None:
    for file in weights.iterdir():
        os.link(file, tmp_path / file.name)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "x"}))
    with pytest.raises(ValueError, match="is a base model, without a chat template; `dbrx-train generate`"):
        talk(tmp_path, **NO_FORM, aside=print)  # type: ignore[arg-type]
    known = open_weights(weights, print)
    text = {"data": {"sources": {"web": {"local": str(workplace / "web")}}}}
    with pytest.raises(ValueError, match="has seen no conversations, only the text of web"):
        _check_answers(replace(known, config=known.config | text))
    _check_answers(replace(known, config=known.config | text | {"init_from": {"path": "a chat model"}}))
