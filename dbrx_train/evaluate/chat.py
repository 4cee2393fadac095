"""A conversation with a model in the terminal."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

import torch

from dbrx_train.checkpoint.weights import Weights, open_weights
from dbrx_train.data.manifest import read_manifest
from dbrx_train.data.tokenizer import Tokenizer
from dbrx_train.evaluate.text import check_words, load_speaker, pieces
from dbrx_train.model.decoder import Dbrx
from dbrx_train.model.generation import generate
from dbrx_train.model.quantize import quantize

__all__ = ["Dialogue", "Sampling", "talk"]

_CLEAR, _EXIT = "/clear", "/exit"
_COMMANDS = f"{_CLEAR} forgets what was said, {_EXIT} ends; Ctrl-C stops an answer"


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn."""

    max_new_tokens: int
    temperature: float
    top_p: float
    generator: torch.Generator


@dataclass
class Dialogue:
    """What was said so far, and who answers.

    ``aside`` hears of turns that are forgotten.
    """

    model: Dbrx
    tokenizer: Tokenizer
    sampling: Sampling
    aside: Callable[[str], None]
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    def clear(self) -> None:
        """Forget all but the system prompt."""
        self.turns.clear()

    def answer(self, said: str, stopped: threading.Event) -> Iterator[str]:
        """Pieces of the answer to a user's turn, up to its end or until ``stopped`` is set.

        Both turns are kept, the answer as far as it went. The oldest turns go where the model has no room
        left for an answer.

        Raises:
            ValueError: there is no room for this turn alone; it is not kept.
        """
        self.turns.append({"role": "user", "content": said})
        ids = self._within_reach()
        room = self.model.config.max_seq_len - len(ids)
        tokens = generate(
            self.model,
            torch.tensor([ids]),
            min(self.sampling.max_new_tokens, room),
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            stop_ids=self.tokenizer.stop_ids,
            generator=self.sampling.generator,
        )
        heard = takewhile(lambda _: not stopped.is_set(), map(int, tokens))
        self.turns.append({"role": "assistant", "content": ""})
        for piece in pieces(heard, self.tokenizer):
            self.turns[-1]["content"] += piece
            yield piece

    def _within_reach(self) -> list[int]:
        """Ids of the conversation, without its oldest turns where it is too long."""
        longest = self.model.config.max_seq_len - 1
        while len(ids := self._ids()) > longest:
            if len(self.turns) == 1:
                self.turns.clear()
                raise ValueError(f"too long: {len(ids):,} tokens, and the model reads {longest:,}")
            del self.turns[:2]
            self.aside("the oldest turns are forgotten: there is no room for them")
        return ids

    def _ids(self) -> list[int]:
        first = [{"role": "system", "content": self.system}] if self.system else []
        return self.tokenizer.chat([*first, *self.turns], add_generation_prompt=True)


def talk(
    checkpoint: Path,
    *,
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    int8: bool,
    aside: Callable[[str], None],
) -> None:
    """Answer the lines of standard input, one a turn, until it ends or one is ``/exit``.

    Raises:
        ValueError: there are no weights, or of a model that was not taught to answer.
    """
    weights = open_weights(checkpoint, aside)
    _check_answers(weights)
    model, tokenizer = load_speaker(weights)
    generator = torch.Generator().manual_seed(seed)
    dialogue = Dialogue(
        model, tokenizer, Sampling(max_new_tokens, temperature, top_p, generator), aside, system
    )
    ids = dialogue._ids()
    check_words(model, ids, checkpoint)
    if int8:
        aside(f"int8: logits are off by {quantize(model, torch.tensor([ids])):.2%} (root mean square)")
    if sys.stdin.isatty():
        aside(_COMMANDS)
    for line in _lines():
        if line == _EXIT:
            return
        if line == _CLEAR:
            dialogue.clear()
        elif line.startswith("/"):
            aside(f"{line.split()[0]}: no such command; {_COMMANDS}")
        elif line:
            _say_answer(dialogue, line, aside)


def _say_answer(dialogue: Dialogue, line: str, aside: Callable[[str], None]) -> None:
    with _hearing_interrupts() as stopped:
        try:
            for piece in dialogue.answer(line, stopped):
                print(piece, end="", flush=True)
        except ValueError as error:
            aside(str(error))
            return
    print(flush=True)


def _lines() -> Iterator[str]:
    """Of standard input, without blanks around them; with a prompt and editing where it is a terminal."""
    if not sys.stdin.isatty():
        yield from map(str.strip, sys.stdin)
        return
    with suppress(ImportError):
        import readline  # noqa: F401
    with suppress(EOFError):
        while True:
            yield input("> ").strip()


@contextmanager
def _hearing_interrupts() -> Iterator[threading.Event]:
    """Within, Ctrl-C sets an event rather than to end the process."""
    stopped = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: stopped.set())
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


def _check_answers(weights: Weights) -> None:
    """Raise ValueError for a model that is known to have seen text alone."""
    config, advice = weights.config, "`dbrx-train generate` continues text with it"
    if _lacks_template(weights.path):
        raise ValueError(f"{weights.path}: is a base model, without a chat template; {advice}")
    sources = (config.get("data") or {}).get("sources") or {}
    if sources and not (config.get("init_from") or {}).get("path") and _are_texts(sources):
        lacks = f"has seen no conversations, only the text of {', '.join(sources)}"
        raise ValueError(f"{weights.path}: {lacks}; {advice}")


def _lacks_template(path: Path) -> bool:
    """Whether a Hugging Face folder has a tokenizer that lays out no conversations."""
    try:
        known = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return not known.get("chat_template") and not (path / "chat_template.jinja").exists()


def _are_texts(sources: Mapping[str, Mapping[str, str]]) -> bool:
    """Whether a run's sources are known to hold no conversations: some may be gone by now."""
    try:
        return not any(read_manifest(source["local"]).chat for source in sources.values())
    except ValueError:
        return False
