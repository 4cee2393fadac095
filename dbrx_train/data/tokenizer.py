"""The tokenizer: DBRX's, which is tiktoken's ``cl100k_base`` with the special ids of the release, or another.

Every other part asks a :class:`Tokenizer` for its special ids: they follow the vocabulary.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
from numpy.typing import NDArray

from dbrx_train.data.cl100k import cl100k_file
from dbrx_train.errors import seen_from

__all__ = ["CL100K", "CL100K_FINGERPRINT", "TiktokenTokenizer", "Tokenizer", "load_tokenizer"]

CL100K = "cl100k_base"
CL100K_FINGERPRINT = "f5f49b57ebbebe75ac7f600c70ecda611d92c13b5920f55c48afdc5d5c3266d9"
"""That of ``cl100k_base``, known without loading it."""

EOS, PAD, IM_START, IM_END = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"

# tiktoken_ext/openai_public.py. That package gives the pattern only together with a download.
_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
# The released tokenizer_config.json of databricks/dbrx-base.
_DBRX_SPECIAL = {
    EOS: 100257,
    "<|fim_prefix|>": 100258,
    "<|fim_middle|>": 100259,
    "<|fim_suffix|>": 100260,
    "<|endofprompt|>": 100276,
    PAD: 100277,
    IM_START: 100278,
    IM_END: 100279,
}
_CL100K_RANKS = 100_256
_ROWS = 128
"""Of DBRX's embedding, a multiple of which are its 100,352 rows."""


class Tokenizer(ABC):
    """Text to ids and back; made by :func:`load_tokenizer`.

    Text never becomes a special id: ``encode("<|endoftext|>")`` gives ids of those 13 characters.
    Pickles as its origin, so that sending one to a worker process costs a few bytes.

    Args:
        special: ids of the special tokens, ChatML's among them.
        eos, pad: which of them ends a document, and which fills a sample.
        n_vocab: the highest id in use, and one.
    """

    def __init__(
        self,
        name: str,
        vocab_file: str | None,
        special: Mapping[str, int],
        n_vocab: int,
        eos: str = EOS,
        pad: str = PAD,
    ) -> None:
        self.name, self.vocab_file = name, vocab_file
        self.special = special
        """Special tokens' ids."""
        self.n_vocab = n_vocab
        """Ids in use, special ones included."""
        self.vocab_size = -(-n_vocab // _ROWS) * _ROWS
        """Rows of an embedding that has one for each id: ``n_vocab`` rounded up to a multiple of 128."""
        self.eos_id, self.pad_id = special[eos], special[pad]
        self.im_start_id, self.im_end_id = special[IM_START], special[IM_END]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return load_tokenizer, (self.name, self.vocab_file)

    @property
    def stop_ids(self) -> tuple[int, int]:
        """Those after which generation ends: of a document, and of a turn."""
        return self.eos_id, self.im_end_id

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """sha256 (hex) over everything that decides an id."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of ``text``; no begin or end token is added."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[list[int]]:
        """Ids of each text."""

    def encode_array(self, text: str) -> NDArray[np.uint32]:
        """The same ids as ``encode`` as an array of shape [tokens]."""
        return np.array(self.encode(text), dtype=np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``: special ids as their names, ids without a token as ``<|unused_N|>``.

        Bytes that are no UTF-8, as a cut in the middle of a character leaves them, become U+FFFD.
        Raises ValueError for an id outside [0, vocab_size).
        """
        found = [int(token) for token in ids]
        for token in found:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"ids: {token} is no id of {self.name}; ids lie in [0, {self.vocab_size})")
        return self._decode(found)

    @abstractmethod
    def _decode(self, ids: list[int]) -> str: ...

    def chat(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = False) -> list[int]:
        """Ids of a conversation in ChatML, as the chat template of databricks/dbrx-instruct lays it out.

        Only the given turns: that template's default system prompt is not added where there is none.

        Args:
            messages: turns, each with ``role`` and ``content``; joined by a newline.
            add_generation_prompt: end with an opened assistant turn, for the model to fill.
        """
        ids: list[int] = []
        for index, message in enumerate(messages):
            for key in ("role", "content"):
                if not isinstance(message.get(key), str):
                    raise ValueError(f"messages[{index}].{key}: missing, or no text")
            ids += self.encode("\n") if ids else []
            ids += [
                self.im_start_id,
                *self.encode(f"{message['role']}\n{message['content']}"),
                self.im_end_id,
            ]
        if add_generation_prompt:
            ids += [*self.encode("\n"), self.im_start_id, *self.encode("assistant\n")]
        return ids


