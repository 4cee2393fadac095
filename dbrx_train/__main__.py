"""``python -m dbrx_train``: the command line, for launchers that want a module."""

from dbrx_train.cli import main

main()
