"""Where things are."""

from pathlib import Path

HELPERS = Path(__file__).parent
"""Of these tests; the programs among them are started by their path."""
ROOT = HELPERS.parents[1]
"""Of the repository."""
