"""Where things are."""

from pathlib import Path

HELPERS = Path(__file__).parent
"""Of these tests; the programs among them are started by their path."""
ROOT = HELPERS.parents[1]
"""Of the repository."""
RUNS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "curate")
"""Configurations of runs; the others are recipes for data."""
