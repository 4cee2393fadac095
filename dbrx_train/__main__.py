"""``dbrx-train`` and, for launchers that want a module, ``python -m dbrx_train``."""

from dbrx_train import exits


def main() -> None:
    """Entry point of a process of its own."""
    exits.begin()
    from dbrx_train import cli

    cli.main()


if __name__ == "__main__":
    main()
