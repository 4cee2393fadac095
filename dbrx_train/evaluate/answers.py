"""Answers that a model writes: where they end, and which are right."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence

from dbrx_train.data.tokenizer import Tokenizer
from dbrx_train.evaluate.tasks import Task

__all__ = ["cut", "is_right", "normalize", "stopper", "vote"]

_QUOTES = "\u2018\u2019\u00b4`"
_NUMBER = re.compile(r"[-+]?\d[\d,]*(\.\d+)?")


def stopper(stops: Sequence[str], tokenizer: Tokenizer) -> Callable[[list[int]], bool]:
    """Says of the tokens of an answer so far whether one of the texts ``stops`` ends it."""
    sought = [text.encode() for text in stops]
    longest = max(map(len, sought), default=0)

    def is_done(ids: list[int]) -> bool:
        # A character has up to 4 bytes, and a token one at least.
        end = tokenizer.decode(ids[-longest - 3 :]).encode() if sought else b""
        return any(stop in end for stop in sought)

    return is_done


def cut(text: str, task: Task, as_foundry: bool) -> str:
    """The answer proper in what was written: up to the first stop, and after the last ``cot_delimiter``."""
    if task.early_stopping_criteria:
        stops = task.early_stopping_criteria
        # LLM Foundry takes them for regular expressions.
        text = re.split("|".join(stops if as_foundry else map(re.escape, stops)), text)[0]
    return text.split(task.cot_delimiter)[-1] if task.cot_delimiter else text


def is_right(answer: str, right: Sequence[str], task: Task, as_foundry: bool) -> bool:
    """Whether ``answer`` begins with one of those that are right, as a whole word or number.

    ``as_foundry``: a part of a word will do, and numbers are texts.
    """
    clean = normalize if task.do_normalization else str.strip
    given, wanted = clean(answer), {clean(text) for text in right}
    if as_foundry:
        return any(given.startswith(text) for text in wanted)
    return any(text and _begins_with(given, text) for text in wanted)


def _begins_with(given: str, text: str) -> bool:
    if _NUMBER.fullmatch(text):
        found = _NUMBER.match(given.lstrip("$€£"))
        return found is not None and _value(found[0]) == _value(text)
    if not given.startswith(text):
        return False
    following = given[len(text) : len(text) + 1]
    return not (text[-1].isalnum() and following.isalnum())


def _value(number: str) -> float:
    return float(number.replace(",", ""))


def vote(answer: str, task: Task) -> str:
    """What answers have in common that are the same one: the number that they begin with, or their text."""
    given = (normalize if task.do_normalization else str.strip)(answer)
    found = _NUMBER.match(given.lstrip("$€£"))
    return repr(_value(found[0])) if found else given


def normalize(answer: str) -> str:
    """An answer as TriviaQA compares it: without case, punctuation, articles and more than single spaces
    (mandarjoshi90/triviaqa, evaluation/triviaqa_evaluation.py)."""
    dropped = set(string.punctuation + _QUOTES)
    text = "".join(" " if c in dropped else c for c in answer.replace("_", " ").lower())
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())
