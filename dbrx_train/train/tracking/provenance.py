"""What made a checkpoint, as its manifest says it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import xxhash
from composer.utils import dist

from dbrx_train.config import RunConfig, for_record
from dbrx_train.data.manifest import digest, read_manifest
from dbrx_train.data.tokenizer import Tokenizer
from dbrx_train.plan.world import mesh_shape
from dbrx_train.redact import mask
from dbrx_train.train import environment

__all__ = ["provenance", "source_facts"]


def provenance(config: RunConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """The run's configuration, and how many ranks, on which mesh, with which versions and data.

    Fingerprints are XXH3 (128 bits): of the configuration as JSON with sorted keys, and of each source's
    manifest, byte for byte. The tokenizer's is its own.
    """
    plain, ranks, sources = for_record(config), dist.get_world_size(), source_facts(config)
    return {
        "config": plain,
        "ranks": ranks,
        "tokenizer": tokenizer.fingerprint,
        "made_by": {
            "mesh": asdict(mesh_shape(config, ranks)),
            "versions": environment.versions(),
            "config": xxhash.xxh3_128_hexdigest(json.dumps(plain, sort_keys=True).encode()),
            "data": {name: facts["manifest"] for name, facts in sources.items()},
            "sources": sources,
        },
    }


def source_facts(config: RunConfig) -> dict[str, dict[str, Any]]:
    """What each source of a run is, as its manifest says it: the fields of ``SourceLineage`` by name."""
    found = {}
    for name, source in config.data.sources.items():
        manifest = read_manifest(source.local)
        found[name] = {
            "folder": mask(source.remote or str(Path(source.local).absolute())),
            "manifest": digest(source.local),
            "seq_len": manifest.seq_len,
            "size": manifest.splits["train"].samples,
            "governance": manifest.governance.facts(),
            "inputs": manifest.inputs and asdict(manifest.inputs),
            "curation": [asdict(curation) for curation in manifest.curation],
        }
    return found
