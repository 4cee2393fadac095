"""Records of an evaluation: results in one JSON file, beside it a line of JSON for each example.

Both are written as the evaluation goes, so that one which was interrupted goes on where it was.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from dbrx_train import jsonl
from dbrx_train.evaluate.gauntlet import Standing
from dbrx_train.evaluate.outcomes import Outcome, Result
from dbrx_train.evaluate.tasks import Task
from dbrx_train.files import atomic_write, seal
from dbrx_train.model.decoder import Dbrx

__all__ = ["Records", "fingerprint"]

_FIELDS = tuple(f.name for f in dataclasses.fields(Outcome) if f.name != "details")


def fingerprint(model: Dbrx) -> str:
    """XXH3 of weights that every step of training moves: norms, routers, and some of the head."""
    digest = xxhash.xxh3_128()
    for name, tensor in model.state_dict().items():
        if tensor.ndim == 1 or "router" in name or name == "lm_head.weight":
            digest.update(tensor[:64].detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


class Records:
    """The two files; ``path`` is the one with the results.

    Args:
        model: fingerprint of its weights.
        options: what else decides a score.

    Raises:
        ValueError: the file holds another evaluation, or something else.
    """

    def __init__(self, path: Path, model: str, tasks: list[Task], options: Mapping[str, Any]) -> None:
        self.path, self.lines = path, path.with_suffix(".jsonl")
        if self.path == self.lines:
            raise ValueError(f"--json {path}: its examples go to a .jsonl beside it; give another ending")
        asked = {"tasks": [dataclasses.asdict(task) for task in tasks], **options}
        self.evaluation = {"model": model, "options": dict(options), "seal": seal(asked)}
        if path.exists():
            self._check()
        else:
            self.lines.unlink(missing_ok=True)
            self.write({}, None)

    def _check(self) -> None:
        try:
            there = json.loads(self.path.read_text(encoding="utf-8"))["evaluation"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{self.path}: exists, and is no evaluation; name another file") from None
        if there != self.evaluation:
            other = (
                "of other weights"
                if there.get("model") != self.evaluation["model"]
                else "of other tasks or options"
            )
            raise ValueError(f"{self.path}: holds an evaluation {other}; remove it, or name another file")

    def known(self) -> dict[tuple[str, str | None, int], Outcome]:
        """What was recorded before."""
        found = {}
        for entry in jsonl.Tail(self.lines).read():
            details = {key: value for key, value in entry.items() if key not in _FIELDS}
            outcome = Outcome(**{key: entry[key] for key in _FIELDS}, details=details)
            found[outcome.task, outcome.category, outcome.index] = outcome
        return found

    def add(self, outcome: Outcome) -> None:
        """Keep an example."""
        entry = dataclasses.asdict(outcome)
        jsonl.append(self.lines, entry | entry.pop("details"))

    def write(
        self, results: Mapping[str, Result], standings: tuple[dict[str, Standing], dict[str, Standing]] | None
    ) -> None:
        """Keep the results so far."""
        content: dict[str, Any] = {"tasks": {name: result.to_dict() for name, result in results.items()}}
        if standings is not None:
            kinds = ("categories", "averages")
            content["gauntlet"] = {
                kind: {name: dataclasses.asdict(each) for name, each in found.items()}
                for kind, found in zip(kinds, standings, strict=True)
            }
        with atomic_write(self.path) as partial:
            text = json.dumps(content | {"evaluation": self.evaluation}, indent=2, ensure_ascii=False)
            partial.write_text(text + "\n", encoding="utf-8")
