"""A small, real corpus from what any Python has, without a download: its source and its documentation.

``code`` is the standard library's source. ``prose`` is the language reference as ``pydoc`` carries it,
the standard library's docstrings, and the descriptions, licences and text files of installed packages.
"""

from __future__ import annotations

import ast
import json
import os
import sysconfig
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from dbrx_train.data.prepare.pipeline import Summary, prepare

__all__ = ["docstrings", "is_prose", "prepare_quickstart", "read_text"]

# No one writes these by hand (tables) or reads them (tests); pydoc_data is prose
_SKIPPED_FOLDERS = {
    "__pycache__", "dist-packages", "encodings", "idle_test", "pydoc_data", "site-packages", "test", "tests",
}  # fmt: skip
_TEXT_SUFFIXES = (".md", ".rst", ".txt")
_LICENCES = ("authors", "changelog", "copying", "license", "licence", "notice", "readme")
_MACHINE_MADE = {
    "cmakelists.txt", "entry_points.txt", "namespace_packages.txt", "not-zip-safe.txt", "requirements.txt",
    "requires.txt", "sources.txt", "top_level.txt",
}  # fmt: skip
_MAX_FILE_BYTES = 200_000
_MIN_CHARACTERS = 100


def prepare_quickstart(
    out: str,
    *,
    seq_len: int = 512,
    val_fraction: float = 0.03,
    processes: int | None = None,
    progress: bool = True,
) -> dict[str, Summary]:
    """Make ``out/code`` and ``out/prose``, each a prepared folder with ``train`` and ``val``.

    The text itself is kept as JSON lines in ``out/text``, to be looked at; text that is there already is
    taken as it is, so that installing a package between two calls changes nothing. Arguments and errors
    are those of :func:`.prepare.prepare`.

    Returns:
        The summary of each source, by name.
    """
    text = Path(out, "text")
    summaries = {}
    for name, corpus in (("code", _code), ("prose", _prose)):
        file = text / f"{name}.jsonl"
        try:
            if not file.is_file():
                _write_json_lines(file, corpus())
        except OSError as error:
            raise ValueError(f"{error.filename or out}: {error.strerror}") from error
        summaries[name] = prepare(
            [str(file)],
            str(Path(out, name)),
            seq_len=seq_len,
            val_fraction=val_fraction,
            processes=processes,
            progress=progress,
        )
    return summaries


def _write_json_lines(file: Path, documents: Iterator[tuple[str, str]]) -> None:
    """Write (origin, text) pairs, equal texts once, in one step."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    seen: set[str] = set()
    with open(partial, "w", encoding="utf-8") as lines:
        for origin, text in documents:
            if len(text) >= _MIN_CHARACTERS and text not in seen:
                seen.add(text)
                lines.write(json.dumps({"text": text, "origin": origin}) + "\n")
    os.replace(partial, file)


def _code() -> Iterator[tuple[str, str]]:
    """(path, source) of each module of the standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    if not any(root.glob("*.py")):
        raise ValueError(f"{root}: holds no source of the standard library; use a Python that has it")
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - _SKIPPED_FOLDERS)
        for name in sorted(names):
            path = Path(folder, name)
            if path.suffix == ".py" and (source := read_text(path)):
                yield path.relative_to(root).as_posix(), source


def _prose() -> Iterator[tuple[str, str]]:
    yield from _reference()
    for path, source in _code():
        yield f"docstrings of {path}", docstrings(source)
    distributions = {
        dist.metadata["Name"]: dist for dist in metadata.distributions() if dist.metadata["Name"]
    }
    for name in sorted(distributions, key=str.lower):
        yield from _package_texts(name, distributions[name])


def _reference() -> Iterator[tuple[str, str]]:
    """The language reference that ``help()`` shows, by topic; nothing where a distribution left it out."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for topic in sorted(topics):
        yield f"pydoc topic {topic}", topics[topic]


def docstrings(source: str) -> str:
    """All docstrings of a module, in order; without importing it. Of what is no Python, nothing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in old sources
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return ""
    found = []
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop(0)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.append(ast.get_docstring(node) or "")
            todo[:0] = node.body
    return "\n\n".join(filter(None, found))


def _package_texts(name: str, dist: metadata.Distribution) -> Iterator[tuple[str, str]]:
    """A package's description, then its licences and other text files, tables of numbers left out."""
    text = _description(dist)
    if is_prose(text):
        yield f"description of {name}", text
    for file in sorted(dist.files or [], key=str):
        if _is_text_file(file) and is_prose(text := read_text(Path(str(file.locate())))):
            yield f"{file} of {name}", text


def _description(dist: metadata.Distribution) -> str:
    fields = dist.metadata.json
    return str(fields.get("description", "")).strip()


def _is_text_file(file: metadata.PackagePath) -> bool:
    name = file.name.lower()
    if name in _MACHINE_MADE or _SKIPPED_FOLDERS.intersection(file.parts):
        return False
    return name.endswith(_TEXT_SUFFIXES) or (name.startswith(_LICENCES) and "." not in name)


def is_prose(text: str) -> bool:
    return sum(map(str.isalpha, text)) > 0.6 * len(text)


def read_text(path: Path) -> str:
    """The file's text, or nothing where it is missing, large or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8") if path.stat().st_size <= _MAX_FILE_BYTES else ""
    except (OSError, UnicodeDecodeError):
        return ""
