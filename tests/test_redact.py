"""Secrets are masked wherever a run shows or keeps something."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from paths import RUNS

from dbrx_train.config import for_record, load, to_dict
from dbrx_train.redact import mask, mask_argument, mask_logs, mask_tree


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("at https://user:hunter2@host:5000/x failed", "at https://***@host:5000/x failed"),
        ("https://ghp_abcdef@github.com/a/b", "https://***@github.com/a/b"),
        ("postgresql+psycopg2://me:p@ss@db/mlflow", "postgresql+psycopg2://***@db/mlflow"),
        ("postgresql://me:p/a/s@db/mlflow", "postgresql://***@db/mlflow"),
        ("'mysql://me:pw@a/b', 'mysql://me:pw@c/d'", "'mysql://***@a/b', 'mysql://***@c/d'"),
        ("s3://bucket/run?token=abc&part=2", "s3://bucket/run?token=***&part=2"),
        ("https://b/x?X-Amz-Signature=0a1b&X-Amz-Date=2", "https://b/x?X-Amz-Signature=***&X-Amz-Date=2"),
        ("AccountName=a;AccountKey=b==;", "AccountName=a;AccountKey=***;"),
        ("variables.api_key=abc seed=3", "variables.api_key=*** seed=3"),
        ("http://host:5000/path@v2 and s3://bucket/run@3", None),
        ("tokens=5, tokenizer.name=cl100k_base, data.sources.token.local=x", None),
        ("sqlite:///runs/mlruns.db", None),
    ],
)
def test_text(text: str, masked: str | None) -> None:
    assert mask(text) == (text if masked is None else masked)


def test_what_the_environment_keeps_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "wJalrXUtn/FEMI")
    monkeypatch.setenv("SOME_TOKEN", "no")
    monkeypatch.setenv("SECRET_FILE", "/run/secrets/x")
    assert mask("no wJalrXUtn/FEMI in /run/secrets/x") == "no *** in /run/secrets/x"


def test_arguments_and_trees() -> None:
    assert mask_argument("variables.password=two words") == "variables.password=***"
    assert mask_argument("optimization.optimizer.lr=1e-3") == "optimization.optimizer.lr=1e-3"
    tree = {
        "password": "x",
        "tokens": 3,
        "remotes": [{"uri": "s3://a:b@c/d"}],
        "secret": None,
        "pad_token": 5,
    }
    assert mask_tree(tree) == tree | {"password": "***", "remotes": [{"uri": "s3://***@c/d"}]}


def test_records_of_any_logger(capsys: pytest.CaptureFixture[str]) -> None:
    before = logging.getLogRecordFactory()
    handler = logging.StreamHandler()
    logger = logging.getLogger("someone.elses")
    logger.addHandler(handler)
    try:
        logging.setLogRecordFactory(logging.LogRecord)  # the command line's own has no tracebacks
        mask_logs()
        try:
            raise OSError("no https://me:pw@host")
        except OSError:
            logger.exception("tried %s", "https://me:pw@host")
    finally:
        logging.setLogRecordFactory(before)
        logger.removeHandler(handler)
    errors = capsys.readouterr().err
    assert errors.count("https://***@host") == 3, errors  # the message, the source line, the error
    assert "me:pw@" not in errors


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_configuration_without_secrets_is_kept_as_it_is(path: Path) -> None:
    config = load(path)
    assert for_record(config) == to_dict(config)
