"""A corpus of 100 million tokens without a download: what the installed Python packages consist of.

Four prepared folders: ``code`` is the source of packages, ``docs`` their docstrings, descriptions and other
texts; ``code_heldout`` and ``docs_heldout`` are that of packages which the first two do not have, to be
evaluated on. Equal texts are taken once, those that a held-out package has only there. The vocabulary is the
first ranks of DBRX's own.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from dbrx_train.data.prepare.pipeline import prepare
from dbrx_train.data.prepare.quickstart import docstrings, is_prose, read_text
from dbrx_train.data.tokenizer import TiktokenTokenizer, load_tokenizer

HELD_OUT = 0.08
"""Share of the packages' names, by hash, that is held out: adding a package moves no other."""
ROOTS = tuple(Path(sysconfig.get_path(name)) for name in ("purelib", "stdlib"))
MIN_CHARACTERS = 200
PER_PACKAGE = 40_000_000
"""Characters, of a held-out one a twentieth: generated clients would be most of the corpus otherwise."""
TEXTS = (".md", ".rst", ".txt")
DOCSTRINGS = 0.25
"""Share of the modules of which docstrings are taken instead of source."""

Document = dict[str, str]


def is_held_out(package: str) -> bool:
    """Whether a package, its name taken without case and with _ for -, is one of those held out."""
    return _draw(package.lower().replace("-", "_")) < HELD_OUT


def _draw(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


def packages(root: Path) -> Iterator[tuple[str, Path]]:
    """(package, file or folder) of all that lies in a site-packages folder, in the order of names."""
    for path in sorted(root.iterdir()):
        info = re.match(r"(.+?)-[^-]+\.dist-info$", path.name)
        if path.name != "site-packages" and (info or path.suffix in ("", ".py")):
            yield (info[1] if info else path.stem), path


def documents(root: Path) -> Iterator[tuple[str, Document]]:
    """(source, document) of the packages below ``root``.

    A quarter of the modules give their docstrings to ``docs``, and the others their source to ``code``, so
    that neither source contains the other's texts.
    """
    for package, path in packages(root):
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            name = file.relative_to(root).as_posix()
            if file.suffix == ".py" and (text := read_text(file)):
                takes_docs = _draw(name) < DOCSTRINGS
                yield (
                    "docs" if takes_docs else "code",
                    {"package": package, "origin": name, "text": docstrings(text) if takes_docs else text},
                )
            elif (file.suffix in TEXTS or file.name == "METADATA") and is_prose(text := read_text(file)):
                yield "docs", {"package": package, "origin": name, "text": text}


def chosen(roots: Sequence[Path], per_package: int = PER_PACKAGE) -> dict[str, list[Document]]:
    """Folder -> its documents: held out or not, long enough, no text twice, no package beyond its share."""
    found = [(source, document) for root in roots for source, document in documents(root)]
    found.sort(key=lambda one: _draw(one[1]["origin"]))  # of a large package a fair sample, not its beginning
    found.sort(key=lambda one: not is_held_out(one[1]["package"]))  # a text in both is held out
    result: dict[str, list[Document]] = {}
    seen: set[bytes] = set()
    size: Counter[tuple[str, str]] = Counter()
    for source, document in found:
        text, package = document["text"], document["package"]
        key = hashlib.sha256(" ".join(text.split()).encode()).digest()
        most = per_package // 20 if is_held_out(package) else per_package
        if len(text) < MIN_CHARACTERS or key in seen or size[source, package] + len(text) > most:
            continue
        seen.add(key)
        size[source, package] += len(text)
        result.setdefault(source + "_heldout" * is_held_out(package), []).append(document)
    return result


def cut_vocabulary(ranks: int, file: Path) -> None:
    """The first ``ranks`` of cl100k_base in tiktoken's format; special tokens follow them."""
    vocabulary = load_tokenizer()
    assert isinstance(vocabulary, TiktokenTokenizer)
    first = sorted((rank, token) for token, rank in vocabulary.ranks.items() if rank < ranks)
    file.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in first))


def make(out: Path, ranks: int, seq_len: int, roots: Sequence[Path] = ROOTS) -> None:
    """The vocabulary and the four prepared folders; what is there is taken as it is."""
    out.mkdir(parents=True, exist_ok=True)
    vocabulary, text = out / "vocabulary.tiktoken", out / "text"
    if not vocabulary.is_file():
        cut_vocabulary(ranks, vocabulary)
    if not text.is_dir():
        partial = out / f"text.{os.getpid()}.tmp"
        partial.mkdir()
        for name, rows in chosen(roots).items():
            (partial / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        partial.rename(text)
    for file in sorted(text.glob("*.jsonl")):
        # A source of its own with no weight in any mix: train, which it must have, holds almost nothing.
        share = 0.98 if file.stem.endswith("_heldout") else 0.0
        folder = str(out / file.stem)
        print(prepare([str(file)], folder, seq_len=seq_len, val_fraction=share, vocab_file=str(vocabulary)))
