"""Outcomes: what became of each example of a task, and of all of them together."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from dbrx_train.data.tokenizer import Tokenizer
from dbrx_train.evaluate.answers import cut, is_right, vote
from dbrx_train.evaluate.code import completion, judge, pass_at_k
from dbrx_train.evaluate.prompts import Prompt
from dbrx_train.evaluate.sandbox import Sandbox
from dbrx_train.evaluate.scoring import Score
from dbrx_train.evaluate.tasks import Task

__all__ = ["Outcome", "Result", "answered", "result", "scored", "tested"]


@dataclass(frozen=True)
class Outcome:
    """Of one example."""

    task: str
    """Label and shots."""
    category: str | None
    index: int
    """Of its row in the category, or in the file."""
    score: float
    """1: right, 0: wrong; a part of a tie of right and wrong."""
    chance: float
    """What guessing would score."""
    bits: float | None
    """Information of the right answer, -log2 of its probability; None where answers are generated."""
    bytes: int
    """Of the right answer in UTF-8."""
    truncated: bool
    """Whether its prompt lost its beginning."""
    single: float | None = None
    """Where several answers were drawn: the mean score of one."""
    details: dict[str, Any] = field(default_factory=dict)
    """``prompt``, ``continuation``, and what else explains the score."""


def scored(
    name: str,
    category: str | None,
    prompt: Prompt,
    scores: Sequence[Score],
    task: Task,
    tokenizer: Tokenizer,
    as_foundry: bool,
) -> Outcome:
    """The outcome where continuations were scored: one for each choice, or the only one."""
    context, continuation = prompt.pairs[prompt.gold]
    right, text = scores[prompt.gold], tokenizer.decode(continuation)
    details: dict[str, Any] = {"prompt": tokenizer.decode(context), "continuation": text}
    if task.is_choice:
        means = [score.log_prob / score.tokens for score in scores]
        credit = _first_best(means, prompt.gold) if as_foundry else _share_of_best(means, prompt.gold)
        if task.icl_task_type == "multiple_choice":
            details["choices"] = [tokenizer.decode(ids) for _, ids in prompt.pairs]
        else:
            details["prompts"] = [tokenizer.decode(ids) for ids, _ in prompt.pairs]
        details |= {"gold": prompt.gold, "mean_log_probs": means}
    else:
        credit = float(right.greedy == tuple(continuation))
        details |= {"predicted": tokenizer.decode(right.greedy), "predicted_ids": list(right.greedy)}
        details |= {"log_prob": right.log_prob}
    bits = -right.log_prob / math.log(2)
    chance = 1 / len(scores) if task.is_choice else 0.0
    return Outcome(
        name,
        category,
        prompt.index,
        credit,
        chance,
        bits,
        len(text.encode()),
        prompt.truncated,
        None,
        details,
    )


def _first_best(means: Sequence[float], gold: int) -> float:
    """LLM Foundry's way: the lowest perplexity in float32, and of several equal ones the first."""
    with np.errstate(over="ignore"):
        perplexities = [float(np.exp(np.float32(-mean))) for mean in means]
    return float(perplexities.index(min(perplexities)) == gold)


def _share_of_best(means: Sequence[float], gold: int) -> float:
    """Choices that tie share the point."""
    best = (
        [i for i, mean in enumerate(means) if mean == max(m for m in means if not math.isnan(m))]
        if not all(map(math.isnan, means))
        else []
    )
    return (gold in best) / max(1, len(best))


def answered(
    name: str,
    category: str | None,
    prompt: Prompt,
    texts: Sequence[str],
    task: Task,
    context: str,
    as_foundry: bool,
) -> Outcome:
    """The outcome where ``texts`` were written after the prompt, which is ``context``.

    Of several the commonest answer counts, of equally common ones the first (arXiv 2203.11171).
    """
    answers = [cut(text, task, as_foundry) for text in texts]
    right = [is_right(answer, prompt.answers, task, as_foundry) for answer in answers]
    votes = Counter(vote(answer, task) for answer in answers)
    chosen = [vote(answer, task) for answer in answers].index(votes.most_common(1)[0][0])
    details = {
        "prompt": context,
        "continuation": texts[chosen],
        "answer": answers[chosen],
        "answers": prompt.answers,
    }
    if len(texts) > 1:
        details["samples"] = list(texts)
    return _written(name, category, prompt, float(right[chosen]), [float(each) for each in right], details)


def tested(
    name: str,
    category: str | None,
    prompt: Prompt,
    texts: Sequence[str],
    task: Task,
    context: str,
    sandbox: Sandbox,
) -> Outcome:
    """The outcome where ``texts`` are programs: each is run, and the score is pass@k."""
    assert prompt.problem is not None
    found = [judge(prompt.problem, text, sandbox) for text in texts]
    passed, programs = [float(ok) for ok, _ in found], list(map(completion, texts))
    score = pass_at_k(len(texts), sum(ok for ok, _ in found), task.pass_at_k)
    details: dict[str, Any] = {
        "prompt": context,
        "continuation": programs[0],
        "verdict": found[0][1],
    }
    if len(texts) > 1:
        details |= {"samples": programs, "verdicts": [why for _, why in found]}
    return _written(name, category, prompt, score, passed, details)


def _written(
    name: str,
    category: str | None,
    prompt: Prompt,
    score: float,
    scores: Sequence[float],
    details: dict[str, Any],
) -> Outcome:
    single = _mean(scores) if len(scores) > 1 else None
    return Outcome(name, category, prompt.index, score, 0.0, None, 0, prompt.truncated, single, details)


@dataclass(frozen=True)
class Result:
    """Of one task."""

    metric: str
    score: float
    """Mean over examples, and over categories alike where a task has them."""
    examples: int
    chance: float
    """What guessing would score."""
    bits_per_byte: float | None
    """Of the right answers, all taken together: falls long before accuracy rises."""
    truncated: int
    """Prompts that lost their beginning."""
    single: float | None = None
    """Where several answers were drawn: the mean score of one (maj@1, pass@1)."""
    categories: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: without what does not apply."""
        return {key: value for key, value in asdict(self).items() if value not in (None, {})}


def result(task: Task, outcomes: Sequence[Outcome]) -> Result:
    """What a task's outcomes, of which there is one at least, come to."""
    categories = sorted({outcome.category for outcome in outcomes if outcome.category is not None})
    means = {
        name: _mean([outcome.score for outcome in outcomes if outcome.category == name])
        for name in categories
    }
    singles = [outcome.single for outcome in outcomes if outcome.single is not None]
    bits = [outcome.bits for outcome in outcomes if outcome.bits is not None]
    return Result(
        task.metric,
        _mean(list(means.values()) or [outcome.score for outcome in outcomes]),
        len(outcomes),
        _mean([outcome.chance for outcome in outcomes]),
        math.fsum(bits) / sum(outcome.bytes for outcome in outcomes) if bits else None,
        sum(outcome.truncated for outcome in outcomes),
        _mean(singles) if singles else None,
        means,
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
