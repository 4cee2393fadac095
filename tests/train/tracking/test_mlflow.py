"""A tracking store that cannot be used is one line, soon."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from tiny_run import run_yaml

from dbrx_train.config import ConfigError, load
from dbrx_train.train.run import _open_store


def test_a_database_that_cannot_be_opened_is_refused_within_seconds(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Here a folder stands in its place: permissions do not keep root out."""
    uri = f"sqlite:///{tmp_path}"
    config = load(run_yaml(tmp_path, tmp_path, "run"), [f"logging.mlflow_uri={uri}"])
    begin = time.monotonic()
    with pytest.raises(ConfigError, match=rf"^logging.mlflow_uri: {uri} cannot be used \(.*\)$"):
        _open_store(config, resume=False)
    assert time.monotonic() - begin < 40
    assert capfd.readouterr().err == ""