class TiktokenTokenizer(Tokenizer):
    """Byte-pair encoding by tiktoken, with the splitting pattern of ``cl100k_base``.

    ``ranks``: token -> id.
    """

    def __init__(
        self, name: str, ranks: Mapping[bytes, int], special: Mapping[str, int], vocab_file: str | None = None
    ) -> None:
        self.ranks = dict(ranks)
        super().__init__(name, vocab_file, special, max(special.values()) + 1)
        self._encoding = tiktoken.Encoding(
            name, pat_str=_PATTERN, mergeable_ranks=self.ranks, special_tokens=dict(special)
        )
        self._known = frozenset(self.ranks.values()) | frozenset(special.values())

    @cached_property
    def fingerprint(self) -> str:
        return _fingerprint(self.ranks, self.special)

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def encode_array(self, text: str) -> NDArray[np.uint32]:
        # Several times cheaper for long texts.
        ids: NDArray[np.uint32] = self._encoding.encode_to_numpy(text, disallowed_special=())
        return ids

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[list[int]]:
        return self._encoding.encode_ordinary_batch(list(texts), num_threads=num_threads)

    def _decode(self, ids: list[int]) -> str:
        token, known = self._encoding.decode_single_token_bytes, self._known
        parts = (token(id_) if id_ in known else b"<|unused_%d|>" % id_ for id_ in ids)
        return b"".join(parts).decode("utf-8", errors="replace")


def _special_after(ranks: Mapping[bytes, int]) -> Mapping[str, int]:
    """Special ids of a vocabulary in a file: of ``cl100k_base`` those of the release, else they follow it."""
    if len(ranks) == _CL100K_RANKS and _fingerprint(ranks, _DBRX_SPECIAL) == CL100K_FINGERPRINT:
        return _DBRX_SPECIAL
    first = max(ranks.values()) + 1
    return {text: first + i for i, text in enumerate((EOS, PAD, IM_START, IM_END))}


def _fingerprint(ranks: Mapping[bytes, int], special: Mapping[str, int]) -> str:
    digest = hashlib.sha256(_PATTERN.encode())
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        digest.update(b"%d %d " % (rank, len(token)) + token)
    for text, rank in special.items():
        digest.update(b"%d %s" % (rank, text.encode()))
    return digest.hexdigest()


def load_tokenizer(name: str = CL100K, vocab_file: str | None = None) -> Tokenizer:
    """The tokenizer, loaded once per process.

    Args:
        name: ``cl100k_base``, or what to call the vocabulary in ``vocab_file``, which by default is named
            after its file.
        vocab_file: ranks in tiktoken's format (a base64 token and its rank on each line), or a
            ``tokenizer.json`` of the tokenizers library, to use instead.

    Raises:
        ValueError: the name is unknown, the file is unreadable or no vocabulary, or ``cl100k_base`` is
            neither on this machine nor to be downloaded.
    """
    return _load(name, os.path.abspath(vocab_file) if vocab_file else None)


@lru_cache(maxsize=4)
def _load(name: str, vocab_file: str | None) -> Tokenizer:
    if vocab_file is None:
        if name != CL100K:
            raise ValueError(f"tokenizer: {name!r} is unknown; use {CL100K!r} or give a vocabulary file")
        return TiktokenTokenizer(name, _parse_ranks(cl100k_file(), name), _DBRX_SPECIAL)
    own = Path(vocab_file).stem if name == CL100K else name
    try:
        content = Path(vocab_file).read_bytes()
    except OSError as error:
        missing = seen_from(vocab_file) if isinstance(error, FileNotFoundError) else ""
        raise ValueError(f"{vocab_file}: cannot be read ({error.strerror}{missing})") from error
    if vocab_file.endswith(".json"):
        from dbrx_train.data.fast_tokenizer import FastTokenizer

        return FastTokenizer(own, content, vocab_file)
    ranks = _parse_ranks(content, vocab_file)
    special = _special_after(ranks)
    return TiktokenTokenizer(name if special is _DBRX_SPECIAL else own, ranks, special, vocab_file)


def _parse_ranks(data: bytes, origin: str) -> dict[bytes, int]:
    """Token bytes -> rank, of tiktoken's format."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"{origin}:{number}: expected a base64 token and its rank") from error
    if len(set(ranks.values())) != len(ranks):
        raise ValueError(f"{origin}: two tokens share a rank; every rank must be its own")
    if not all(bytes([byte]) in ranks for byte in range(256)):
        raise ValueError(f"{origin}: lacks some of the 256 single bytes, so that not every text has ids")
    if not 0 <= min(ranks.values()) <= max(ranks.values()) < 2**24:
        raise ValueError(f"{origin}: ranks must lie in [0, {2**24})")
    return ranks
