"""What a run will need, before a GPU is touched."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from paths import ROOT, RUNS
from typer.testing import CliRunner

from dbrx_train.cli import app
from dbrx_train.config import ConfigError, RunConfig, load
from dbrx_train.config.sections import LoraConfig
from dbrx_train.plan import hardware
from dbrx_train.plan.adapters import trained
from dbrx_train.plan.collectives import Collective
from dbrx_train.plan.cost import best_interval, lost_share
from dbrx_train.plan.estimates import traffic
from dbrx_train.plan.planner import Plan, count, plan
from dbrx_train.plan.report import report
from dbrx_train.plan.search import changes, nearest, search
from dbrx_train.plan.step_time import Architecture, compute, with_overlap
from dbrx_train.plan.table import render
from dbrx_train.plan.units import BFLOAT16

CONFIGS = ROOT / "configs"
WITHIN_MACHINES = [
    "parallelism.shard=64",
    "parallelism.expert=8",
    "parallelism.innermost=expert",
    "parallelism.reduce_dtype=float32",
    "parallelism.activation_checkpointing=full",
    "optimization.microbatch_size=1",
]


@cache
def configured(name: str, *overrides: str) -> RunConfig:
    return load(CONFIGS / "pretrain" / f"{name}.yaml", overrides)


def by_name(found: Plan) -> dict[tuple[str, str], Collective]:
    return {(each.kind, each.what): each for each in found.sent}


def test_bytes_are_told_apart_by_link() -> None:
    found = plan(configured("dbrx-132b", *WITHIN_MACHINES), 3072)
    sent = by_name(found)
    network = {key: round(each.over_network(8) / 1e9, 1) for key, each in sent.items()}
    assert network["gathered", "experts"] == 55.5 == round(sent["gathered", "experts"].sent / 1e9, 1)
    assert network["scattered", "experts"] == 55.5
    assert network["exchanged", "tokens"] == 0 < sent["exchanged", "tokens"].sent
    # Eight of the 64 edges of the ring lie between machines.
    assert sent["gathered", "dense"].over_network(8) == sent["gathered", "dense"].sent / 8
    assert network["reduced", "experts"] == 15.5
    assert all(each.over_network(3072) == 0 for each in found.sent)
    # The other way round tokens leave their machine, and an expert's weights do not.
    there = by_name(plan(configured("dbrx-132b", *WITHIN_MACHINES, "parallelism.innermost=shard"), 3072))
    assert there["gathered", "experts"].over_network(8) == 0
    assert there["exchanged", "tokens"].over_network(8) == there["exchanged", "tokens"].sent
    halved = by_name(
        plan(configured("dbrx-132b", *WITHIN_MACHINES, "parallelism.reduce_dtype=bfloat16"), 3072)
    )
    assert 2 * halved["scattered", "experts"].sent == sent["scattered", "experts"].sent


def test_bytes_by_link_are_those_of_the_traffic() -> None:
    config = configured("dbrx-73b")
    found = plan(config, 512)
    whole = traffic(
        config.model,
        found.shape,
        microbatches=found.microbatch.per_step,
        tokens=found.microbatch.tokens,
        param_dtype=BFLOAT16,
        reduce_dtype=BFLOAT16,
        activation_checkpointing=config.parallelism.activation_checkpointing,
    )
    sums = dict.fromkeys(("gathered", "scattered", "reduced", "exchanged"), 0.0)
    for each in found.sent:
        sums[each.kind] += each.sent
    assert sums == {kind: getattr(whole, kind) for kind in sums}


@pytest.mark.parametrize(
    ("kind", "ranks", "stride", "share"),
    [
        ("gathered", 8, 1, 0),
        ("gathered", 2, 4, 0),
        ("gathered", 2, 8, 1),
        ("gathered", 16, 1, 2 / 16),
        ("gathered", 4, 4, 2 / 4),
        ("exchanged", 16, 1, 8 / 15),
        ("exchanged", 4, 8, 1),
    ],
)
def test_which_share_leaves_a_machine_of_eight(kind: str, ranks: int, stride: int, share: float) -> None:
    assert Collective(kind, "dense", 1.0, ranks, stride, 1).over_network(8) == pytest.approx(share)


def test_a_step_is_bound_by_its_slowest_part() -> None:
    slow = plan(configured("dbrx-132b"), 3072)
    assert slow.limit == "network"
    quick = plan(configured("dbrx-132b", "plan.network=100000"), 3072)
    assert quick.step.total < slow.step.total
    assert quick.limit == "matrix products"
    assert slow.step.at_best < slow.step.total
    assert plan(configured("dbrx-132b", "plan.imbalance=2"), 3072).step.total > slow.step.total


def test_overlap_is_between_all_and_none() -> None:
    assert with_overlap(3.0, 4.0, 1.0) == 7.0
    assert with_overlap(3.0, 4.0, 2.0) == 5.0
    assert with_overlap(3.0, 4.0, math.inf) == 4.0


def test_computing_never_beats_the_peak_and_grows_with_what_is_done() -> None:
    model, gpu = Architecture.of(configured("dbrx-9b").model), hardware.gpu("h100")
    once = compute(model, gpu, tokens=4096, seq_len=4096)
    flops = configured("dbrx-9b").model.flops_per_token(4096, causal=True) * 4096
    assert once.total > flops / gpu.peak
    again = compute(model, gpu, tokens=4096, seq_len=4096, activation_checkpointing="full")
    assert again.expert_products == pytest.approx((3 + 2 / 3) / 3 * once.expert_products)
    assert again.head == once.head
    assert compute(model, gpu, tokens=4096, seq_len=4096, frozen=True).total < once.total
    assert compute(model, gpu, tokens=4096, seq_len=4096, masked=True).attention > 2 * once.attention
    few = compute(model, gpu, tokens=64, seq_len=64)
    assert few.expert_products > once.expert_products / 64, "small products wait for their weights"


def test_the_best_interval_is_dalys() -> None:
    between = 16.5 * 3600
    assert best_interval(1, between) == pytest.approx(344, abs=1)
    assert best_interval(32, between) == pytest.approx(1928, abs=3)
    assert lost_share(344, 1, 0, 0, between) == pytest.approx(0.0058, abs=1e-4)
    best = best_interval(32, between)
    losses = [lost_share(best * factor, 32, 0, 0, between) for factor in (0.7, 1, 1.4)]
    assert losses[1] == min(losses)
    assert best_interval(10, 4) == 4


def test_a_run_costs_what_its_time_does() -> None:
    found = plan(configured("dbrx-132b", "plan.gpu_hour_price=2", "plan.pue=1"), 3072)
    assert found.cost.gpu_hours == pytest.approx(found.cost.days * 24 * 3072)
    assert found.cost.dollars == pytest.approx(2 * found.cost.gpu_hours)
    assert found.cost.megawatt_hours == pytest.approx(found.cost.gpu_hours * 969 / 1e6)
    assert found.cost.checkpoint == 12 * found.config.model.num_params
    pure = found.step.total * found.config.clock.total_batches / 86400
    assert found.cost.days == pytest.approx(pure / found.cost.goodput)
    assert found.cost.goodput < found.cost.best_goodput < 1
    assert plan(configured("dbrx-132b", "plan.gpu=b200"), 3072).cost.dollars is None


def test_stages_of_a_run_are_planned_apart() -> None:
    growing = "optimization.batch_size_warmup=[{until: 100B tok, global_batch_size: 256}]"
    one, two = plan(configured("dbrx-9b"), 8), plan(configured("dbrx-9b", growing), 8)
    assert two.stage.global_batch_size == 512, "the one with most tokens"
    assert two.config.clock.total_batches > one.config.clock.total_batches
    small = plan(configured("dbrx-9b", "optimization.global_batch_size=256"), 8).step.total
    first = two.config.clock.stages[1].batch
    seconds = first * small + (two.config.clock.total_batches - first) * two.step.total
    assert two.cost.days * two.cost.goodput * 86400 == pytest.approx(seconds)


def test_what_does_not_fit_is_said_first_with_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    options = (*WITHIN_MACHINES, "plan.gpus=64", "parallelism.activation_checkpointing=none")
    config = configured("dbrx-132b", *options)
    with pytest.raises(ConfigError) as refused:
        report(config)
    out = capsys.readouterr().out
    assert out.startswith(f"DOES NOT FIT: {refused.value}\n")
    assert "\n" not in str(refused.value)
    named = str(refused.value).split("would fit with ")[1].split(" (")[0].split()
    mended = configured("dbrx-132b", *options, *named)
    assert plan(mended).fits
    report(mended)
    assert "DOES NOT FIT" not in capsys.readouterr().out


def test_more_gpus_are_named_where_nothing_else_helps() -> None:
    assert nearest(configured("dbrx-35b"), 1).startswith("it would fit on 8 GPUs with ")


def test_adapters_hold_frozen_weights_and_their_own_state() -> None:
    config = load(CONFIGS / "finetune" / "dbrx-132b-lora.yaml")
    assert round(trained(config) / 1e6) == 536
    found, whole = plan(config), plan(replace(config, lora=LoraConfig()), 8)
    assert found.fits
    assert not whole.fits
    held = found.held.memory.peak
    assert round((held["parameters"] - held["gradients"]) / 1e9) == 33
    assert held["gradients"] * 2 == held["optimizer state"] == 8 * trained(config) // 8
    assert held["scattered"] == 0 < whole.held.memory.peak["scattered"]
    assert found.step.compute.expert_products < whole.step.compute.expert_products
    assert {each.kind for each in found.sent} == {"gathered"}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["plan.gpu=h1000"], "plan.gpu: 'h1000' is not known; did you mean h100?"),
        (["plan.gpus=60"], "parallelism.shard: 512 does not divide 60 ranks; use 60"),
        (["parallelism.expert=3"], "parallelism.expert: 3 does not divide 512 ranks of a group; use 4"),
        (["plan.gpus=4096"], "the nearest size that does, in samples of 4096, is 4096"),
        (["plan.gpu_hour_price=0"], "plan.gpu_hour_price: must be positive or null, not 0.0"),
        (["plan.failures=0"], "plan.failures: must be positive, not 0.0"),
        (["plan.storage=-1"], "plan.storage: must be positive, not -1.0"),
        (["plan.restart=soon"], "plan.restart: 'soon' is not a span of time"),
    ],
)
def test_bad_input_is_one_line(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        report(configured("dbrx-132b", *overrides))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["plan.gpu=h1000"], "did you mean h100?"),
        (["plan.gpus=8"], "no mesh fits 8 x h100; it would fit on 32 GPUs with"),
    ],
)
def test_a_search_that_finds_nothing_is_one_line(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        report(configured("dbrx-132b", *overrides), searching=True)


def test_a_search_ranks_what_fits() -> None:
    config = configured("dbrx-9b")
    found = search(config, 64)
    times = [each.step.total for each in found]
    assert all(each.fits for each in found)
    assert times == sorted(times)
    assert times[0] <= plan(config, 64).step.total
    again = plan(configured("dbrx-9b", *changes(config, found[0])), 64)
    assert (again.step, again.held, again.shape) == (found[0].step, found[0].held, found[0].shape)
    assert {each.config.parallelism.activation_checkpointing for each in found} > {"full", "none"}


def test_the_command_prints_the_plan_and_json() -> None:
    path = str(CONFIGS / "pretrain" / "dbrx-9b.yaml")
    options = ["--gpus", "16", "--gpu", "H200", "--machine", "4", "--price", "3.5"]
    shown = CliRunner().invoke(app, ["plan", path, *options])
    assert shown.exit_code == 0
    assert shown.output.startswith("dbrx-9b on 16 x h200 in machines of 4\n")
    assert "at $ 3.50 a GPU-hour" in shown.output
    plain = json.loads(CliRunner().invoke(app, ["plan", path, *options, "--json"]).output)
    moments = plain["memory"]["moments"]
    assert plain["memory"]["allocated"] == sum(moments[plain["memory"]["peak_moment"]].values())
    assert plain["memory"]["allocated"] <= plain["memory"]["total"] < plain["memory"]["room"]
    assert plain["step"]["seconds_from"] < plain["step"]["seconds"] < plain["step"]["seconds_to"]
    assert plain["cost"]["dollars"] == pytest.approx(3.5 * plain["cost"]["gpu_hours"])
    # A group of 8 lies on two machines of 4: the ring's two edges between them, of eight.
    (gathered,) = (each for each in plain["sent"] if each["kind"] == "gathered")
    assert gathered["network"] == pytest.approx(gathered["nvlink"] / 3)


def test_a_plan_needs_no_torch() -> None:
    code = (
        "import sys; from dbrx_train.config import load; from dbrx_train.plan.report import report; "
        f"report(load({str(CONFIGS / 'pretrain' / 'moe-a.yaml')!r})); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.stem)
def test_every_configuration_that_ships_fits_the_gpus_that_it_is_for(path: Path) -> None:
    config = load(path)
    found = plan(config)
    assert found.fits
    assert found.gpus == count(config)
    assert f"{found.gpus:,} x h100" in render(found)
