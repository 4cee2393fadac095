"""Files of a run that grow by a line of JSON now and then."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

EVENTS = "events.jsonl"
"""In a run's folder: {"time": unix seconds, "step", "tokens", "kind", ...}."""
TIMES = "time.jsonl"
"""In a run's folder: {"time": unix seconds, "step", "elapsed", "useful"}, the last two in seconds since the
run was first started."""


def append(path: Path, entry: dict[str, Any]) -> None:
    """Add a line, a whole one even if a crash tore the one before."""
    with path.open("a+b") as file:
        if end := file.seek(0, os.SEEK_END):
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(entry).encode() + b"\n")


class Tail:
    """Reads what has been added to such a file since the last time."""

    def __init__(self, path: Path) -> None:
        self.path, self.position = path, 0

    def read(self) -> list[dict[str, Any]]:
        """The new lines that are whole; none if there is no file, and without what a crash tore."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.position)
                text = file.read()
        except FileNotFoundError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self.position += len(whole)
        found = []
        for line in whole.splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict):
                found.append(entry)
        return found
