"""A part of LLM Foundry for a contest, without the rest of it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

__all__ = ["foundry_module"]


def foundry_module(*path: str) -> Any:
    """The module in a file of llm-foundry: importing the package would import all of its dependencies.

    Raises:
        ModuleNotFoundError: llm-foundry, or what the file imports, is not installed.
    """
    package = importlib.util.find_spec("llmfoundry")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("llm-foundry")
    file = Path(package.submodule_search_locations[0], *path)
    found = importlib.util.spec_from_file_location(f"foundry_{file.stem}", file)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module
