"""The command line as a whole."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from dbrx_train.cli import app


@pytest.mark.parametrize("command", ["", "train", "data", "data prepare", "checkpoint export"])
def test_h_helps(command: str) -> None:
    short, long = (CliRunner().invoke(app, [*command.split(), option]) for option in ("-h", "--help"))
    assert short.exit_code == 0
    assert short.output == long.output
