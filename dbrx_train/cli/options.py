"""What several commands take, and how they refuse it."""

from __future__ import annotations

from enum import StrEnum, auto
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

Config = Annotated[str, typer.Argument(help="The run's YAML.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")]
Out = Annotated[str, typer.Option(help="The folder to make.")]
SeqLen = Annotated[int, typer.Option(help="Tokens per sample.")]
Processes = Annotated[int | None, typer.Option(help="Worker processes; default: one per core.")]
VocabFile = Annotated[
    str | None, typer.Option(help="A .tiktoken vocabulary, or a tokenizer.json, to use instead.")
]
Int8 = Annotated[bool, typer.Option("--int8", help="Hold the weights in 8 bits.")]
Speaker = Annotated[
    Path, typer.Argument(help="A run's folder, a checkpoint, its weights, or a Hugging Face folder.")
]
Temperature = Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")]
TopP = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="Sample from this much probability; 0: the likeliest token.")
]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the sampling.")]


class Precision(StrEnum):
    """A dtype to write weights in."""

    float32 = auto()
    bfloat16 = auto()
    fp32 = auto()
    bf16 = auto()

    @property
    def full(self) -> str:
        """torch's name of it."""
        return {"fp32": "float32", "bf16": "bfloat16"}.get(self, self)


class Command(typer.core.TyperCommand):
    """A command whose refusals name its options as they are typed, where functions name their parameters."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ValueError as error:
            name, colon, rest = str(error).partition(": ")
            typed = next((each for each in self.params if each.name == name), None)
            if typed is None or not colon:
                raise
            raise ValueError(f"{typed.opts[0] if typed.opts[0] != name else name.upper()}: {rest}") from error
