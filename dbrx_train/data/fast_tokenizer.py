"""A tokenizer that its user trained: the ``tokenizer.json`` of the tokenizers library."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from dbrx_train.data.tokenizer import EOS, IM_END, IM_START, PAD, Tokenizer

__all__ = ["FastTokenizer"]


class FastTokenizer(Tokenizer):
    """What ``content``, of ``vocab_file``, describes.

    Documents end with the ``eos_token`` of a ``tokenizer_config.json`` beside the file, and padding is its
    ``pad_token``; else with ``<|endoftext|>`` and ``<|pad|>``. Of these and ChatML's tokens, those that the
    vocabulary lacks follow it.

    Raises:
        ValueError: ``content`` is no such file.
    """

    def __init__(self, name: str, content: bytes, vocab_file: str) -> None:
        try:
            self._fast = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises no narrower one
            raise ValueError(f"{vocab_file}: no tokenizer.json of the tokenizers library ({error})") from None
        self._fast.no_truncation()
        self._fast.no_padding()
        self._fast.encode_special_tokens = True
        eos, pad = _special_names(Path(vocab_file).with_name("tokenizer_config.json"))
        texts = list(dict.fromkeys((eos, pad, IM_START, IM_END)))
        self._fast.add_special_tokens(
            [tokenizers.AddedToken(text, special=True, normalized=False) for text in texts]
        )
        ids = self._fast.get_vocab()
        special = {text: ids[text] for text in texts}
        super().__init__(name, vocab_file, special, max(ids.values()) + 1, eos, pad)
        self._known = frozenset(ids.values())
        self._fingerprint = hashlib.sha256(content + json.dumps(special).encode()).hexdigest()

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @property
    def json(self) -> str:
        """The content of a ``tokenizer.json``, added special tokens included."""
        return str(self._fast.to_str())

    def encode(self, text: str) -> list[int]:
        return list(self._fast.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def _decode(self, ids: list[int]) -> str:
        parts = []
        for known, run in itertools.groupby(ids, self._known.__contains__):
            if known:
                parts.append(self._fast.decode(list(run), skip_special_tokens=False))
            else:
                parts += [f"<|unused_{id_}|>" for id_ in run]
        return "".join(parts)


def _special_names(path: Path) -> tuple[str, str]:
    """What ends a document, and what fills a sample."""
    if not path.exists():
        return EOS, PAD
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    eos, pad = (
        token.get("content") if isinstance(token, dict) else token
        for token in (written.get("eos_token"), written.get("pad_token"))
    )
    return eos or EOS, pad or PAD
