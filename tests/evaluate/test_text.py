"""Text that a model writes from the command line, and how its refusals name what was typed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tiny_weights import save_tiny_weights

from dbrx_train import cli
from dbrx_train.data.tokenizer import load_tokenizer

LIMIT = 16


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_weights(tmp_path_factory.mktemp("weights"), LIMIT)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["dbrx-train", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


@pytest.mark.parametrize("prompt", ["the", "the " * (LIMIT - 2)])
def test_by_default_as_much_is_written_as_there_is_room_for(
    weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], prompt: str
) -> None:
    room = LIMIT - len(load_tokenizer().encode(prompt))
    assert run(monkeypatch, "generate", str(weights), prompt) == 0
    written = capsys.readouterr().out
    assert run(monkeypatch, "generate", str(weights), prompt, "--max-new-tokens", str(room)) == 0
    assert capsys.readouterr().out == written
    assert run(monkeypatch, "generate", str(weights), prompt, "--max-new-tokens", str(room + 1)) == 2
    assert capsys.readouterr().err.endswith(f"exceed max_seq_len {LIMIT}; must be at most {room}\n")


MISTAKES = {
    ("trian",): "No such command 'trian'. Did you mean 'train'? (see dbrx-train --help)",
    ("generate", "x"): "Missing argument 'prompt' (see dbrx-train generate --help)",
    (
        "generate",
        "WEIGHTS",
        "the " * LIMIT,
    ): f"PROMPT: has {LIMIT + 1} tokens, and the model reads {LIMIT}",
    (
        "generate",
        "WEIGHTS",
        "a",
        "--max-new-tokens",
        "99",
    ): "--max-new-tokens: 1 prompt and 99 new tokens",
    ("generate", "nowhere", "x"): "nowhere: no such file or folder, seen from CWD",
    ("report", "nowhere"): "nowhere: no such file or folder, seen from CWD",
    ("checkpoint", "verify", "nowhere"): "nowhere: no such file or folder, seen from CWD",
    ("data", "inspect", "nowhere"): "nowhere: no such folder, seen from CWD; make it with `dbrx-train data",
    ("data", "prepare", "x", "--out", "y"): "x: no such file or folder, seen from CWD",
    (
        "data",
        "prepare",
        "x",
        "--out",
        "y",
        "--val-fraction",
        "3",
    ): "--val-fraction: 3.0 does not lie",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_on_the_command_line_is_one_line_in_its_words(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    weights: Path,
    command: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *(str(weights) if each == "WEIGHTS" else each for each in command)) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"dbrx-train: {MISTAKES[command]}".replace("CWD", str(tmp_path)))
