"""Governance of a source: its licence, its owner, its terms, and what it may be used for."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["USES", "Governance"]

USES = ("train", "eval")


@dataclass(frozen=True)
class Governance:
    """What ``data prepare`` was told of a source; None or empty where it was told nothing."""

    licence: str | None = None
    """An SPDX identifier, such as ``CC-BY-4.0``, or any other name."""
    owner: str | None = None
    terms: str | None = None
    """Where the terms of use are, or what they say."""
    allowed: list[str] = field(default_factory=list)
    """Of ``USES``; empty: any."""

    def __post_init__(self) -> None:
        for use in self.allowed:
            if use not in USES:
                raise ValueError(f"allowed: {use!r} is no use; must be {' or '.join(USES)}")

    def __bool__(self) -> bool:
        return self != Governance()

    def __str__(self) -> str:
        said = [f"{key} {value}" for key, value in self.facts().items() if key != "allowed"]
        return ", ".join([*said, *([f"allowed: {', '.join(self.allowed)}"] if self.allowed else [])])

    def allows(self, use: str) -> bool:
        return not self.allowed or use in self.allowed

    def facts(self) -> dict[str, Any]:
        """What is known, without what is not."""
        return {key: value for key, value in asdict(self).items() if value}

    def updated(self, given: Governance) -> Governance:
        """The same with what ``given`` says."""
        return Governance(**{**self.facts(), **given.facts()})
