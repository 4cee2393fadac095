"""A wrong configuration is refused in one line that names the key; a right one means what it says."""

import warnings
from pathlib import Path

import pytest
from tiny_run import run_yaml

from dbrx_train.config import ConfigError, load, to_yaml
from dbrx_train.data.manifest import read_manifest
from dbrx_train.options import Bounds, check

MINIMAL = """
run_name: tiny
max_duration: 100ba
model: {d_model: 64, n_heads: 4, n_kv_heads: 2, n_layers: 2, ffn_hidden_size: 112, max_seq_len: 128}
data:
  seq_len: 64
  sources: {web: {local: data/web}, code: {local: data/code}}
  mix:
    - {at: 0tok, weights: {web: 0.8, code: 0.2}}
    - {at: 0.7dur, weights: {web: 0.4, code: 0.6}}
optimization: {global_batch_size: 8}
"""


@pytest.fixture
def yaml_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def test_overrides_come_last_and_the_result_reads_back(yaml_file: Path, tmp_path: Path) -> None:
    config = load(yaml_file, ["optimization.optimizer.lr=1e-3", "max_duration=50ba"])
    assert config.optimization.optimizer.lr == 1e-3
    assert config.clock.total_tokens == 50 * 8 * 64
    assert config.folder == "runs/tiny"
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(config))
    assert load(again) == config


