"""Continuous batching: what is written does not depend on what else is in the batch."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from dbrx_train import Dbrx, DbrxConfig
from dbrx_train.model.continuous_batching import ContinuousBatch, Request, complete
from dbrx_train.model.generation import generate

VOCAB = 300


@pytest.fixture(scope="module")
def model() -> Dbrx:
    shape = {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_hidden_size": 48}
    made = Dbrx(DbrxConfig(**shape, num_experts=4, top_k=2, vocab_size=VOCAB, max_seq_len=96), seed=5)
    with torch.no_grad():
        made.lm_head.weight.mul_(20)  # so that tokens differ in probability
    return made.eval()


def prompts_of(lengths: tuple[int, ...], seed: int = 1) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB) for _ in range(length)] for length in lengths]


def all_of(model: Dbrx, requests: list[Request], **options: int) -> list[list[int]]:
    batch = ContinuousBatch(model, **{"capacity": 96, "slots": 3, "chunk": 16} | options)
    found = dict(complete(batch, enumerate(requests)))
    assert batch.is_idle
    return [found[i] for i in range(len(requests))]


def count_passes(model: Dbrx, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of what the model is given from now on."""
    shapes: list[tuple[int, ...]] = []
    usual = Dbrx.forward

    def forward(self: Dbrx, ids: torch.Tensor, **rest: Any) -> Any:
        shapes.append(tuple(ids.shape))
        return usual(self, ids, **rest)

    monkeypatch.setattr(Dbrx, "forward", forward)
    return shapes


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"slots": 1}, {"slots": 3}, {"slots": 9}, {"slots": 2, "chunk": 5}])
def test_each_prompt_is_continued_as_if_it_were_alone(model: Dbrx, options: dict[str, int]) -> None:
    prompts = prompts_of((3, 17, 1, 80, 17, 40, 2))
    requests = [Request(prompt, 5 + 2 * i) for i, prompt in enumerate(prompts[:-1])]
    requests.append(Request(prompts[-1], 30))
    free = all_of(model, requests, **options)
    for request, got in zip(requests, free, strict=True):
        wanted = [int(t) for t in generate(model, torch.tensor([request.prompt]), request.max_new_tokens)]
        assert got == wanted
    stop = free[-1][9]
    first = free[-1].index(stop)
    stopped = [replace(request, stop_ids={stop}) for request in requests]
    assert all_of(model, stopped, **options)[-1] == free[-1][: first + 1]
    enough = [replace(request, is_done=lambda ids: len(ids) == 4) for request in requests]
    assert [len(ids) for ids in all_of(model, enough, **options)] == [4] * 7


@pytest.mark.slow
def test_samples_follow_from_their_seeds_alone(model: Dbrx) -> None:
    prompts = prompts_of((12, 5, 30))
    requests = [
        Request(prompt, 12, temperature=heat, top_p=share, seed=seed)
        for prompt in prompts
        for seed in range(3)
        for heat, share in ((0.0, 1.0), (1.0, 1.0), (1.5, 0.8))
    ]
    alone = [all_of(model, [request], slots=1)[0] for request in requests]
    assert all_of(model, requests, slots=8) == alone
    assert all_of(model, requests[::-1], slots=5) == alone[::-1]
    assert alone[0] == alone[3] == alone[6], "greedy"
    assert len({tuple(alone[i]) for i in (1, 4, 7)}) == 3, "seeds differ"


def test_a_free_slot_is_refilled_at_once(model: Dbrx, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = count_passes(model, monkeypatch)
    lengths = [20, 2, 2, 2, 2, 2, 2]
    all_of(model, [Request([i], n) for i, n in enumerate(lengths)], slots=2)
    # In waves of two, it would take 20 + 2 + 2 + 2 passes.
    assert len(shapes) == 20
    assert shapes[-1] == (1, 1), "rows that are done are not computed"


def test_what_prompts_have_in_common_is_read_once(model: Dbrx, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = count_passes(model, monkeypatch)
    (common,) = prompts_of((70,))
    ends = prompts_of((4, 6, 5), seed=2)
    requests = [Request(common, 6, 1.0, seed=seed) for seed in range(6)]  # samples of a prompt
    requests += [Request(common + end, 6) for end in ends]
    got = all_of(model, requests, slots=4, chunk=100)
    assert sum(rows * width for rows, width in shapes if width > 1) < 70 + 3 * 7
    monkeypatch.undo()
    assert got == [all_of(model, [request], slots=1)[0] for request in requests]


def test_those_at_work_go_on_while_a_long_prompt_is_read(model: Dbrx) -> None:
    batch = ContinuousBatch(model, slots=2, capacity=96, chunk=8)
    batch.add(7, Request([1], 40))
    batch.step()
    batch.add(8, Request(prompts_of((65,))[0], 2))
    keys = [token.key for _ in range(15) for token in batch.step()]
    assert keys == [7] * 7


def test_a_pass_with_nothing_to_do_is_a_pass_all_the_same(
    model: Dbrx, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = count_passes(model, monkeypatch)
    assert ContinuousBatch(model, 1, 8).step() == []
    assert shapes == [(1, 1)], "sharded models are run by all ranks or none"


@pytest.mark.parametrize(
    ("request_", "name"),
    [
        (Request([1] * 60, 9), "max_new_tokens: 60 prompt and 9 new tokens"),
        (Request([], 9), "input_ids: 0 tokens"),
        (Request([1], 0), "max_new_tokens: 0 is too small"),
        (Request([1], 1, temperature=-1.0), "temperature: -1.0 is negative"),
        (Request([1], 1, top_p=1.5), "top_p: 1.5 is out of range"),
    ],
)
def test_what_cannot_work_is_refused_when_it_is_added(model: Dbrx, request_: Request, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}"):
        ContinuousBatch(model, 1, 64).add(0, request_)


def test_bfloat16_keeps_its_cache_in_bfloat16(model: Dbrx) -> None:
    half = Dbrx(model.config, seed=5).eval().to(torch.bfloat16)
    batch = ContinuousBatch(half, 2, 64)
    found = dict(complete(batch, enumerate(Request(p, 6) for p in prompts_of((9, 20, 3)))))
    assert [len(found[i]) for i in range(3)] == [6, 6, 6]
    assert all(layer._kv.dtype == torch.bfloat16 for layer in batch.cache.layers)
