"""Answers that a model writes: greedily, many prompts at a time, and compared with the right ones."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence

import torch

from dbrx_train.data.tokenizer import Tokenizer
from dbrx_train.evaluate.tasks import Task
from dbrx_train.model.attention import KVCache
from dbrx_train.model.decoder import Dbrx, Layout

__all__ = ["cut", "is_right", "normalize", "stopper", "write"]

_QUOTES = "\u2018\u2019\u00b4`"
_NUMBER = re.compile(r"[-+]?\d[\d,]*(\.\d+)?")


@torch.no_grad()
def write(
    model: Dbrx,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    is_done: Callable[[list[int]], bool],
    go_on: Callable[[bool], bool],
    device: torch.device,
) -> list[list[int]]:
    """The likeliest tokens after each prompt, one after another, until ``is_done`` with them.

    ``go_on`` hears of each step whether any answer of this rank goes on, and says whether one on any rank
    does: a sharded model is run by all or none.
    """
    width = max(map(len, prompts))
    begin = torch.tensor([width - len(prompt) for prompt in prompts], device=device)[:, None]
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    cache = KVCache(model.config.n_layers, width + max_new_tokens)
    answers: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(prompts)
    for _ in range(max_new_tokens):
        end = cache.length + ids.shape[1]
        last = torch.arange(1, len(prompts) + 1, device=device) * ids.shape[1] - 1
        logits = model(ids, cache=cache, layout=_layout(begin, cache.length, end), logits_at=last).logits
        token = logits.argmax(-1)
        for i, new in enumerate(token.tolist()):
            if not done[i]:
                answers[i].append(new)
                done[i] = is_done(answers[i])
        if not go_on(not all(done)):
            break
        ids = token[:, None]
    return answers


def _layout(begin_B1: torch.Tensor, past: int, end: int) -> Layout:
    """Of the tokens from ``past`` to ``end`` in rows of which each begins at a place of its own."""
    places = torch.arange(past, end, device=begin_B1.device)
    keys = torch.arange(end, device=begin_B1.device)
    seen = keys[None, None, :] >= begin_B1[:, :, None]
    # Padding sees itself, so that it has something to see.
    visible = (keys[None, None, :] <= places[None, :, None]) & (
        seen | (keys[None, None, :] == places[None, :, None])
    )
    return Layout((places[None] - begin_B1).clamp(min=0), visible)


def stopper(task: Task, tokenizer: Tokenizer, stop_ids: Sequence[int]) -> Callable[[list[int]], bool]:
    """Says of an answer so far whether what follows could not count."""
    stops = [text.encode() for text in task.early_stopping_criteria]
    longest = max(map(len, stops), default=0)

    def is_done(ids: list[int]) -> bool:
        if ids[-1] in stop_ids:
            return True
        end = (
            tokenizer.decode(ids[-longest - 3 :]).encode() if stops else b""
        )  # a character has up to 4 bytes
        return any(stop in end for stop in stops)

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


def normalize(answer: str) -> str:
    """An answer as TriviaQA compares it: without case, punctuation, articles and more than single spaces
    (mandarjoshi90/triviaqa, evaluation/triviaqa_evaluation.py)."""
    dropped = set(string.punctuation + _QUOTES)
    text = "".join(" " if c in dropped else c for c in answer.replace("_", " ").lower())
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())
