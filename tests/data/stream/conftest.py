"""The sources that tests of the dataset read."""

from __future__ import annotations

from pathlib import Path

import pytest
from numbered_data import write_source


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three sources of ``numbered_data``."""
    root = tmp_path_factory.mktemp("corpora")
    for name, size in (("a", 97), ("b", 60), ("c", 41)):
        write_source(root / name / "train", range(size))
        write_source(root / name / "val", range(7))
    return root
