"""What a run lets one see (metrics, start-up lines, profile, report), and what it never shows."""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Callback, Logger, State, Timestamp
from ranks import free_port
from tiny_run import run_yaml
from warm import Warm

from dbrx_train.checkpoint import folder as folders
from dbrx_train.config import RunConfig, load
from dbrx_train.report import read, render
from dbrx_train.schedule import Clock
from dbrx_train.train import run as runs
from dbrx_train.train.intervals import every, upcoming
from dbrx_train.train.train_state import model_of

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
POINTS = ("0tok, weights: {web: 1}", "2ba, weights: {code: 1}", "4ba, weights: {web: 1, code: 1}")
OPTIONS = [
    "logging.interval=1ba",
    "logging.activations=true",
    "parallelism.activation_checkpointing=full",
    "profile.at=2ba",
    "profile.steps=2",
]


class Outputs(Callback):  # type: ignore[misc]
    """The last block's outputs in each step, seen by a hook of the test's own."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []
        self.steps: list[tuple[float, float]] = []

    def fit_start(self, state: State, logger: Logger) -> None:
        def keep(block: Any, args: Any, output: Any) -> None:
            if block.training:
                self.seen.append(output[0].detach().clone())

        model_of(state).transformer.blocks[-1].register_forward_hook(keep)

    def batch_end(self, state: State, logger: Logger) -> None:
        whole = torch.cat(self.seen)
        self.steps.append((whole.abs().max().item(), whole.square().mean().sqrt().item()))
        self.seen.clear()


def mix(*points: str) -> str:
    return f"data.mix=[{', '.join(f'{{at: {point}}}' for point in points)}]"


@dataclass
class Moment:
    """What intervals ask of a State."""

    timestamp: Timestamp
    previous_timestamp: Timestamp | None = None

    def get_elapsed_duration(self) -> float:
        return 0.5


@pytest.fixture(scope="module")
def watched(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Outputs, str]:
    """A run of eight steps, started again for two more after it lost its last checkpoint; what it printed."""
    folder = tmp_path_factory.mktemp("watched")
    path, outputs = run_yaml(workplace, folder, "watched"), Outputs()
    build = runs.build_trainer

    def with_outputs(*args: Any, **kwargs: Any) -> Any:
        trainer = build(*args, **kwargs)
        trainer.state.callbacks.append(outputs)
        return trainer

    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "build_trainer", with_outputs)
        patch.setattr("builtins.print", lambda *args, **_: said.append(" ".join(map(str, args))))
        runs.run(load(path, [*OPTIONS, mix(*POINTS)]))
        folders.remove(Path(folder) / "watched" / "checkpoints" / "ba8")
        web, code = (f"{name}: {{local: {workplace}/{name}}}" for name in ("web", "code"))
        text = path.read_text()
        assert f"{web}, {code}" in text
        path.write_text(text.replace(f"{web}, {code}", f"{code}, {web}"))  # a run's sources keep their order
        longer = [mix(*POINTS, "8ba, weights: {web: 1}"), "max_duration=10ba", "profile.at=null"]
        config = load(path, [*OPTIONS, *longer])
        runs.run(config)
    return config, outputs, "\n".join(said)


@pytest.mark.slow
def test_metrics_are_what_they_are_called(watched: tuple[RunConfig, Outputs, str]) -> None:
    config, outputs, _ = watched
    metrics = read(Path(config.folder)).metrics
    total = metrics["loss/train/cross_entropy"]
    web, code = metrics["loss/source/web"], metrics["loss/source/code"]
    assert sorted(web) == [1, 2, 5, 6, 7, 8, 9, 10], "a source that is not read has no loss"
    assert sorted(code) == list(range(3, 9))
    for step in range(1, 11):
        if step <= 2 or step > 8:
            assert web[step] == pytest.approx(total[step - 1], rel=1e-5)
        elif step <= 4:
            assert code[step] == pytest.approx(total[step - 1], rel=1e-5)
        else:
            assert min(web[step], code[step]) <= total[step - 1] <= max(web[step], code[step])
    groups = ("embedding", "attention", "router", "experts", "norms", "head")
    for step, norm in metrics["gradients/norm"].items():
        parts = [metrics[f"gradients/{group}"][step] for group in groups]
        assert math.hypot(*parts) == pytest.approx(norm, rel=1e-5), "before clipping, as the whole is"
        assert metrics["parameters/norms"][step] > 0
    for name, column in (("max_abs", 0), ("rms", 1)):
        last_try = [*outputs.steps[:6], *outputs.steps[8:]]  # steps 7 and 8 were taken twice
        assert list(metrics[f"activations/layer01/{name}"].values()) == pytest.approx(
            [step[column] for step in last_try], rel=1e-5
        )
    per_step = 4 * 32 * config.model.top_k  # choices of experts
    for step in range(1, 11):
        shares = [metrics[f"experts/layer00/expert{e:02d}"][step] for e in range(16)]
        assert metrics["experts/layer00/tokens_min"][step] == pytest.approx(min(shares) * per_step)
        assert metrics["experts/layer00/tokens_max"][step] == pytest.approx(max(shares) * per_step)
        spread = math.sqrt(sum((16 * share - 1) ** 2 for share in shares) / 16)
        assert metrics["experts/layer00/cv"][step] == pytest.approx(spread)
        assert 0 < metrics["router/layer00/entropy"][step] <= 1
        assert metrics["data/padded_fraction"][step] == 0


@pytest.mark.slow
def test_goodput_is_of_all_starts(watched: tuple[RunConfig, Outputs, str]) -> None:
    config, _, _ = watched
    lines = (Path(config.folder) / "time.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert [entry["step"] for entry in entries] == [*range(1, 9), 8, 7, 8, 9, 10, 10]
    useful = [entry["useful"] for entry in entries]
    assert useful == sorted(useful[:6]) + useful[6:]
    assert useful[9] < useful[8] + useful[9] - useful[5], "steps 7 and 8 of the first start do not count"
    elapsed = [entry["elapsed"] for entry in entries]
    assert elapsed == sorted(elapsed)
    metrics = read(Path(config.folder)).metrics
    assert metrics["wall/goodput"][10] == pytest.approx(useful[-1] / elapsed[-1], rel=0.01)
    # The parts of an interval are the wall clock's.
    parts = ("compute", "data_wait", "checkpoint", "evaluation")
    wall = sum(metrics[f"wall/{part}"][step] for part in parts for step in range(2, 9))
    assert wall <= (entries[-1]["time"] - entries[0]["time"]) * 1.01
    assert metrics["wall/checkpoint"][3] > 0, "of the save after step 2"
    assert metrics["wall/evaluation"][5] > 0


@pytest.mark.slow
def test_the_start_says_what_will_happen(watched: tuple[RunConfig, Outputs, str]) -> None:
    config, _, said = watched
    assert (
        f"watched: {config.model.num_params:,} parameters, {config.model.num_active_params:,} active" in said
    )
    assert "a step is 4 samples of 32 tokens = 2 in a microbatch x 2 accumulated x 1 rank" in said
    assert "1 x cpu, fp32: replicate 1 x shard 1, experts over 1; about " in said
    assert f"writes to {config.folder}; MLflow: sqlite:///" in said


@pytest.mark.slow
def test_a_profile_is_written(watched: tuple[RunConfig, Outputs, str]) -> None:
    config, _, _ = watched
    (trace,) = (Path(config.folder) / "profile").iterdir()
    assert trace.name == "ba2.trace.json.gz"
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = sum(event.get("name", "").startswith("Optimizer.step") for event in events)
    assert steps == 2
    assert any(event.get("name") == "aten::mm" for event in events)


@pytest.fixture
def report(watched: tuple[RunConfig, Outputs, str], tmp_path: Path) -> Path:
    config, _, _ = watched
    events = [
        {"time": 1.7e9, "step": 3, "tokens": 384, "kind": "bad_step", "reason": "<b>loss</b> is NaN"},
        {"time": 1.7e9, "step": 6, "tokens": 768, "kind": "resumed", "from": "s3://key:hunter2@bucket/x"},
    ]
    path = Path(config.folder) / "events.jsonl"
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    page = tmp_path / "report.html"
    page.write_text(render(read(Path(config.folder))), encoding="utf-8")
    path.unlink()
    return page


@pytest.mark.slow
def test_the_report_says_all_without_scripts(report: Path) -> None:
    page = report.read_text(encoding="utf-8")
    assert "hunter2" not in page
    assert "<b>loss</b>" not in page
    assert "&lt;b&gt;loss&lt;/b&gt; is NaN" in page
    assert "bad step" in page
    assert "lr: 0.01" in page
    assert "1,280 of 1,280" in page
    assert not [
        address for address in page.split("http")[1:] if not address.startswith(("://www.w3.org", "-equiv"))
    ]
    assert len(page) < 300_000


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_the_report_in_a_browser_without_a_network(report: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
        page.context.set_offline(True)
        said: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(report.as_uri())
        figures = page.locator("figure")
        titles = page.locator("figure h3").all_inner_texts()
        assert {"Loss", "Learning rate", "Gradient norm", "Throughput", "Mix", "Goodput"} <= set(titles)
        charts = page.locator("figure.chart")
        for i in range(figures.count()):
            assert figures.nth(i).is_visible()
        for i in range(charts.count()):
            drawn = charts.nth(i).locator("svg path")
            assert drawn.count() > 0, titles[i]
            assert "NaN" not in "".join(path.get_attribute("d") or "" for path in drawn.all()), titles[i]
        # The heat map follows its slider.
        cells = page.locator("#heat rect")
        assert cells.count() == 2 * 16
        fills = (
            "() => [...document.querySelectorAll('#heat rect')].map(cell => cell.getAttribute('fill')).join()"
        )
        late = page.evaluate(fills)
        page.locator("#moment").fill("0")
        assert page.evaluate(fills) != late
        # Its strips are painted.
        assert page.locator(".strips canvas").count() == 2
        painted = "canvas => new Set(canvas.getContext('2d').getImageData(0, 0, 8, 16).data).size"
        assert page.locator(".strips canvas").first.evaluate(painted) > 4
        # A value under the pointer, and by the keyboard.
        plot = charts.first.locator(".plot")
        plot.hover()
        assert "tokens" in page.locator("#tip").inner_text()
        page.mouse.move(0, 0)
        assert page.locator("#tip").is_hidden()
        plot.focus()
        page.keyboard.press("ArrowRight")
        assert "training" in page.locator("#tip").inner_text()
        # Light and dark, wide and narrow
        paper = "() => getComputedStyle(document.body).backgroundColor"
        light = page.evaluate(paper)
        page.locator("#theme").click()
        assert page.evaluate(paper) != light
        page.set_viewport_size({"width": 360, "height": 800})
        assert page.evaluate("() => document.documentElement.scrollWidth") <= 360
        assert said == []
        assert asked == [report.as_uri()]
        browser.close()


@pytest.mark.slow
def test_experts_and_layers_by_the_hundred_are_in_order(watched: tuple[RunConfig, Outputs, str]) -> None:
    record = read(Path(watched[0].folder))
    assert "held-out" not in render(replace(record, metrics={})), "a run that has logged nothing yet"
    shares = {
        f"experts/layer{layer:02d}/expert{expert:02d}": {1: 2.0 ** -(1 + expert % 3) if layer == 100 else 0.0}
        for layer in range(101)
        for expert in range(120)
    }
    page = render(replace(record, metrics=shares))
    (data,) = re.findall(r'id="data">(.*?)</script>', page)
    found = json.loads(data)["experts"]
    cells = base64.b64decode(found["cells"])
    assert (found["layers"], found["experts"]) == (101, 120)
    assert not any(cells[: 100 * 120])
    assert cells[100 * 120 :] == bytes(cells[-120:-117]) * 40


def test_what_is_due_is_known_beforehand() -> None:
    clock = Clock.of("60ba", seq_len=32, global_batch_size=2).with_batch_size("20ba", 5)
    clock = clock.with_seq_len("40ba", 80)
    for interval in ("1ba", "7ba", "300tok", "11sp", "1000tok"):
        before, after = upcoming(interval, clock), every(interval)
        now, steps = Timestamp(), [0, 0]
        for _ in range(60):
            stage = clock.stage(now.batch.value, "ba")
            following = now.to_next_batch(samples=stage.global_batch_size, tokens=stage.tokens_per_batch)
            due = before(Moment(now))
            assert due == after(Moment(following, now)), (interval, now)
            steps[due] += 1
            now = following
        assert steps[True] > 0


@pytest.mark.slow
def test_a_report_of_nothing_is_refused(watched: tuple[RunConfig, Outputs, str], tmp_path: Path) -> None:
    config, _, _ = watched
    with pytest.raises(ValueError, match=r"no run's folder, for it has no config\.yaml"):
        read(tmp_path)
    missing = tmp_path / "none.db"
    with pytest.raises(ValueError, match=r"none\.db: no such file; --tracking-uri"):
        read(Path(config.folder), f"sqlite:///{missing}")
    assert not missing.exists()
    shutil.copy(Path(config.folder) / "config.yaml", tmp_path)
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace("run_name: watched", "run_name: unknown"))
    with pytest.raises(ValueError, match="has no run unknown in experiment dbrx-train; --tracking-uri"):
        read(tmp_path)


def test_a_level_of_logging_that_is_none_is_refused() -> None:
    env = {**os.environ, "DBRX_TRAIN_LOG": "loud"}
    command = [sys.executable, "-m", "dbrx_train", "train", "none.yaml"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "dbrx-train: DBRX_TRAIN_LOG: 'loud' is not one of debug, info, warning\n"


def wait_for_server(port: int) -> None:
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.2)
    pytest.fail("MLflow's server does not come up")


@pytest.mark.slow
def test_no_secret_is_shown_or_kept_anywhere(workplace: Path, tmp_path: Path, warm: Warm) -> None:
    """A whole run whose tracking server, command line and environment hold secrets, then its report."""
    port, secret, key = free_port(), "hunter2-of-the-uri", "wJalrXUtnFEMI-of-the-environment"
    store = tmp_path / "store"
    store.mkdir()
    serve = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    serve += [
        "--backend-store-uri",
        f"sqlite:///{store}/db",
        "--artifacts-destination",
        str(store / "artifacts"),
    ]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(serve, **quiet, start_new_session=True)
    env = {"SOME_SECRET_KEY": key, "DBRX_TRAIN_LOG": "debug"}
    uri = "http://me:${variables.password}@127.0.0.1:" + str(port)
    path = run_yaml(workplace, tmp_path, "secret")
    options = [f"variables.password={secret}", f"logging.mlflow_uri={uri}", "max_duration=2ba"]
    options += [f"variables.note=of {key}"]
    try:
        wait_for_server(port)
        run = ["train", str(path), *options]
        (done,) = warm.apart(*run, ranks=1, cwd=str(tmp_path), environment=env)
    finally:
        os.killpg(server.pid, 9)
        server.wait()
    assert done.code == 0, done.err[-3000:]
    assert "metrics kept in" in done.err, "DBRX_TRAIN_LOG=debug"
    assert "step 2: " in done.err
    assert load(tmp_path / "secret" / "config.yaml").logging.mlflow_uri == f"http://***@127.0.0.1:{port}"
    with pytest.raises(ValueError, match=r"holds a secret, which is masked; give --tracking-uri"):
        read(tmp_path / "secret")
    real = uri.replace("${variables.password}", secret)
    page = ["report", str(tmp_path / "secret"), "--tracking-uri", real]
    env["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "1"
    (failed,) = warm.apart(*page, ranks=1, cwd=str(tmp_path), environment=env)
    assert failed.code == 2
    said = [done.out, done.err, failed.out, failed.err]
    kept = [file for root in (tmp_path / "secret", store) for file in root.rglob("*") if file.is_file()]
    assert any(file.name == "db" for file in kept)
    assert any(file.name == "config.yaml" for file in (store / "artifacts").rglob("*"))
    for word in (secret, key):
        for text in said:
            assert word not in text
        for file in kept:
            assert word.encode() not in file.read_bytes(), file
