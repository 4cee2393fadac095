"""The command line: one command per verb, each a thin call into one room.

Exit codes: 0 done; 2 the user's input is wrong (one line); 75 stopped as asked, with all that was done saved;
74 no progress for too long; 130 and 143 interrupted; 1 anything else. ``exits.py`` sees to them.
"""

from __future__ import annotations

from typing import Annotated

import typer

from dbrx_train import __version__, exits
from dbrx_train.cli.checkpoint import checkpoint_app
from dbrx_train.cli.data import data_app
from dbrx_train.cli.options import Command
from dbrx_train.cli.runs import runs_app

__all__ = ["app", "main"]

app = typer.Typer(
    name="dbrx-train",
    help="Train fine-grained mixture-of-experts language models the way DBRX was trained.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(runs_app)
app.add_typer(data_app, name="data")
app.add_typer(checkpoint_app, name="checkpoint")
for _each in (runs_app, data_app, checkpoint_app):
    for _command in _each.registered_commands:
        _command.cls = Command


def main() -> None:
    """Run the command that the arguments say, and exit."""
    exits.run(lambda: app(prog_name="dbrx-train", standalone_mode=False))


def _show_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass
