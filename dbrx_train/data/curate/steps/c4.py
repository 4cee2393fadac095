"""C4's rules (Raffel et al. 2020, arXiv 1910.10683, section 2.2): lines are dropped, then pages."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dbrx_train.data.curate.batch import Batch
from dbrx_train.data.curate.step import Rule, Step, between
from dbrx_train.options import option

__all__ = ["C4"]

_SENTENCE_END = re.compile(r"[.!?](?:[\"'”\u2019)]*)(?:\s|$)")
_TERMINAL = (".", "!", "?", '"', "”")
_POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")


@dataclass
class C4(Step):
    """Drop lines that are no sentences; remove pages with few of these, of code, or of filler text."""

    name = "c4"
    terminal_punctuation: bool = option("Drop lines that do not end as a sentence does.", True)
    min_line_words: int = option("Words of a line, at least; it is dropped otherwise.", 3, ge=0)
    javascript: bool = option("Drop lines that mention JavaScript.", True)
    policy: bool = option("Drop lines about cookies and terms of use.", True)
    min_sentences: int = option("Sentences of a document, at least.", 5, ge=0)
    lorem_ipsum: bool = option("Remove documents with lorem ipsum.", True)
    curly_brackets: bool = option("Remove documents with a curly bracket, as of code.", True)

    @property
    def totals(self) -> tuple[str, ...]:
        return ("c4.dropped_lines",)

    def annotate(self, batch: Batch, work: Path) -> Batch:
        texts, dropped = list[str](), list[int]()
        for text in batch.texts:
            lines = text.split("\n")
            kept = [line for line in lines if not line.strip() or self._keeps(line.strip())]
            dropped.append(len(lines) - len(kept))
            texts.append("\n".join(kept).strip() if len(lines) > len(kept) else text)
        new = batch.with_texts(texts)
        return new.with_columns(
            {
                "c4.dropped_lines": dropped,
                "c4.sentences": [len(_SENTENCE_END.findall(text)) for text in new.texts],
                "c4.lorem_ipsum": ["lorem ipsum" in text.lower() for text in batch.texts],
                "c4.curly_brackets": ["{" in text for text in batch.texts],
            }
        )

    def _keeps(self, line: str) -> bool:
        if self.terminal_punctuation and (not line.endswith(_TERMINAL) or line.endswith("...")):
            return False
        if len(line.split(None, self.min_line_words)) < self.min_line_words:
            return False
        lower = line.lower()
        return not (
            (self.javascript and "javascript" in lower)
            or (self.policy and any(words in lower for words in _POLICY))
        )

    def rules(self) -> list[Rule]:
        rules = [between("c4.sentences", low=self.min_sentences)]
        for name in ("lorem_ipsum", "curly_brackets"):
            if getattr(self, name):
                rules.append(Rule(f"c4.{name}", f"c4.{name}", lambda found: found.astype(np.bool_)))
        return rules
