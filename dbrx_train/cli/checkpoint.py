"""``dbrx-train checkpoint``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dbrx_train.cli.options import Precision
from dbrx_train.errors import aside

__all__ = ["checkpoint_app"]

checkpoint_app = typer.Typer(no_args_is_help=True, help="Turn checkpoints into other forms.")


@checkpoint_app.command("consolidate")
def checkpoint_consolidate(
    checkpoint: Annotated[Path, typer.Argument(help="A run's folder or a checkpoint.")],
    out: Annotated[Path, typer.Option(help="The safetensors file to write.")],
    dtype: Annotated[Precision, typer.Option(help="Of the parameters.")] = Precision.float32,
) -> None:
    """Write the weights in CHECKPOINT to one safetensors file; adapters are merged into them."""
    import torch

    from dbrx_train.checkpoint.weights import consolidate

    size = consolidate(checkpoint, out, getattr(torch, dtype.full), aside)
    print(f"{out}: {size:,} bytes")


@checkpoint_app.command("adapter")
def checkpoint_adapter(
    checkpoint: Annotated[Path, typer.Argument(help="A run that trained adapters, or its checkpoint.")],
    out: Annotated[Path, typer.Option(help="The folder to make.")],
) -> None:
    """Write the adapters of CHECKPOINT alone: attention's in PEFT's format, the experts' beside them.

    `checkpoint consolidate` merges them into the weights.
    """
    from dbrx_train.checkpoint.adapter import EXPERTS_FILE, write_adapter

    for name in write_adapter(checkpoint, out, aside):
        note = " (ours: PEFT knows none for experts, and does not load it)" if name == EXPERTS_FILE else ""
        print(f"{out / name}: {(out / name).stat().st_size:,} bytes{note}")


@checkpoint_app.command("import")
def checkpoint_import(
    folder: Annotated[Path, typer.Argument(help="A Hugging Face folder of DBRX or Mixtral.")],
    out: Annotated[Path, typer.Option(help="The checkpoint to make, a folder.")],
) -> None:
    """Turn the weights in FOLDER into a checkpoint to begin from; `init_from` reads FOLDER as it is, too."""
    from dbrx_train.checkpoint.huggingface import import_folder

    print(f"{out}: {import_folder(folder, out):,} bytes")


@checkpoint_app.command("export")
def checkpoint_export(
    checkpoint: Annotated[Path, typer.Argument(help="A run's folder, a checkpoint, or its weights.")],
    out: Annotated[Path, typer.Option(help="The Hugging Face folder to make.")],
    dtype: Annotated[Precision, typer.Option(help="Of the weights.")] = Precision.bfloat16,
) -> None:
    """Write the weights in CHECKPOINT as a folder that transformers loads."""
    import torch

    from dbrx_train.checkpoint.huggingface import export

    size = export(checkpoint, out, getattr(torch, dtype.full), aside)
    print(f"{out}: {size:,} bytes")


@checkpoint_app.command("register")
def checkpoint_register(
    checkpoint: Annotated[Path, typer.Argument(help="A run's folder or a checkpoint.")],
    name: Annotated[str, typer.Option(help="The model's; in Unity Catalog catalog.schema.model.")],
    alias: Annotated[str | None, typer.Option(help="One for this version, such as champion.")] = None,
    licence: Annotated[
        str | None, typer.Option("--licence", "--license", help="Of the model, such as Apache-2.0.")
    ] = None,
    tracking_uri: Annotated[
        str | None, typer.Option(help="The MLflow store that knows the run; default: its configuration's.")
    ] = None,
    registry_uri: Annotated[
        str | None,
        typer.Option(help="Where to register; default: MLFLOW_REGISTRY_URI, or the tracking URI."),
    ] = None,
) -> None:
    """Register CHECKPOINT in MLflow's model registry, where it lies, as the next version of a model."""
    from dbrx_train.checkpoint.registry import register

    print(
        register(
            checkpoint,
            name,
            aside,
            alias=alias,
            licence=licence,
            tracking_uri=tracking_uri,
            registry_uri=registry_uri,
        )
    )


@checkpoint_app.command("verify")
def checkpoint_verify(
    folder: Annotated[
        Path, typer.Argument(help="A run's folder, a checkpoint, its weights, or a Hugging Face folder.")
    ],
) -> None:
    """Account for every file and tensor in FOLDER; name the first that is not as it was written."""
    from dbrx_train.checkpoint.verify import verify

    for whole in verify(folder):
        print(whole)
