"""A dry run observes what a rank holds and sends, and the closed forms say the same."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from paths import ROOT

from dbrx_train.config import ConfigError, RunConfig, load
from dbrx_train.model.config import DbrxConfig
from dbrx_train.model.decoder import Dbrx
from dbrx_train.parallel import MeshShape
from dbrx_train.plan.adapters import trained
from dbrx_train.plan.caching_allocator import CachingAllocator
from dbrx_train.plan.dry_run import dry_run, estimated, worst_skew
from dbrx_train.plan.dry_run_table import table
from dbrx_train.plan.estimates import reduce_type, traffic
from dbrx_train.plan.memory_tracker import MemoryTracker
from dbrx_train.plan.rank import param_dtype
from dbrx_train.train.optim import build_optimizer

MIB = 2**20


BF16_STATE = "optimization.optimizer.state_dtype=bfloat16"


pytestmark = pytest.mark.usefixtures("no_process_group")


def family(name: str, *options: str) -> RunConfig:
    """A configuration of configs/pretrain with two layers: what it holds of a layer is that of the whole."""
    return load(ROOT / "configs" / "pretrain" / f"{name}.yaml", ["model.n_layers=2", *options])


@pytest.mark.parametrize(
    ("name", "ranks", "options"),
    [
        ("dbrx-9b", 8, []),  # microbatches are accumulated
        ("dbrx-9b", 64, ["precision=fp32", "parallelism.activation_checkpointing=none"]),
        ("dense-a", 512, ["parallelism.reshard_after_forward=false"]),
        ("dbrx-132b", 3072, []),
        ("dbrx-132b", 512, ["parallelism.reduce_dtype=bfloat16", "parallelism.innermost=shard", BF16_STATE]),
    ],
)
def test_memory_and_traffic_are_those_of_the_formulas(name: str, ranks: int, options: list[str]) -> None:
    config = family(name, *options)
    run = dry_run(config, ranks, build_optimizer, skews=(1.0,))
    # Experts that are not spread compute all of a rank's tokens, whatever the load.
    assert [step.skew for step in run.steps] == ([1.0, 4.0] if config.parallelism.expert > 1 else [1.0])
    sent = traffic(
        config.model,
        run.shape,
        microbatches=run.microbatches,
        tokens=run.microbatch.tokens,
        param_dtype=param_dtype(config),
        reduce_dtype=reduce_type(config),
        reshard_after_forward=config.parallelism.reshard_after_forward,
        activation_checkpointing=config.parallelism.activation_checkpointing,
    )
    assert run.sent == type(run.sent)(sent.gathered, sent.scattered, sent.reduced, int(sent.exchanged))
    for step in run.steps:
        expected, peak = estimated(config, run, step.skew), step.peak
        assert expected.total == pytest.approx(peak.allocated, rel=0.1), step.skew
        assert sum(peak.by_kind.values()) == peak.allocated
        for kind in ("parameters", "optimizer state"):
            assert expected.peak[kind] == pytest.approx(peak.by_kind[kind], rel=0.01)
        assert peak.allocated < step.reserved["expandable"] < 1.5 * peak.allocated
        # One copy of the head's gradient in float32, and one in what it is scattered from
        words = config.model.vocab_size * config.model.d_model
        itemsize = (param_dtype(config) or torch.float32).itemsize
        assert step.moments["head backward"].by_kind["head"] < (4 + itemsize + 1) * words + 0.2e9
    assert not dist.is_initialized()
    shown = table(config, run).splitlines()
    assert f"{run.steps[-1].peak.allocated / 1e9:.1f}" in next(s for s in shown if s.startswith("allocated"))
    assert len({len(line) for line in shown[2:]}) == 1  # columns


def test_adapters_beside_experts_hold_no_more_than_the_plan_says() -> None:
    config = load(ROOT / "configs" / "finetune" / "quickstart-lora.yaml")
    run = dry_run(config, 4, build_optimizer)
    (step,) = run.steps
    assert run.sent.scattered == 3 * trained(config)  # 4 bytes each, to three of four ranks
    assert step.peak.allocated < estimated(config, run, 1.0).total < 2 * step.peak.allocated


@pytest.mark.slow
def test_tokens_that_are_kept_are_held_and_not_sent_again() -> None:
    forward, sent, said = {}, {}, {}
    for what in ("full", "full_keep_dispatched"):
        config = family("dbrx-132b", f"parallelism.activation_checkpointing={what}")
        run = dry_run(config, 512, build_optimizer, skews=(1.0,), worst=False)
        (step,) = run.steps
        forward[what], sent[what] = step.moments["head forward"].allocated, run.sent.exchanged
        said[what] = estimated(config, run, 1.0).moments["head forward"]["activations"]
    tokens = run.microbatch.tokens * config.model.top_k * config.model.d_model * 2 * config.model.n_layers
    assert forward["full_keep_dispatched"] - forward["full"] == pytest.approx(tokens, rel=0.02)
    assert said["full_keep_dispatched"] - said["full"] == tokens
    assert sent["full"] - sent["full_keep_dispatched"] == tokens * run.microbatches * 15 // 16


def test_the_worst_load_sends_every_token_to_a_rank_as_often_as_it_has_experts_for_it() -> None:
    assert worst_skew(MeshShape(1, 64, 8), num_experts=16, top_k=4) == 4  # two experts of a token's four
    assert worst_skew(MeshShape(1, 64, 2), num_experts=16, top_k=4) == 2
    assert worst_skew(MeshShape(1, 64, 16), num_experts=16, top_k=1) == 16


@pytest.mark.parametrize(
    ("ranks", "options", "says"),
    [
        (12, [], "parallelism.shard: 8 does not divide 12 ranks; use 6"),
        (
            1024,
            [],
            "optimization.global_batch_size: a step of 512 samples of 4096 tokens does not split over 1024",
        ),
        (8, ["parallelism.cpu_offload=true"], "parallelism.cpu_offload: is not simulated by a dry run"),
    ],
)
def test_what_cannot_be_simulated_is_refused(ranks: int, options: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        dry_run(family("dbrx-9b", *options), ranks, build_optimizer)
    assert not dist.is_initialized()


def test_the_peak_of_real_tensors_is_the_profilers(tmp_path: Path) -> None:
    config = DbrxConfig(
        d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_hidden_size=112, num_experts=4, top_k=2,
        vocab_size=4096, max_seq_len=256,
    )  # fmt: skip
    model = Dbrx(config, seed=1)
    ids = torch.zeros(1, 256, dtype=torch.int64)

    def step() -> None:
        output = model(ids, labels=ids)
        assert output.loss is not None
        output.loss.backward()

    step()
    model.zero_grad()
    tracker = MemoryTracker()
    tracker._dispatched = {}  # experts compute
    tracker.tag([*model.parameters(), ids], "before")
    with tracker.resizing(), tracker:
        step()
    peak = tracker.peaks[""]
    seen = peak.allocated - peak.by_kind["before"]
    model.zero_grad()
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    path = tmp_path / "trace.json"
    profile.export_chrome_trace(str(path))
    events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    now = most = 0
    for event in events:
        if event.get("name") == "[memory]":
            now += event["args"]["Bytes"]
            most = max(most, now)
    assert seen == pytest.approx(most, rel=0.02)


def test_the_allocator_rounds_splits_and_merges() -> None:
    allocator = CachingAllocator(expandable=False)
    allocator.allocate(0, 100, stream=0)
    assert allocator.reserved == 2 * MIB  # small ones share segments of 2 MiB
    allocator.allocate(1, 3 * MIB, stream=0)
    assert allocator.reserved == 22 * MIB  # those below 10 MiB share 20 MiB
    allocator.allocate(2, 15 * MIB, stream=0)  # fits into what is left of these
    assert allocator.reserved == 22 * MIB
    allocator.allocate(3, 15 * MIB, stream=0)
    assert allocator.reserved == 38 * MIB  # larger ones have their own, a multiple of 2 MiB
    for key in (1, 2):
        allocator.release(key)
    allocator.allocate(4, 20 * MIB, stream=0)  # merged again
    assert allocator.reserved == 38 * MIB
    allocator.allocate(5, 4 * MIB, stream=1)
    assert allocator.reserved == 58 * MIB  # streams share nothing


def test_an_expandable_segment_grows_where_whole_ones_leave_gaps() -> None:
    reserved = []
    for expandable in (False, True):
        allocator = CachingAllocator(expandable=expandable)
        for key, size in enumerate((40, 80, 120)):
            allocator.allocate(key, size * MIB, stream=0)
            allocator.release(key)
        reserved.append(allocator.reserved // MIB)
    assert reserved == [240, 120]
