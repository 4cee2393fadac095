"""Scores do not depend on batches, shared contexts or padding; what counts as right."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from dbrx_train import Dbrx, DbrxConfig
from dbrx_train.data.tokenizer import load_tokenizer
from dbrx_train.evaluate.answers import cut, is_right
from dbrx_train.evaluate.outcomes import scored
from dbrx_train.evaluate.prompts import Prompt
from dbrx_train.evaluate.scoring import Pair, Score, batches, rows_of, score
from dbrx_train.evaluate.tasks import Task

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> Dbrx:
    shape = {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_hidden_size": 48}
    made = Dbrx(DbrxConfig(**shape, num_experts=4, top_k=2, vocab_size=300, max_seq_len=96), seed=5)
    with torch.no_grad():
        made.lm_head.weight.mul_(20)  # so that tokens differ in probability
    return made.eval()


@torch.no_grad()
def alone(model: Dbrx, context: list[int], continuation: list[int]) -> Score:
    logits = model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]
    log_probs = logits.log_softmax(-1)[range(len(continuation)), continuation]
    return Score(float(log_probs.sum()), len(continuation), tuple(logits.argmax(-1).tolist()))


def questions(rng: random.Random) -> list[list[Pair]]:
    def ids(least: int, most: int) -> list[int]:
        return [rng.randrange(300) for _ in range(rng.randint(least, most))]

    found: list[list[Pair]] = []
    for _ in range(12):
        context = ids(1, 40)
        found.append([(context, ids(1, 9)) for _ in range(4)])  # shared
        found.append(
            [(context, [choice]) for choice in (5, 6)]
        )  # of one token: nothing but the context is read
        found.append([(context, ids(1, 5))])
        found.append([(context + ids(1, 4), [7, 8, 9]) for _ in range(2)])  # schema
        found.append([(ids(9, 20), [3]), (ids(9, 20), [4])])  # nothing shared
    return found


def test_scores_are_those_of_each_sequence_alone(model: Dbrx) -> None:
    asked = questions(random.Random(0))
    rows = [row for i, pairs in enumerate(asked) for row in rows_of(i, pairs)]
    read = sum(len(row.tokens) for row in rows)
    assert read < 0.6 * sum(len(a) + len(b) for pairs in asked for a, b in pairs), "contexts are read once"
    wanted = {(i, n): alone(model, *pair) for i, pairs in enumerate(asked) for n, pair in enumerate(pairs)}
    for most_tokens in (1, 200, 4000):
        made = batches(rows, most_tokens)
        assert sorted(row.key for batch in made for row in batch) == sorted(row.key for row in rows)
        for batch in made:
            padded = max(len(row.tokens) for row in batch) * len(batch)
            assert len(batch) == 1 or padded <= most_tokens
        found = dict(each for batch in made for each in score(model, batch, CPU))
        assert found.keys() == wanted.keys()
        for key, score_alone in wanted.items():
            assert found[key].log_prob == pytest.approx(score_alone.log_prob, abs=1e-4)
            assert (found[key].tokens, found[key].greedy) == (score_alone.tokens, score_alone.greedy)


def task(**options: object) -> Task:
    usual = {"label": "x", "dataset_uri": "x", "icl_task_type": "generation_task_with_answers"}
    return Task(**usual | {"num_fewshot": [0]} | options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("answer", "right", "normalize", "ours", "foundrys"),
    [
        ("18", "18", False, True, True),
        ("180", "18", False, False, True),
        ("18 eggs", "18", False, True, True),
        ("$18", "18", False, True, False),
        ("1,800 in all", "1800", False, True, False),
        ("18.0", "18", False, True, True),
        ("18.5", "18", False, False, True),
        ("The Beatles!", "beatles", True, True, True),
        ("Beatlesque", "Beatles", True, False, True),
        ("it was the Beatles", "Beatles", True, False, False),
        ("anything", "", False, False, True),
    ],
)
def test_an_answer_begins_with_a_right_one_as_a_whole(
    answer: str, right: str, normalize: bool, ours: bool, foundrys: bool
) -> None:
    asked = task(do_normalization=normalize)
    assert is_right(answer, ["zzz", right], asked, as_foundry=False) is ours
    assert is_right(answer, ["zzz", right], asked, as_foundry=True) is foundrys


def test_an_answer_ends_at_a_stop_and_begins_after_the_thought() -> None:
    asked = task(cot_delimiter="so ", early_stopping_criteria=["\n\n", "Q."])
    assert cut("2 + 2, so 4\n\nQ.", asked, as_foundry=False) == "4"
    assert cut("Quick, so 4 Q.", asked, as_foundry=False) == "4 "
    assert cut("Quick, so 4 Q.", asked, as_foundry=True) == "", "stops are regular expressions there"


@pytest.mark.parametrize(
    ("log_probs", "gold", "ours", "foundrys"),
    [
        ((-1.0, -2.0), 0, 1.0, 1.0),
        ((-1.0, -2.0), 1, 0.0, 0.0),
        ((-3.0, -3.0, -9.0), 0, 0.5, 1.0),
        ((-3.0, -3.0, -9.0), 1, 0.5, 0.0),
        ((math.nan, -3.0), 0, 0.0, 1.0),
        ((math.nan, math.nan), 0, 0.0, 1.0),
        ((-100.0, -90.0), 0, 0.0, 1.0),  # perplexities of which float32 knows neither
    ],
)
def test_choices_that_tie_share_the_point(
    log_probs: tuple[float, ...], gold: int, ours: float, foundrys: float
) -> None:
    tokenizer = load_tokenizer()
    prompt = Prompt(0, [([1], [n]) for n in range(len(log_probs))], gold)
    scores = [Score(each, 1, (0,)) for each in log_probs]
    asked = task(icl_task_type="multiple_choice")
    for as_foundry, wanted in ((False, ours), (True, foundrys)):
        assert scored("x", None, prompt, scores, asked, tokenizer, as_foundry).score == wanted


def test_longer_rows_come_first() -> None:
    rows = [row for i, n in enumerate((3, 30, 9)) for row in rows_of(i, [([1] * n, [2])])]
    lengths = [len(row.tokens) for batch in batches(rows, 40) for row in batch]
    assert all(a >= b for a, b in itertools.pairwise(lengths))
