"""What made a checkpoint, as its manifest says it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import xxhash
from composer.utils import dist

from dbrx_train.config import RunConfig, for_record
from dbrx_train.data.manifest import MANIFEST
from dbrx_train.data.tokenizer import Tokenizer
from dbrx_train.plan.world import mesh_shape
from dbrx_train.train import environment

__all__ = ["provenance"]


def provenance(config: RunConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """The run's configuration, and how many ranks, on which mesh, with which versions and data.

    Fingerprints are XXH3 (128 bits): of the configuration as JSON with sorted keys, and of each source's
    manifest, byte for byte. The tokenizer's is its own.
    """
    plain, ranks = for_record(config), dist.get_world_size()
    return {
        "config": plain,
        "ranks": ranks,
        "tokenizer": tokenizer.fingerprint,
        "made_by": {
            "mesh": asdict(mesh_shape(config, ranks)),
            "versions": environment.versions(),
            "config": _hash(json.dumps(plain, sort_keys=True).encode()),
            "data": {
                name: _hash(Path(source.local, MANIFEST).read_bytes())
                for name, source in config.data.sources.items()
            },
        },
    }


def _hash(content: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(content)
