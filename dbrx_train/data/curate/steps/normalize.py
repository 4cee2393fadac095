"""Text repaired: mojibake, line ends, Unicode's forms, control characters."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from dbrx_train.data.curate.batch import Batch
from dbrx_train.data.curate.step import Step
from dbrx_train.options import option

__all__ = ["Normalize"]

_CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\ufeff]")
_LINE_END = re.compile("\r\n?|\u2028|\u2029|\x85|\x0c")
_ODD = bytes([*range(9), *range(11, 32), 127])
_ODD_UNICODE = ("\x85", "\ufeff", "\u2028", "\u2029")
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
            _repaired("")

    def annotate(self, batch: Batch, work: Path) -> Batch:
        texts = [self._normalized(text) for text in batch.texts]
        changed = [int(new != old) for new, old in zip(texts, batch.texts, strict=True)]
        return batch.with_texts(texts).with_columns({"normalize.changed": changed})

    def _normalized(self, text: str) -> str:
        if not text.isascii():
            if self.mojibake:
                text = _repaired(text)
            if self.unicode != "none":
                text = unicodedata.normalize(self.unicode, text)  # type: ignore[arg-type]
        if _is_odd(text):
            text = _CONTROL.sub("", _LINE_END.sub("\n", text))
        return _TRAILING.sub("", text) if self.trailing_blanks else text


def _is_odd(text: str) -> bool:
    """Whether anything is to be replaced: cheaper to find out than to try."""
    data = text.encode("utf-8", "surrogatepass")
    if len(data.translate(None, _ODD)) < len(data):
        return True
    return not text.isascii() and any(mark in text for mark in _ODD_UNICODE)


def _repaired(text: str) -> str:
    """The text with its encoding repaired by ftfy; what else that can do, as to quotes, would change code."""
    from ftfy import TextFixerConfig, fix_text
    from ftfy.badness import is_bad

    lines = text.split("\n")
    bad = [number for number, line in enumerate(lines) if not line.isascii() and is_bad(line)]
    if not bad:
        return text
    config = TextFixerConfig(
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
    for number in bad:
        lines[number] = fix_text(lines[number], config)
    return "\n".join(lines)
