"""Rules for source code: generated and minified files, as in The Stack and StarCoder, and licences."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dbrx_train.data.curate.batch import Batch
from dbrx_train.data.curate.step import Rule, Step, between
from dbrx_train.options import option

__all__ = ["CodeQuality", "License"]

_GENERATED = re.compile(
    r"@generated\b|\bauto-?generated\b|\bautomatically generated\b"
    r"|\bgenerated (?:by|from|with|automatically)\b|\bdo not (?:edit|modify)\b",
    re.IGNORECASE,
)
_HEAD_LINES = 5
_DATA = re.compile(r"[0-9A-Fa-f]{1024,}|[A-Za-z0-9+/]{1024,}={0,2}|(?:0x[0-9A-Fa-f]{2},\s?){256,}")


@dataclass
class CodeQuality(Step):
    """Remove files that nobody wrote by hand (arXiv 2305.06161, section 3.1, and arXiv 2211.15533)."""

    name = "code_quality"
    generated: bool = option("Remove files whose first five lines say that they are generated.", True)
    max_line_length: int = option("Characters of the longest line, at most.", 1000, gt=0)
    max_mean_line_length: float = option("Characters of a line on average, at most.", 100, gt=0)
    min_alphanumeric: float = option("Share of letters and digits, at least.", 0.25, ge=0, le=1)
    embedded_data: bool = option("Remove files with a kilobyte or more of hexadecimal or base64.", True)

    def annotate(self, batch: Batch, work: Path) -> Batch:
        longest, mean, alphanumeric, generated, data = [], [], [], [], []
        for text in batch.texts:
            lengths = [len(line) for line in text.split("\n")]
            longest.append(max(lengths))
            mean.append(len(text) / len(lengths))
            alphanumeric.append(_alphanumeric(text) / max(1, len(text)))
            head = "\n".join(text.lstrip().split("\n", _HEAD_LINES)[:_HEAD_LINES])
            generated.append(_GENERATED.search(head) is not None)
            data.append(max(lengths) >= 1024 and _DATA.search(text) is not None)
        own = "code_quality"
        return batch.with_columns(
            {
                f"{own}.longest_line": longest,
                f"{own}.mean_line_length": np.array(mean, np.float32),
                f"{own}.alphanumeric": np.array(alphanumeric, np.float32),
                f"{own}.generated": generated,
                f"{own}.embedded_data": data,
            }
        )

    def rules(self) -> list[Rule]:
        own = "code_quality"
        flags = [name for name in ("generated", "embedded_data") if getattr(self, name)]
        return [
            *(Rule(f"{own}.{name}", f"{own}.{name}", lambda found: found.astype(np.bool_)) for name in flags),
            between(f"{own}.longest_line", high=self.max_line_length),
            between(f"{own}.mean_line_length", high=self.max_mean_line_length),
            between(f"{own}.alphanumeric", low=self.min_alphanumeric),
        ]


_NOT_ALPHANUMERIC = bytes(i for i in range(256) if i < 128 and not chr(i).isalnum())


def _alphanumeric(text: str) -> int:
    """Letters and digits; all that is not ASCII counts as such."""
    if text.isascii():
        return len(text.encode().translate(None, _NOT_ALPHANUMERIC))
    return sum(map(str.isalnum, text))


_SPDX = re.compile(r"SPDX-License-Identifier:\s*\(?([A-Za-z0-9.+-]+(?: (?:OR|AND|WITH) [A-Za-z0-9.+-]+)*)")
# What headers say where they have no SPDX tag; the first that fits
_PHRASES = tuple(
    (re.compile(phrase.replace(" ", r"[\s#*/;-]+"), re.IGNORECASE), name)
    for phrase, name in (
        (r"GNU Affero General Public License", "AGPL-3.0"),
        (r"GNU (?:Lesser|Library) General Public License", "LGPL"),
        (r"GNU General Public License|under the (?:terms of the )?GPL\b", "GPL"),
        (r"Mozilla Public License", "MPL-2.0"),
        (r"Apache License,? Version 2|Apache Software License", "Apache-2.0"),
        (r"Permission is hereby granted, free of charge|under the MIT license|MIT License", "MIT"),
        (r"Redistribution and use in source and binary forms|BSD(?: |-)(?:[23]-clause )?license", "BSD"),
        (r"Python Software Foundation License|PSF license", "PSF-2.0"),
        (r"public domain|Creative Commons Zero|CC0", "CC0-1.0"),
        (r"All rights reserved|proprietary and confidential", "proprietary"),
    )
)


@dataclass
class License(Step):
    """Keep documents under some licences, as the head of each file or its metadata names them."""

    name = "license"
    allow: list[str] = option(
        "The licences to keep, by the beginning of their SPDX identifiers.",
        lambda: [
            "0BSD",
            "Apache",
            "BSD",
            "BSL-1.0",
            "CC0",
            "ISC",
            "MIT",
            "PSF",
            "Python",
            "Unlicense",
            "Zlib",
        ],
    )
    unknown: bool = option("Keep documents that name no licence.", True)
    field: str | None = option("A field that the source keeps and that names the licence instead.", None)
    characters: int = option("How much of a document's beginning is read.", 4000, gt=0)

    def fields(self) -> list[str]:
        return [] if self.field is None else [self.field]

    def annotate(self, batch: Batch, work: Path) -> Batch:
        if self.field is None:
            found = [_license(text[: self.characters]) for text in batch.texts]
        else:
            found = _metadata(batch, self.field)
        return batch.with_columns({"license.name": found})

    def rules(self) -> list[Rule]:
        return [
            Rule(
                "license.not_allowed",
                "license.name",
                lambda names: np.array([not self._allows(name) for name in names], np.bool_),
                by="license.name",
            )
        ]

    def _allows(self, name: str) -> bool:
        """Whether one of several to choose from is allowed, and all of those that hold together."""
        if not name:
            return self.unknown
        allowed = tuple(each.lower() for each in self.allow)
        return any(
            all(part.split(" WITH ")[0].strip().lower().startswith(allowed) for part in choice.split(" AND "))
            for choice in name.split(" OR ")
        )


def _license(head: str) -> str:
    """An SPDX identifier, or expression; empty if none is named."""
    if (tag := _SPDX.search(head)) is not None:
        return tag[1]
    return next((name for pattern, name in _PHRASES if pattern.search(head)), "")


def _metadata(batch: Batch, field: str) -> list[str]:
    values = batch.column(f"metadata.{field}").to_pylist()
    return [value or "" for value in values]
