"""Text repaired: mojibake, line ends, Unicode's forms, control characters."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from dbrx_train.data.curate.batch import Batch
from dbrx_train.data.curate.step import Step
from dbrx_train.options import option

__all__ = ["Normalize"]

_CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\ufeff]")
_LINE_END = re.compile("\r\n?|\u2028|\u2029|\x85|\x0c")
_TRAILING = re.compile(r"[ \t]+$", re.MULTILINE)


@dataclass
class Normalize(Step):
    """Repair texts; removes none."""

    name = "normalize"
    unicode: str = option("Unicode's normal form, or none.", "NFC", one_of=("NFC", "NFKC", "none"))
    mojibake: bool = option("Undo text that was decoded by the wrong encoding, by ftfy.", True)
    trailing_blanks: bool = option("Drop blanks at the ends of lines.", False)

    @property
    def totals(self) -> tuple[str, ...]:
        return ("normalize.changed",)

    def build(self, work: Path) -> None:
        if self.mojibake:
            _repairer()

    def annotate(self, batch: Batch, work: Path) -> Batch:
        repair = _repairer() if self.mojibake else str
        texts = [self._normalized(text, repair) for text in batch.texts]
        changed = [int(new != old) for new, old in zip(texts, batch.texts, strict=True)]
        return batch.with_texts(texts).with_columns({"normalize.changed": changed})

    def _normalized(self, text: str, repair: Callable[[str], str]) -> str:
        if not text.isascii():
            text = repair(text)
            if self.unicode != "none":
                text = unicodedata.normalize(self.unicode, text)  # type: ignore[arg-type]
        text = _CONTROL.sub("", _LINE_END.sub("\n", text))
        return _TRAILING.sub("", text) if self.trailing_blanks else text


@lru_cache(maxsize=1)
def _repairer() -> Callable[[str], str]:
    """ftfy's repair of encodings alone: what it does to quotes, ligatures and HTML would change code."""
    import ftfy

    config = ftfy.TextFixerConfig(
        unescape_html=False,
        remove_terminal_escapes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        uncurl_quotes=False,
        fix_line_breaks=False,
        remove_control_chars=False,
        normalization=None,
        explain=False,
    )
    return partial(ftfy.fix_text, config=config)
