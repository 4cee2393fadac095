"""Whole runs through the real Composer Trainer, MDS shards and MLflow store."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ranks import free_port
from tiny_run import mlflow_run, run_yaml, saved_tensors
from warm import Rank, Runs, Warm

from dbrx_train.checkpoint import folder as folders
from dbrx_train.checkpoint.huggingface import export
from dbrx_train.checkpoint.verify import verify
from dbrx_train.config import ConfigError, load
from dbrx_train.train.run import run

DBRX_TRAIN = str(Path(sys.executable).parent / "dbrx-train")


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*args: str, cwd: Path, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [DBRX_TRAIN, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=300, **kwargs
    )


@pytest.mark.slow
def test_a_run_learns_and_logs_what_it_did(
    workplace: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_yaml(workplace, in_tmp, "whole")
    run(load(path, ["max_duration=24ba", "logging.peak_flops=null"]))
    said = capsys.readouterr().out
    assert said.strip().splitlines()[-1].startswith("run ")
    assert "mlflow ui --backend-store-uri sqlite:///" in said

    client, found = mlflow_run(workplace, "whole")
    assert found.info.status == "FINISHED"
    losses = {
        m.step: m.value for m in client.get_metric_history(found.info.run_id, "loss/train/cross_entropy")
    }
    assert sorted(losses) == list(range(24))
    assert losses[23] < losses[0] - 3
    for source in ("web", "code"):
        history = client.get_metric_history(found.info.run_id, f"metrics/eval/{source}/cross_entropy")
        assert history[-1].value < history[0].value - 3
        perplexity = client.get_metric_history(found.info.run_id, f"metrics/eval/{source}/perplexity")
        assert perplexity[0].value == pytest.approx(2.718281828 ** history[0].value, rel=1e-3)
    metrics = found.data.metrics
    for name in (
        "loss/train/balance",
        "gradients/norm",
        "lr/matrices",
        "memory/peak_resident_gb",
        "experts/layer01/entropy",
    ):
        assert name in metrics
    assert any(name.endswith("tokens_per_sec") for name in metrics)
    assert any(name.endswith("mfu") for name in metrics)
    assert sum(metrics[f"experts/layer00/expert{e:02d}"] for e in range(16)) == pytest.approx(1)
    # A ramp from 0.75 to 0.25 over three quarters of the run, then 0.25.
    assert metrics["mix/web/asked"] == 0.25
    assert metrics["mix/web/served_so_far"] == pytest.approx(0.4375, abs=1 / 96)
    assert metrics["mix/web/tokens"] + metrics["mix/code/tokens"] == 24 * 4 * 32
    assert found.data.params["data.mix"].startswith("[{'at': '0tok'")
    assert found.data.params["optimization.optimizer.lr"] == "0.01"
    assert "6*active_params" in found.data.params["mfu.formula"]
    artifacts = {a.path for a in client.list_artifacts(found.info.run_id)}
    assert {"config.yaml", "training.png"} <= artifacts
    assert load(in_tmp / "whole" / "config.yaml").max_duration == "24ba"

    run(load(path, ["max_duration=24ba"]))
    assert "whole is done" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        [],
        ["optimization.optimizer.name=lionw", "model.router_jitter=0.2"],
        ["optimization.optimizer.state_dtype=bfloat16"],
    ],
    ids=["adamw", "lionw", "bfloat16"],
)
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(
    workplace: Path, in_tmp: Path, options: list[str]
) -> None:
    options = [*options, "evaluation.interval=2ba", "evaluation.max_samples=2"]
    straight = load(run_yaml(workplace, in_tmp, "straight"), options)
    run(straight)
    broken = load(run_yaml(workplace, in_tmp, "broken"), options)
    run(broken)
    folder = Path(broken.folder) / "checkpoints"
    for late in ("ba8", "ba6"):
        folders.remove(folder / late)
    run(broken)  # from ba4
    a, b = (saved_tensors(Path(c.folder) / "checkpoints" / "ba8") for c in (straight, broken))
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.slow
def test_a_larger_max_duration_continues(workplace: Path, in_tmp: Path) -> None:
    path = run_yaml(workplace, in_tmp, "longer")
    fixed = ["data.mix=[{at: 0tok, weights: {web: 1, code: 1}}]", "evaluation.max_samples=0"]
    run(load(path, fixed))
    jump = r"^the learning rate goes on with 2\.\d+e-03, where .*/ba8 would have had 1\.\d+e-03: "
    with pytest.warns(UserWarning, match=jump):
        run(load(path, [*fixed, "max_duration=10ba"]))
    assert folders.saved(in_tmp / "longer" / "checkpoints")[0].name == "ba10"
    client, found = mlflow_run(workplace, "longer")
    steps = [m.step for m in client.get_metric_history(found.info.run_id, "loss/train/total")]
    assert steps == list(range(10))


@pytest.mark.slow
def test_two_ranks_train_what_one_does_and_one_goes_on_from_there(workplace: Path, in_tmp: Path) -> None:
    """By Composer's launcher; ``test_launch.py`` and ``test_stopping.py`` have torchrun."""
    run(load(run_yaml(workplace, in_tmp, "one")))
    path = run_yaml(workplace, in_tmp, "two")
    launcher = [str(Path(sys.executable).parent / "composer"), "-n", "2", "--master_port", str(free_port())]
    done = subprocess.run(
        [*launcher, "-m", "dbrx_train", "train", str(path)],
        cwd=in_tmp,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("mlflow ui") == 1, "rank 0 alone speaks"
    names = ("one", "two")
    one, two = (saved_tensors(in_tmp / name / "checkpoints" / "ba8") for name in names)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4)  # of steps of 1e-2
    # Adam hides a constant factor on the gradients; their norm and the held-out loss do not.
    logged = ["gradients/norm", "metrics/eval/web/cross_entropy", "gradients/experts", "parameters/head"]
    logged += ["loss/source/web", "loss/source/code", "router/layer01/z", "router/layer01/max_logit"]
    for metric in logged:
        histories = []
        for name in names:
            client, found = mlflow_run(workplace, name)
            histories.append([m.value for m in client.get_metric_history(found.info.run_id, metric)])
        assert histories[0] == pytest.approx(histories[1], rel=1e-4), metric

    # And one rank goes on, amid the ramp, from where two had come.
    folder = in_tmp / names[1] / "checkpoints"
    for late in ("ba8", "ba6"):
        folders.remove(folder / late)
    run(load(path))
    for name, weight in saved_tensors(folder / "ba8").items():
        torch.testing.assert_close(weight, one[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_interrupted_at_the_keyboard_it_loses_nothing_saved(workplace: Path, in_tmp: Path) -> None:
    path = run_yaml(workplace, in_tmp, "stopped")
    process = subprocess.Popen(
        [DBRX_TRAIN, "train", str(path), "max_duration=2000ba", "data.num_workers=1"],
        cwd=in_tmp,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    folder = in_tmp / "stopped" / "checkpoints"
    deadline = time.monotonic() + 120
    while not folders.saved(folder) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert folders.read(folders.saved(folder)[0])
    _, found = mlflow_run(workplace, "stopped")
    assert found.info.status == "KILLED"


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_passed_over(
    workplace: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load(run_yaml(workplace, in_tmp, "damaged"), ["evaluation.max_samples=0"])
    run(config)
    newest = Path(config.folder) / "checkpoints" / "ba8"
    part = newest / "__0_0.distcp"
    part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
    capsys.readouterr()
    run(config)
    assert f"passed over {newest}: not a whole checkpoint (__0_0.distcp has " in capsys.readouterr().out
    assert folders.read(newest)


@pytest.mark.slow
def test_a_checkpoint_of_another_shape_is_refused(workplace: Path, in_tmp: Path) -> None:
    path = run_yaml(workplace, in_tmp, "shape")
    run(load(path, ["max_duration=2ba", "evaluation.max_samples=0"]))
    with pytest.raises(ConfigError, match=r"model.n_layers: 3 here, but .*ba2 was saved with 2"):
        run(load(path, ["model.n_layers=3"]))
    assert folders.read(in_tmp / "shape" / "checkpoints" / "ba2")


@pytest.mark.slow
def test_a_changed_past_of_the_mix_is_refused(workplace: Path, in_tmp: Path) -> None:
    path = run_yaml(workplace, in_tmp, "past")
    run(load(path, ["evaluation.max_samples=0"]))
    done = command(
        "train",
        str(path),
        "max_duration=16ba",
        "data.mix=[{at: 0tok, weights: {web: 0.1, code: 0.9}}]",
        cwd=in_tmp,
    )
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "mix" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["data.seq_len=16"], "data.sources.web: .* samples of 32 tokens, but the run asks for 16"),
        (["data.sources.web.local=nowhere"], "data.sources.web: nowhere"),
        (["model.vocab_size=500"], "vocabulary has only 500"),
        (["device=gpu"], "device: gpu, but torch finds no CUDA GPU"),
        (["device=cpu", "profile.memory=true"], "profile.memory: is of a GPU, and this run is on a CPU"),
    ],
)
def test_data_and_machine_that_do_not_fit(
    workplace: Path, in_tmp: Path, options: list[str], says: str
) -> None:
    if "device=gpu" in options and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    config = load(run_yaml(workplace, in_tmp, "misfit"), options)
    with pytest.raises(ConfigError) as caught:
        run(config)
    assert re.search(says, str(caught.value))
    assert "\n" not in str(caught.value)


def test_a_model_that_the_machine_cannot_hold_is_refused_before_it_is_made(
    workplace: Path, in_tmp: Path
) -> None:
    path = run_yaml(workplace, in_tmp, "huge")
    shape = "d_model: 6144, n_layers: 40, n_heads: 48, n_kv_heads: 8, ffn_hidden_size: 10752, vocab_size: 512"
    without = re.sub(r"^model: .*?}}?$", f"model: {{{shape}}}", path.read_text(), flags=re.M | re.S)
    path.write_text(without)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigError, match=r"^model: weights, .* of 130B parameters need 2,0\d\d GB on this "):
        run(load(path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB
    assert not (in_tmp / "huge").exists()


@pytest.mark.slow
def test_generate_continues_a_prompt(workplace: Path, in_tmp: Path, warm: Warm) -> None:
    def generate(*arguments: str) -> Rank:
        (done,) = warm.apart("generate", *arguments, ranks=1, cwd=str(in_tmp))
        return done

    run(load(run_yaml(workplace, in_tmp, "talk"), ["evaluation.max_samples=0"]))
    greedy = [generate("talk", "the model", "--max-new-tokens", "8") for _ in range(2)]
    assert greedy[0].code == 0, greedy[0].err
    assert greedy[0].out.startswith("the model ")
    assert greedy[0].out == greedy[1].out
    sampled = generate("talk", "the", "--temperature", "1.0", "--top-p", "0.9", "--max-new-tokens", "20")
    assert sampled.code == 0
    for wrong in (["nowhere", "x"], ["talk/config.yaml", "x"], ["talk", "x", "--max-new-tokens", "100"]):
        done = generate(*wrong)
        assert done.code == 2, (wrong, done.err)
        assert len(done.err.strip().splitlines()) == 1


def test_a_wrong_config_costs_no_heavy_import(in_tmp: Path) -> None:
    (in_tmp / "wrong.yaml").write_text("run_name: x\nmodle: {}\n")
    done = command("train", "wrong.yaml", cwd=in_tmp)
    assert done.returncode == 2
    assert done.stderr == "dbrx-train: wrong.yaml: unknown key modle; did you mean model?\n"
    assert imported_by("train", f"{in_tmp}/wrong.yaml") == "[]"


@pytest.mark.slow
def test_check_tells_all_that_can_be_told_without_torch(workplace: Path, in_tmp: Path) -> None:
    path = run_yaml(workplace, in_tmp, "fresh")
    said = imported_by("train", str(path), "--check")
    assert re.fullmatch(r"fresh is in order: .* parameters, .* tokens of web, code\n\[\]", said)
    missing = command("train", str(path), f"data.sources.code.local={in_tmp}/nowhere", cwd=in_tmp)
    assert missing.returncode == 2
    assert missing.stderr.startswith(f"dbrx-train: data.sources.code: {in_tmp}/nowhere: no such folder")
    assert imported_by("train", str(path), f"data.sources.code.local={in_tmp}/nowhere") == "[]"
    often = command("train", str(path), "data.sources.web.max_epochs=0.01", "--check", cwd=in_tmp)
    assert often.returncode == 2
    assert "sources.web.max_epochs: " in often.stderr
    assert not (in_tmp / "fresh").exists()


def imported_by(*arguments: str) -> str:
    """What a command prints, and then which of the packages that take seconds it has loaded."""
    code = f"""
import sys
from dbrx_train.cli import main
sys.argv = ["dbrx-train", *{arguments!r}]
try:
    main()
finally:
    print(sorted({{"torch", "composer", "streaming", "mlflow"}} & set(sys.modules)))
"""
    python = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    return python.stdout.strip()


@pytest.mark.slow
def test_a_damaged_checkpoint_that_claims_to_be_newer_is_never_kept_in_place_of_a_good_one(
    workplace: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_yaml(workplace, in_tmp, "prune")
    fixed = ["evaluation.max_samples=0", "data.mix=[{at: 0tok, weights: {web: 1, code: 1}}]"]
    fixed += ["checkpoints.keep=1", "checkpoints.interval=1ba"]
    run(load(path, [*fixed, "max_duration=2ba", "checkpoints.keep=2"]))
    folder = in_tmp / "prune" / "checkpoints"
    (folder / "ba9").mkdir()
    (folder / "ba9" / folders.MANIFEST).write_text("damaged")
    for torn in ("ba8", "ba7.partial", "ba6.fetched"):
        (folder / torn).mkdir()
    run(load(path, [*fixed, "max_duration=4ba"]))
    assert sorted(p.name for p in folder.iterdir()) == ["ba4", "ba9"]
    assert f"checkpoint: {folder}/ba4" in capsys.readouterr().out
    assert folders.read(folder / "ba4")


@pytest.mark.slow
def test_on_resuming_the_configurations_options_rule_and_what_changed_is_kept(
    workplace: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_yaml(workplace, in_tmp, "options")
    fixed = ["evaluation.max_samples=0", "data.mix=[{at: 0tok, weights: {web: 1, code: 1}}]"]
    run(load(path, [*fixed, "max_duration=2ba"]))
    changed = ["optimization.optimizer.lr=0.004", "optimization.learning_rate.schedule=constant"]
    changed.append("optimization.optimizer.state_dtype=bfloat16")  # the moments are read, and rounded
    run(load(path, [*fixed, *changed, "max_duration=3ba"]))
    said = capsys.readouterr().out
    lr = "optimization.optimizer.lr 0.01 -> 0.004"
    assert re.search(rf"^changed since the last start: max_duration 2ba -> 3ba, .*{lr}", said, re.M)
    earlier = yaml.safe_load((in_tmp / "options" / "config-1.yaml").read_text())
    assert (earlier["max_duration"], earlier["optimization"]["optimizer"]["lr"]) == ("2ba", 0.01)
    assert yaml.safe_load((in_tmp / "options" / "config.yaml").read_text())["max_duration"] == "3ba"
    told = [json.loads(line) for line in (in_tmp / "options" / "events.jsonl").read_text().splitlines()]
    (event,) = (each for each in told if each["kind"] == "configuration")
    assert event["step"] == 2
    assert event["changed"]["max_duration"] == ["2ba", "3ba"]
    client, found = mlflow_run(workplace, "options")
    assert lr in found.data.tags["configuration.step2"]
    rates = [m.value for m in client.get_metric_history(found.info.run_id, "lr/matrices")]
    assert rates[-1] == pytest.approx(0.004)
    with pytest.raises(ConfigError, match=r"optimization.optimizer.name: lionw here, but .* with adamw"):
        run(load(path, [*fixed, "optimization.optimizer.name=lionw"]))


@pytest.mark.slow
def test_a_disk_that_takes_no_more_is_one_line_and_loses_nothing_saved(
    workplace: Path, in_tmp: Path, warm: Warm
) -> None:
    path = run_yaml(workplace, in_tmp, "full")
    fixed = ["evaluation.max_samples=0", "data.mix=[{at: 0tok, weights: {web: 1, code: 1}}]"]
    fixed.append("model.vocab_size=100352")
    run(load(path, [*fixed, "max_duration=2ba"]))
    # A limit on the size of a file (here a quarter of a checkpoint) fails a write as a full disk does.
    code, said = warm("train", str(path), *fixed, faults=[{"kind": "limit", "bytes": 20_000_000}])
    folder = in_tmp / "full" / "checkpoints"
    assert code == 2, said
    assert said.strip().splitlines()[-1] == f"dbrx-train: {folder}/ba4: File too large"
    assert "Traceback" not in said
    assert [p.name for p in folder.iterdir()] == ["ba2"]
    assert folders.read(folder / "ba2")


def test_the_mix_can_be_looked_at_before_training(workplace: Path, in_tmp: Path) -> None:
    path = run_yaml(workplace, in_tmp, "look")
    done = command("data", "mix", str(path), "--picture", "look.png", cwd=in_tmp)
    assert done.returncode == 0, done.stderr
    first, *_, last = [line.split() for line in done.stdout.splitlines() if line.strip()[:1].isdigit()]
    assert first == ["0", "0", "4", "x", "32", "0.750", "0", "0.00", "0.250", "0", "0.00"]
    assert (last[0], last[1], last[5], last[8]) == ("1,024", "8", "0.250", "0.750")
    assert (in_tmp / "look.png").read_bytes().startswith(b"\x89PNG")
    limited = command("data", "mix", str(path), "data.sources.web.max_epochs=0.01", cwd=in_tmp)
    assert limited.returncode == 2
    assert "sources.web.max_epochs" in limited.stderr


def test_global_batch_and_ranks(workplace: Path, in_tmp: Path) -> None:
    from dbrx_train.plan.world import check_world

    path = run_yaml(workplace, in_tmp, "world")
    config = load(path, ["optimization.microbatch_size=1"])
    check_world(config, 4)
    with pytest.raises(
        ConfigError, match=r"4 samples of 32 tokens does not split over 3 ranks; .* samples of 32, is 3"
    ):
        check_world(config, 3)
    check_world(load(path), 4)  # microbatches of 2, but each rank has only one sample
    with pytest.raises(ConfigError, match="microbatch_size: 3 does not divide a rank's 4 samples of 32"):
        check_world(load(path, ["optimization.microbatch_size=3"]), 1)
    growing = "optimization.batch_size_warmup=[{until: 2ba, global_batch_size: 1}]"
    with pytest.raises(ConfigError, match="a step of 1 samples of 32 tokens does not split over 2 ranks"):
        check_world(load(path, [growing]), 2)


def test_microbatches_keep_their_tokens_when_samples_grow_longer() -> None:
    from dbrx_train.train.data import split_batch

    def sizes(samples: int, length: int) -> list[int]:
        batch = {"input_ids": torch.arange(samples * length).view(samples, length)}
        batch["source"] = batch["input_ids"][:, 0]
        parts = split_batch(batch, 4, seq_len=32)
        for name, whole in batch.items():
            assert torch.equal(torch.cat([part[name] for part in parts]), whole)
        return [len(part["input_ids"]) for part in parts]

    assert sizes(8, 32) == [4, 4]
    assert sizes(4, 64) == [2, 2]
    assert sizes(2, 256) == [1, 1]
    assert sizes(3, 32) == [3]


@pytest.mark.slow
def test_a_configuration_that_is_not_a_runs_is_not_overwritten(workplace: Path, in_tmp: Path) -> None:
    path = run_yaml(workplace, in_tmp, "config")
    text = path.read_text()
    config = load(path, [f"folder={in_tmp}"])
    with pytest.raises(ConfigError, match=r"folder: .*/config.yaml is not a run's, and the run would over"):
        run(config)
    assert path.read_text() == text
    assert not (in_tmp / ".lease").exists()


@pytest.mark.slow
def test_a_run_goes_on_when_its_reader_leaves_and_is_exported_while_it_prunes(
    runs: Runs, tmp_path: Path
) -> None:
    large = "model.vocab_size=100352"  # checkpoints that take as long to save as others to read
    command = [DBRX_TRAIN, *runs.command("watched", "max_duration=60ba", large)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.stdout.close()
        exported = 0
        while process.poll() is None:
            if not folders.saved(runs.checkpoints("watched")):
                time.sleep(0.1)
                continue
            export(runs.folder("watched"), tmp_path / f"{exported}", torch.float32, pytest.fail)
            verify(runs.folder("watched"))
            exported += 1
        assert process.stderr is not None
        said = process.stderr.read()
    assert process.returncode == 0, said
    assert said.count("nobody reads standard output any more; training goes on") == 1
    assert exported > 2
    assert folders.saved(runs.checkpoints("watched"))[0].name == "ba60"
    assert runs("watched", "max_duration=62ba", large)[0] == 0
    assert [path.name for path in folders.saved(runs.checkpoints("watched"))] == ["ba62"], "none is held now"
