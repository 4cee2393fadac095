"""Steps that would spoil the weights are skipped; where they do not end, the run goes back."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from bad_step_ranks import events, faulty
from paths import HELPERS
from tiny_run import run_yaml, saved_tensors
from warm import Warm

from dbrx_train.checkpoint import folder as folders
from dbrx_train.config import ConfigError, RunConfig, load
from dbrx_train.resilience.spike_detector import RollingStats, SpikeDetector
from dbrx_train.train.run import run

PROGRAM = str(HELPERS / "bad_step_ranks.py")
QUICK = ["evaluation.max_samples=0", "data.mix=[{at: 0tok, weights: {web: 1, code: 1}}]"]
QUICK += ["optimization.learning_rate.schedule=constant", "optimization.optimizer.lr=1e-3"]


def configured(workplace: Path, folder: Path, name: str, *options: str) -> RunConfig:
    return load(run_yaml(workplace, folder, name), [*QUICK, *options])


def final(config: RunConfig, step: int = 8) -> dict[str, torch.Tensor]:
    return saved_tensors(Path(config.folder) / "checkpoints" / f"ba{step}")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def judged(judge: SpikeDetector, step: int, loss: float, norm: float = 1.0) -> str | None:
    return judge.judge(step, {"loss": loss, "gradient norm": norm})


def test_a_bound_follows_good_values_alone() -> None:
    judge = SpikeDetector(8, 4, 20.0)
    for step in range(4):
        assert judged(judge, step, 1e6 if step == 1 else 3.0, 1.0) is None, "a grace"
    assert judged(judge, 4, math.nan) == "loss is nan"
    assert judged(judge, 5, 3.0, math.inf) == "gradient norm is inf"
    assert judged(judge, 6, 3.0, 1e4) == "gradient norm is 1e+04, over 2.718"
    assert judged(judge, 7, 4.0, 1.3) is None
    assert (judge.row, judge.skipped) == (0, 3)
    assert list(judge.usual["gradient norm"].values) == [1.0] * 4 + [1.3]
    assert list(judge.usual["loss"].values) == [3.0, 1e6, 3.0, 3.0, 4.0]
    for step in range(8, 20):
        assert judged(judge, step, 3.0 * 1.1 ** (step - 8)) is None, "it goes along with what rises gently"
    for _ in range(20):
        assert judged(judge, 20, 1e4) is not None, "it does not get used to what it refuses"


def test_a_bound_is_of_logarithms() -> None:
    usual = RollingStats(9, [1, 2, 4, 8, 16])
    assert usual.limit(3) == pytest.approx(4 * 2**3)  # the deviations are 2, 1, 0, 1, 2 octaves
    usual.add(0.0)
    assert len(usual.values) == 5
    assert RollingStats(9, [1.0]).limit(20) == pytest.approx(math.e)
    assert math.isfinite(RollingStats(9, [1.0, 1e300]).limit(1e9))


def test_what_is_judged_after_resuming_is_what_would_have_been() -> None:
    config = (5, 3, 20.0)
    values = [1.0, 1.1, 0.9, math.nan, 1.2, 1.0, 50.0, 1.3, math.inf, 1.0]
    whole = SpikeDetector(*config)
    said = [judged(whole, step, value) for step, value in enumerate(values)]
    for stop in range(len(values)):
        before, after = SpikeDetector(*config), SpikeDetector(*config)
        again = [judged(before, step, value) for step, value in enumerate(values[:stop])]
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        again += [judged(after, step, value) for step, value in enumerate(values[stop:], stop)]
        assert again == said
        assert after.state_dict() == whole.state_dict()


def test_a_level_that_is_there_to_stay_is_learned_after_one_roll_back() -> None:
    judge = SpikeDetector(8, 4, 20.0)
    kept = judge.state_dict()
    for step in range(10):
        judged(judge, step, 1.0)
    for step in range(10, 13):
        assert judged(judge, step, 9.0)
    judge.load_state_dict(judge.roll_back(13, kept))
    assert [judged(judge, step, 9.0) for step in range(10, 30)] == [None] * 20
    assert judge.rollbacks == 0, "the trouble is over"


def test_roll_backs_over_one_trouble_are_counted() -> None:
    judge = SpikeDetector(8, 4, 20.0)
    for step in range(20):
        judged(judge, step, 1.0)
    kept = judge.state_dict()
    for times in (1, 2, 3):
        for step in range(20, 40):
            loss, cause = (math.nan, "loss is nan") if step > 30 else (1.0, None)
            assert judged(judge, step, loss) == cause
        judge.load_state_dict(judge.roll_back(40, kept))
        assert judge.rollbacks == times
        assert list(judge.usual["loss"].values) == [1.0] * 8, "what is not finite is no new level"
    for step in range(20, 48):
        judged(judge, step, 1.0)
    assert judge.rollbacks == 3
    judged(judge, 48, 1.0)
    assert judge.rollbacks == 0


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("bad_steps.window=0", "bad_steps.window: must be positive, not 0"),
        ("bad_steps.warmup=200", "bad_steps.warmup: must be at most window 128, not 200"),
        ("bad_steps.warmup=0", "bad_steps.warmup: must be at least 1, not 0"),
        ("bad_steps.mad_threshold=0", "bad_steps.mad_threshold: must be positive or null"),
        ("bad_steps.rollback_after=0", "bad_steps.rollback_after: must be positive or null"),
        ("bad_steps.max_rollbacks=-1", "bad_steps.max_rollbacks: must not be negative, not -1"),
    ],
)
def test_options_that_make_no_sense(workplace: Path, tmp_path: Path, option: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        configured(workplace, tmp_path, "senseless", option)


FAULTS = [
    {"step": 0, "in": "loss", "factor": "nan", "microbatch": 0},  # before the optimizer has any state
    {"step": 3, "in": "loss", "factor": "inf", "microbatch": 1},
    {"step": 4, "in": "gradient", "factor": "nan"},
    {"step": 9, "in": "loss", "factor": "1e4"},
]


@pytest.mark.slow
def test_a_bad_step_leaves_no_trace_in_the_weights(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["max_duration=12ba", "bad_steps.warmup=5", "checkpoints.keep=9"]
    options += ["model.loss_free_bias_rate=0.01"]
    undisturbed = configured(workplace, tmp_path, "undisturbed", *options, "checkpoints.interval=1dur")
    with faulty() as plain:
        run(undisturbed)
    assert not (Path(undisturbed.folder) / "events.jsonl").exists()
    config = configured(workplace, tmp_path, "skipping", *options)
    capsys.readouterr()
    with faulty(*FAULTS) as noted:
        run(config)
    bad = [fault["step"] for fault in FAULTS]
    assert noted.steps == [(step, step not in bad) for step in range(12)]
    assert noted.samples == plain.samples, "data goes on"
    assert noted.rates == plain.rates, "and so does time"
    said = capsys.readouterr().out
    assert "step 3 skipped: loss is inf; the samples of its batch are in " in said
    found = events(config)
    assert [(event["kind"], event["step"], event["tokens"]) for event in found] == [
        ("bad_step", step, 128 * step) for step in bad
    ]
    causes = [event["cause"] for event in found]
    assert causes[:3] == ["loss is nan", "loss is inf", "gradient norm is nan"]
    assert causes[3].startswith("loss is ")
    assert ", over " in causes[3]
    names = ("web", "code")
    for event in found:
        of = {name: [n for s, n in noted.samples[event["step"]] if names[s] == name] for name in names}
        assert event["samples"] == {name: numbers for name, numbers in of.items() if numbers}
    suspects = [sum(map(len, event.get("not_finite", {}).values())) for event in found]
    assert suspects == [2, 2, 0, 0], "the samples of the microbatch"
    client = mlflow.MlflowClient(f"sqlite:///{workplace}/mlruns.db")
    (logged,) = client.search_runs(["1"], "tags.run_name = 'skipping'")
    history = client.get_metric_history(logged.info.run_id, "bad_steps/skipped")
    assert [(m.step, m.value) for m in history] == [(step, i + 1) for i, step in enumerate(bad)]
    losses = {m.step: m.value for m in client.get_metric_history(logged.info.run_id, "loss/train/total")}
    assert found[3]["loss"] == pytest.approx(losses[9])
    assert math.isnan(losses[3]), "infinity would be the largest number there is"
    assert "events.jsonl" in {artifact.path for artifact in client.list_artifacts(logged.info.run_id)}
    weights = final(config, 12)
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert any(weights[name].any() for name in weights if name.endswith("expert_bias"))
    steps = [tensor for name, tensor in weights.items() if name.endswith(".step")]
    assert steps == [8] * 19, "of every parameter"

    # Resumed just before the spike, the run still knows what is usual.
    for step in (10, 12):
        folders.remove(Path(config.folder) / "checkpoints" / f"ba{step}")
    with faulty(*FAULTS) as resumed:
        run(config)
    assert resumed.steps == [(step, step != 9) for step in range(8, 12)]
    assert equal(final(config, 12), weights)


@pytest.mark.slow
def test_another_optimizer_adapters_and_fine_tuning(workplace: Path, tmp_path: Path) -> None:
    faults = [{"step": step, "in": "gradient", "factor": "nan"} for step in (0, 2)]
    base = configured(workplace, tmp_path, "base", "max_duration=4ba", "optimization.optimizer.name=lionw")
    with faulty(*faults) as noted:
        run(base)
    assert noted.steps == [(0, False), (1, True), (2, False), (3, True)]
    ill = [{"step": step, "in": "gradient", "factor": "nan", "times": 1} for step in (2, 3)]
    begin = ["max_duration=4ba", "bad_steps.rollback_after=2", f"init_from.path={base.folder}"]
    for name, options in (("adapters", ["lora.rank=2"]), ("tuned", [])):
        with faulty(*ill) as noted:
            run(configured(workplace, tmp_path, name, *begin, *options))
        assert noted.steps == [(0, True), (1, True), (2, False), (3, False), (2, True), (3, True)]


@pytest.mark.slow
def test_without_skipping_a_bad_step_is_taken(workplace: Path, tmp_path: Path) -> None:
    config = configured(workplace, tmp_path, "poisoned", "max_duration=2ba", "bad_steps.skip=false")
    with faulty({"step": 0, "in": "loss", "factor": "nan"}) as noted:
        run(config)
    assert noted.steps[0] == (0, True)
    assert final(config, 2)["model.lm_head.weight"].isnan().any()


@pytest.mark.slow
def test_bad_steps_in_a_row_take_the_run_back(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["bad_steps.rollback_after=3", "checkpoints.asynchronous=true", "data.num_workers=1"]
    options += ["checkpoints.keep=9"]
    straight = configured(workplace, tmp_path, "straight", *options)
    run(straight)
    # Steps 3, 4 and 5 fail once, as on a machine that was ill for a while.
    ill = [{"step": step, "in": "gradient", "factor": "nan", "times": 1} for step in (3, 4, 5)]
    again = configured(workplace, tmp_path, "again", *options)
    with faulty(*ill) as noted:
        run(again)
    bad = [(step, False) for step in (3, 4, 5)]
    assert noted.steps == [(0, True), (1, True), (2, True), *bad, *((step, True) for step in range(2, 8))]
    back = f"3 bad steps in a row: back from step 6 to {again.folder}/checkpoints/ba2\n"
    assert back in capsys.readouterr().out
    assert equal(final(again), final(straight)), "bit for bit as if nothing had been"
    found = events(again)
    assert [event["kind"] for event in found] == ["bad_step"] * 3 + ["rollback"]
    assert (found[3]["step"], found[3]["to_step"], found[3]["skipped"]) == (6, 2, 0)

    over = configured(workplace, tmp_path, "over", *options, "bad_steps.skip_data=true", "max_duration=10ba")
    with faulty(*ill) as noted:
        run(over)
    assert noted.steps == [(0, True), (1, True), (2, True), *bad, *((step, True) for step in range(6, 10))]
    second = saved_tensors(Path(straight.folder) / "checkpoints" / "ba2")
    assert equal(noted.began_with[1], second), "the weights are those of the checkpoint"
    assert events(over)[3]["skipped"] == 4
    # The position in the data follows from time alone, and so a resumed run goes on alike.
    ends = [folders.read(Path(each.folder) / "checkpoints" / "ba8") for each in (straight, over)]
    assert ends[0].metadata["data"] == ends[1].metadata["data"]
    weights = final(over, 10)
    folders.remove(Path(over.folder) / "checkpoints" / "ba10")
    run(over)
    assert equal(final(over, 10), weights)


@pytest.mark.slow
def test_with_no_data_left_to_go_on_with_the_weights_stay(workplace: Path, tmp_path: Path) -> None:
    options = ["max_duration=4ba", "bad_steps.rollback_after=2", "bad_steps.skip_data=true"]
    config = configured(workplace, tmp_path, "last", *options)
    with faulty(*({"step": step, "in": "loss", "factor": "nan"} for step in (2, 3))) as noted:
        run(config)
    assert noted.steps == [(0, True), (1, True), (2, False), (3, False)]
    assert equal(final(config, 4), final(config, 2))


@pytest.mark.slow
def test_a_spike_that_stays_is_trained_on_after_one_roll_back(workplace: Path, tmp_path: Path) -> None:
    config = configured(
        workplace, tmp_path, "shift", "max_duration=12ba", "bad_steps.rollback_after=2", "bad_steps.warmup=4"
    )
    with faulty(*({"step": step, "in": "loss", "factor": "100"} for step in range(6, 12))) as noted:
        run(config)
    before = [(step, True) for step in range(6)]
    assert noted.steps == [*before, (6, False), (7, False), *((step, True) for step in range(6, 12))]


@pytest.mark.slow
@pytest.mark.parametrize("rollbacks", [0, 2])
def test_trouble_that_does_not_end_stops_the_run(
    workplace: Path,
    tmp_path: Path,
    rollbacks: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from dbrx_train.cli import main

    options = ["bad_steps.rollback_after=3", f"bad_steps.max_rollbacks={rollbacks}"]
    path = run_yaml(workplace, tmp_path, "hopeless")
    monkeypatch.setattr(sys, "argv", ["dbrx-train", "train", str(path), *QUICK, *options])
    with (
        faulty(*({"step": step, "in": "loss", "factor": "nan"} for step in range(3, 8))) as noted,
        pytest.raises(SystemExit) as ended,
    ):
        main()
    assert ended.value.code == 1
    errors = capsys.readouterr().err
    assert errors.splitlines()[-1] == (
        f"dbrx-train: stopped at step 6, after 3 bad steps in a row (in the last, loss is nan): {rollbacks} "
        f"roll-backs did not help. Their samples are in {tmp_path}/hopeless/events.jsonl; "
        f"`dbrx-train data inspect` shows them"
    )
    assert "Traceback" not in errors
    assert len(noted.began_with) == 1 + rollbacks
    kinds = [event["kind"] for event in events(load(path))]
    assert kinds == (["bad_step"] * 3 + ["rollback"]) * rollbacks + ["bad_step"] * 3 + ["gave_up"]


@pytest.mark.slow
def test_trouble_before_the_first_checkpoint_stops_the_run(workplace: Path, tmp_path: Path) -> None:
    from dbrx_train.errors import Stopped

    options = ["bad_steps.rollback_after=2", "checkpoints.interval=4ba"]
    config = configured(workplace, tmp_path, "early", *options)
    faults = ({"step": step, "in": "loss", "factor": "nan"} for step in range(4))
    with faulty(*faults), pytest.raises(Stopped, match="there is no checkpoint to go back to yet"):
        run(config)


@pytest.mark.slow
def test_all_ranks_skip_what_one_of_them_finds(workplace: Path, tmp_path: Path, warm: Warm) -> None:
    """Ranks that decided apart would wait for each other; that all end, and alike, is the proof."""
    path = run_yaml(workplace, tmp_path, "ranks")
    options = [*QUICK, "model.loss_free_bias_rate=0.01", "bad_steps.warmup=3"]
    options += ["optimization.microbatch_size=1"]
    faults: list[dict[str, Any]] = [
        {"step": 1, "in": "gradient", "factor": "nan", "rank": 1},
        {"step": 3, "in": "loss", "factor": "nan", "rank": 0, "microbatch": 1},
        {"step": 5, "in": "gradient", "factor": "-inf", "rank": 0},
        {"step": 6, "in": "loss", "factor": "1e4", "rank": 1},
    ]
    ill = [{"step": step, "in": "gradient", "factor": "nan", "rank": 1, "times": 1} for step in (4, 5)]
    spread = [*options, "parallelism.expert=2"]
    jobs = [
        ("sharded", faults, [*options, "checkpoints.interval=1dur"], None),
        ("replicated", faults, [*options, "checkpoints.interval=1dur", "parallelism.replicate=2"], None),
        ("back", ill, [*spread, "bad_steps.rollback_after=2"], None),
        ("favourite", [], [*spread, "model.num_experts=4", "model.top_k=1"], 2),
    ]
    keys = ("name", "faults", "options", "favourite")
    every = [dict(zip(keys, job, strict=True)) for job in jobs]
    sharded, replicated, back, favourite = json.loads(
        warm.torchrun(2, PROGRAM, str(path), json.dumps(every)).splitlines()[-1]
    )
    assert all(each["alike"] for each in (sharded, replicated, back, favourite))
    for each in (sharded, replicated):
        assert each["steps"] == [[step, step not in (1, 3, 5, 6)] for step in range(8)]
    assert replicated["same weights"]
    taken = [[step, True] for step in range(8)]
    assert back["steps"] == [*taken[:4], [4, False], [5, False], *taken[4:]]

    assert favourite["steps"] == taken
    client = mlflow.MlflowClient(f"sqlite:///{workplace}/mlruns.db")
    (logged,) = client.search_runs(["1"], "tags.run_name = 'favourite'")
    for layer in range(2):
        assert logged.data.metrics[f"experts/layer{layer:02d}/expert02"] == 1.0
    weights = saved_tensors(tmp_path / "favourite" / "checkpoints" / "ba8")
    assert all(tensor.isfinite().all() for tensor in weights.values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*events.jsonl")
def test_skipped_steps_are_not_useful_though_no_event_can_be_kept(workplace: Path, tmp_path: Path) -> None:
    """What a step did is told by the train state, not by a file."""
    six = ["max_duration=6ba", "logging.interval=6ba", "checkpoints.interval=6ba"]
    config = configured(workplace, tmp_path, "unheard", *six, "bad_steps.rollback_after=null")
    unwritable = Path(config.folder) / "events.jsonl"
    unwritable.mkdir(parents=True)
    with faulty(*({"step": step, "in": "loss", "factor": "nan"} for step in (1, 2, 3, 4))) as noted:
        run(config)
    assert [changed for _, changed in noted.steps] == [True, False, False, False, False, True]
    entries = [json.loads(line) for line in (Path(config.folder) / "time.jsonl").read_text().splitlines()]
    client = mlflow.MlflowClient(config.logging.mlflow_uri)
    experiment = client.get_experiment_by_name(config.logging.experiment)
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id], "tags.run_name = 'unheard'")
    compute = found.data.metrics["wall/compute"]
    assert entries[0]["step"] == 6
    assert entries[0]["useful"] == pytest.approx(compute * 2 / 6, abs=2e-3)