def test_variables_interpolate_and_are_no_part_of_the_run(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "variables: {width: 96}\n" + MINIMAL.replace("d_model: 64", "d_model: '${variables.width}'")
    )
    assert load(path).model.d_model == 96


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("run_name=..", "run_name: '..' names a folder, too, which must lie inside of `runs`: no part of"),
        ("run_name=../x", "run_name: '../x' names a folder"),
        ("run_name=a/../../b", "run_name: 'a/../../b' names a folder"),
        ("run_name=.", "run_name: '.' names a folder"),
        ("run_name=/a", "run_name: '/a' names a folder"),
        ("run_name=''", "run_name: '' names a folder"),
        ("run_name=" + "é" * 101, "it has at most 200 bytes"),
        ("hangs.step=1h", "unknown key hangs; it is called watchdog now"),
        ("preemption.grace=1h", "unknown key preemption.grace; it is called grace_period now"),
        ("bad_steps.deviations=9", "unknown key bad_steps.deviations; it is called mad_threshold now"),
        (
            "data.mix=[{at: 0tok, weights: {web: 1}, reach: step}]",
            "unknown key data.mix[0].reach; it is called interpolation now",
        ),
        ("model.d_modle=64", "unknown key model.d_modle; did you mean d_model?"),
        ("lr=1", "unknown key lr; did you mean optimization.optimizer.lr?"),
        ("optimization.optimiser.lr=1", "unknown key optimization.optimiser; did you mean optimizer?"),
        ("data.sources.web.locl=x", "unknown key data.sources.web.locl; did you mean local?"),
        ("model.d_model=-64", "model.d_model: "),
        ("model.d_model=0", "model.d_model: "),
        ("model.d_model=66", "model."),
        ("model.n_kv_heads=3", "model.n_kv_heads: "),
        ("model.top_k=17", "model.top_k: "),
        ("model.d_model=wide", "model.d_model"),
        ("data.seq_len=256", "data.seq_len: must be at least 2 and at most model.max_seq_len 128, not 256"),
        ("data.mix=[{at: 0tok, weights: {wbe: 1}}]", "'wbe' is not in data.sources; did you mean web?"),
        ("data.mix=[{at: 5ba, weights: {web: 1}}]", "data.mix"),
        ("data.mix=[{at: 0tok, weights: {web: -1}}]", "data.mix"),
        ("optimization.global_batch_size=0", "optimization.global_batch_size: must be positive"),
        (
            "optimization.optimizer.lr=300",
            "optimization.optimizer.lr: must be above 0 and at most 10, not",
        ),
        ("optimization.optimizer.lr=.inf", "optimization.optimizer.lr: must be above 0 and at most 10"),
        ("optimization.optimizer.eps=-1", "optimization.optimizer.eps: must be positive"),
        ("optimization.optimizer.router_lr_scale=-1", "router_lr_scale: must not be negative"),
        ("optimization.microbatch_size=0", "optimization.microbatch_size: must be positive"),
        (
            "optimization.microbatch_size=64",
            "optimization.microbatch_size: 64 samples are more than the 8 of global_batch_size",
        ),
        (
            "optimization.batch_size_warmup=[{until: 0.5dur, global_batch_size: 4}]",
            "optimization.batch_size_warmup[0].until: '0.5dur' is relative to the run's length; write it",
        ),
        (
            (
                "optimization.batch_size_warmup="
                "[{until: 4ba, global_batch_size: 2}, {until: 3ba, global_batch_size: 4}]"
            ),
            "optimization.batch_size_warmup[1].until: '3ba' leaves no step for this size",
        ),
        (
            "optimization.batch_size_warmup=[{until: 2ba, global_batch_size: 0}]",
            "optimization.batch_size_warmup[0].global_batch_size: must be positive",
        ),
        (
            "optimization.batch_size_warmup=[{until: 2ba, samples: 4}]",
            "unknown key optimization.batch_size_warmup[0].samples",
        ),
        (
            "data.mix=[{at: 0tok, weights: {web: 1}}, {at: 0.5dur, weights: {web: 1}, seq_len: 100}]",
            "data.mix[1].seq_len: a step of 8 samples of 64 tokens does not split into samples of 100",
        ),
        (
            "data.mix=[{at: 0tok, weights: {web: 1}}, {at: 0.5dur, weights: {web: 1}, seq_len: 256}]",
            "data.mix[1].seq_len: must be at least 2 and at most model.max_seq_len 128, not 256",
        ),
        (
            "data.mix=[{at: 0tok, weights: {web: 1}}, {at: 0.5dur, weights: {web: 1}, seq_len: 128}]",
            "data.mix: web has weight where samples have 64 tokens and where they have 128 (seq_len)",
        ),
        ("data.mix=[{at: 0tok, weights: {web: 1}, seq_len: 0}]", "data.mix[0].seq_len: must be at least 2"),
        (
            "data.mix=[{at: 0tok, weights: {web: 1}}, {at: 9ba, seq_len: 128}, {at: 5ba, seq_len: 64}]",
            "data.mix[2].at: comes no later than a point before it that sets seq_len",
        ),
        ("max_duration=1e30tok", "data.canonical_nodes: "),
        (
            "data.canonical_nodes=3",
            "data.canonical_nodes: 3 does not divide a step of 8 samples of 64 tokens",
        ),
        ("seed=-1", "seed: must be at least 0"),
        ("data.predownload=-1", "data.predownload: must not be negative"),
        ("data.sources.web.max_epochs=-1", "data.sources.web.max_epochs: must be positive"),
        ("data.sources={c++: {local: x}}", "'c++' names metrics too"),
        ("data.mix={at: 0tok}", "data.mix"),
        ("data.mix=soon", "data.mix"),
        ("checkpoints.interval=0ba", "checkpoints.interval: must be longer than nothing"),
        ("logging.peak_flops=-5", "logging.peak_flops: must be positive"),
        ("profile.steps=0", "profile.steps: must be at least 1"),
        ("profile.at=soon", "profile.at: 'soon' is not a time"),
        ("optimization.optimizer.name=sgd", "optimization.optimizer.name: 'sgd' is not one of adamw, lionw"),
        ("optimization.learning_rate.warmup=soon", "optimization.learning_rate.warmup: 'soon' is not a time"),
        ("max_duration=1ep", "max_duration: '1ep' is told by data.sources.web: data/web: no such folder"),
        ("max_duration=1epoch", "write it like 2B tok, 1_000_000tok or 1000ba"),
        (
            "max_duration=0.5dur",
            "'0.5dur' is relative to the run's length; write it like 2B tok",
        ),
        ("max_duration=0ba", "max_duration: '0ba' is no length"),
        (
            "evaluation.interval=1ep",
            "'1ep' is not a time, for sources of a mix have no epoch in common",
        ),
        (
            "data.sources=[web]",
            "data.sources: must be a mapping of names, each to a mapping with local",
        ),
        (
            "data.sources={web: data/web}",
            "not 'data/web'; write {local: data/web}",
        ),
        (
            "data.sources.web=null",
            "sources.web: must be a mapping with local, remote, max_epochs, not null",
        ),
        ("data.mix=[0tok]", "data.mix[0]: must be a mapping with at, weights, interpolation, not '0tok'"),
        ("data.mix=[{weights: {web: 1}}]", "data.mix[0].at: is missing; it says when: `0tok`"),
        (
            "data.mix=[{at: 0tok, weights: {web: much}}]",
            "mix[0].weights.web: must be a number, not 'much'",
        ),
        (
            "optimization.optimizer=adamw",
            "optimization.optimizer: must be a mapping with name, lr, betas",
        ),
        ("optimization.optimizer.betas=0.9", "betas: must be a list, each a number, not 0.9"),
        ("logging=null", "logging: must be a mapping with mlflow_uri, experiment, tensorboard, not null"),
        ("model.d_model=64.5", "model.d_model: must be a whole number, not 64.5"),
        ("model.clip_qkv=x", "model.clip_qkv: must be a number or null, not 'x'"),
        ("seed=true", "seed: must be a whole number, not True"),
        ("compile=maybe", "compile: must be true or false, not 'maybe'"),
        ("run_name=[a]", "run_name: must be text, not ['a']"),
        ("run_name=${nowhere}", "run_name: Interpolation key 'nowhere' not found"),
        ("model..d=3", "'model..d=3': an override has the form key=value"),
        ("device=tpu", "device: 'tpu' is not one of auto, cpu, gpu"),
        ("precision=fp8", "precision: 'fp8' is not one of fp32, amp_bf16"),
        ("notanoverride", "'notanoverride': an override has the form key=value"),
    ],
)
def test_wrong_values_are_named(yaml_file: Path, override: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(yaml_file, [override])
    message = str(caught.value)
    assert says in message
    assert "\n" not in message


def test_what_is_no_utf_8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(MINIMAL.encode("utf-16"))
    with pytest.raises(ConfigError, match=r"run.yaml: is no UTF-8 text \(byte 0\); save it as UTF-8"):
        load(path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty; a run is a mapping of keys, such as run_name and model"),
        ("3", "a run is a mapping of keys, such as run_name and model"),
        ("run_name: [", "not valid YAML"),
        ("just text", "a run is a mapping of keys, such as run_name and model"),
        ("- a\n- b", "a run is a mapping"),
        ("run_name: x\nmodel: ${nowhere}", "nowhere"),
        ("run_name: x\ndata: {sources: {a: {local: b}}}", "max_duration"),
        ("run_name: x\nmax_duration: 1ba\nmodel: {n_layers: 2}", "data.sources: name at least one source"),
        ("run_name: x\nmax_duration: 1ba\ndata: {sources: {a: {}}}", "data.sources.a.local"),
        ("\x00\x01", "not valid YAML"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named_with_the_folder_that_it_was_looked_for_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"^runs/x.yaml: no such file, seen from {tmp_path}$"):
        load("runs/x.yaml")


def test_a_size_that_the_run_never_reaches_is_warned_of(yaml_file: Path) -> None:
    late = "data.mix=[{at: 0tok, weights: {web: 1}}, {at: 900ba, weights: {code: 1}, seq_len: 128}]"
    with pytest.warns(UserWarning, match="before a step of 4 samples of 128 tokens is ever taken"):
        load(yaml_file, [late, "data.sources.code.local=x"])


def test_a_schedule_that_does_not_come_to_what_it_is_for_is_warned_of(yaml_file: Path) -> None:
    """Of 20 steps of 512 tokens."""
    steps = "max_duration=20ba"
    wsd = [steps, "optimization.learning_rate.schedule=wsd", "optimization.learning_rate.warmup=15ba"]
    says = "decay: its 4,096 tokens are more than the 2,560 that warmup leaves of the run's 10,240; the decay"
    with pytest.warns(UserWarning, match=says):
        load(yaml_file, [*wsd, "optimization.learning_rate.decay=8ba"])
    says = "warmup: its 20,480 tokens are more than the run's 10,240, so the learning rate ends at 0.5 of"
    with pytest.warns(UserWarning, match=says):
        load(yaml_file, [steps, "optimization.learning_rate.warmup=40ba"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(yaml_file, [*wsd, "optimization.learning_rate.decay=5ba", "checkpoints.interval=20ba"])


TOO_LONG = {
    "checkpoints.interval": "only its end is saved, and a crash before costs all of it",
    "checkpoints.keep_every": "no checkpoint is kept for good",
    "checkpoints.export.interval": "only its end is exported",
    "logging.interval": "what is logged that often never is",
    "evaluation.interval": "it is evaluated before its first step and at its end only",
}
MIX = "data.mix=[{at: 0tok, weights: {web: 1}}, {at: %s, weights: {code: 1}, interpolation: %s}]"
UNREACHED = {
    MIX
    % (
        "1dur",
        "step",
    ): "data.mix[1].at: is at 51,200 tokens, and the run ends at 51,200; it is never mixed so",
    MIX
    % ("2dur", "linear"): "data.mix[1].at: is at 102,400 tokens, and the run ends at 51,200; the ramp to its "
    "weights ends on the way",
    "profile.at=100ba": "profile.at: is at 51,200 tokens, and the run ends before; nothing is traced",
    "optimization.learning_rate.decay=5ba": "decay: is of wsd and inverse_sqrt; cosine does not heed it",
} | {
    f"{key}=101ba": f"{key}: its 51,712 tokens are more than the run's 51,200; {instead}"
    for key, instead in TOO_LONG.items()
}


@pytest.mark.parametrize("override", UNREACHED)
def test_what_a_run_never_reaches_is_a_line_that_says_what_happens_instead(
    yaml_file: Path, override: str
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load(yaml_file, ["checkpoints.interval=100ba", override])
    (line,) = (str(each.message) for each in caught)
    assert line.endswith(UNREACHED[override])


@pytest.mark.parametrize(
    "override",
    [
        MIX % ("1dur", "linear"),
        "evaluation={interval: 1M tok, max_samples: 0}",
        "profile.at=99ba",
        "checkpoints.keep_every=1dur",
    ],
)
def test_what_a_run_reaches_is_not_warned_of(yaml_file: Path, override: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(yaml_file, ["checkpoints.interval=100ba", override])


def test_an_inverse_square_root_needs_a_scale(yaml_file: Path) -> None:
    schedule = "optimization.learning_rate.schedule=inverse_sqrt"
    with pytest.raises(ConfigError, match="scale: is that of warmup, which is nothing; set either"):
        load(yaml_file, [schedule])
    with pytest.raises(ConfigError, match="scale: must be longer than nothing"):
        load(yaml_file, [schedule, "optimization.learning_rate.scale=0tok"])
    load(yaml_file, [schedule, "optimization.learning_rate.warmup=1ba"])


@pytest.mark.parametrize("name", ["lr:3e-4", "team/web-9b", "run#1 (2)", "v1~b"])
def test_other_names_are_the_users_own(yaml_file: Path, name: str) -> None:
    assert load(yaml_file, [f"run_name='{name}'"]).folder == f"runs/{name}"


def test_every_section_is_held_against_its_bounds(yaml_file: Path) -> None:
    """The walk finds what is declared anywhere, so that no section is forgotten."""
    config = load(yaml_file)
    check(config)
    for section, key in (("evaluation", "batch_size"), ("profile", "steps"), ("checkpoints", "keep")):
        before = getattr(getattr(config, section), key)
        setattr(getattr(config, section), key, 0)
        with pytest.raises(ValueError, match=rf"^{section}\.{key}: must be "):
            check(config)
        setattr(getattr(config, section), key, before)
    config.data.sources["web"].max_epochs = 0
    with pytest.raises(ValueError, match=r"^data\.sources\.web\.max_epochs: must be positive or null, not 0"):
        check(config)


def test_bounds_in_words() -> None:
    said = {
        Bounds(gt=0): "be positive",
        Bounds(ge=0): "not be negative",
        Bounds(ge=1): "be at least 1",
        Bounds(ge=0, le=1): "be at least 0 and at most 1",
        Bounds(ge=0, lt=2**32): "be at least 0 and below 4,294,967,296",
        Bounds(one_of=("a", "b")): "be one of a, b",
    }
    assert {bounds: str(bounds) for bounds in said} == said
    assert not Bounds(gt=0).allow(float("inf"))
    assert not Bounds(ge=0).allow(float("nan"))
    assert Bounds(ge=0, le=1).allow(1)


def test_epochs_of_a_single_source_are_its_samples_in_whole_steps(workplace: Path, tmp_path: Path) -> None:
    path, size = run_yaml(workplace, tmp_path, "epochs"), 4
    samples = read_manifest(workplace / "web").splits["train"].samples
    alone = ["data.mix=[{at: 0tok, weights: {web: 1}}]", "evaluation.max_samples=0"]
    assert load(path, [*alone, "max_duration=2ep"]).clock.total_batches == 2 * samples // size
    both = samples + read_manifest(workplace / "code").splits["train"].samples
    with pytest.raises(ConfigError, match=f"a mix of 2 has no epoch in common; {both - both % size}sp reads"):
        load(path, ["max_duration=1ep"])
