"""The command line: one command per verb, each a thin call into one room.

Exit codes: 0 done; 2 the user's input is wrong (one line); 75 stopped as asked, with all that was done saved;
74 no progress for too long; 130 and 143 interrupted; 1 anything else. ``exits.py`` sees to them.
"""

from __future__ import annotations

import sys
from enum import StrEnum, auto
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from dbrx_train import __version__, exits, logs
from dbrx_train.files import atomic_write

app = typer.Typer(
    name="dbrx-train",
    help="Train fine-grained mixture-of-experts language models the way DBRX was trained.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(no_args_is_help=True, help="Prepare and look at training data.")
app.add_typer(data_app, name="data")
checkpoint_app = typer.Typer(no_args_is_help=True, help="Turn checkpoints into other forms.")
app.add_typer(checkpoint_app, name="checkpoint")


Config = Annotated[str, typer.Argument(help="The run's YAML.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")]
Out = Annotated[str, typer.Option(help="The folder to make.")]
SeqLen = Annotated[int, typer.Option(help="Tokens per sample.")]
Processes = Annotated[int | None, typer.Option(help="Worker processes; default: one per core.")]
VocabFile = Annotated[
    str | None, typer.Option(help="A .tiktoken vocabulary, or a tokenizer.json, to use instead.")
]
Int8 = Annotated[bool, typer.Option("--int8", help="Hold the weights in 8 bits.")]


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


class Trained(StrEnum):
    """Which turns of a conversation are trained on."""

    assistant = auto()
    all = auto()


class Long(StrEnum):
    """What becomes of a conversation that is longer than a sample."""

    truncate = auto()
    drop = auto()


class _Command(typer.core.TyperCommand):
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


def main() -> None:
    """Run the command that the arguments say, and exit."""
    exits.run(lambda: app(prog_name="dbrx-train", standalone_mode=False))


def _show_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@data_app.command("prepare")
def data_prepare(
    sources: Annotated[
        list[str], typer.Argument(help="Files, folders or globs: text, JSON lines, JSON, Parquet.")
    ],
    out: Out,
    seq_len: SeqLen = 2048,
    text_field: Annotated[
        str, typer.Option(help="Field or column that holds the text; a.b is field b of a.")
    ] = "text",
    template: Annotated[
        str | None, typer.Option(help="Text made of several fields instead, as '{title}\\n\\n{body}'.")
    ] = None,
    suffix: Annotated[list[str] | None, typer.Option(help="Ending of text files; may be repeated.")] = None,
    val_fraction: Annotated[float, typer.Option(help="Share of the documents held out.")] = 0.01,
    processes: Processes = None,
    vocab_file: VocabFile = None,
) -> None:
    """Tokenize SOURCES into shards; interrupted, the same command goes on."""
    exits.resumable()
    from dbrx_train.data.prepare.pipeline import TEXT_SUFFIXES, prepare

    summary = prepare(
        sources,
        out,
        seq_len=seq_len,
        text_field=text_field,
        template=template,
        suffixes=suffix or TEXT_SUFFIXES,
        val_fraction=val_fraction,
        processes=processes,
        vocab_file=vocab_file,
    )
    print(summary)


@data_app.command("prepare-chat")
def data_prepare_chat(
    sources: Annotated[list[str], typer.Argument(help="Files, folders or globs: JSON lines, JSON, Parquet.")],
    out: Out,
    seq_len: SeqLen = 2048,
    loss: Annotated[Trained, typer.Option(help="The turns to train on.")] = Trained.assistant,
    long: Annotated[Long, typer.Option(help="What becomes of conversations over --seq-len.")] = Long.truncate,
    preferences: Annotated[
        bool, typer.Option("--preferences", help="Lines hold a chosen and a rejected answer, for DPO.")
    ] = False,
    val_fraction: Annotated[float, typer.Option(help="Share of the conversations held out.")] = 0.05,
    processes: Processes = None,
    vocab_file: VocabFile = None,
) -> None:
    """Turn conversations in SOURCES into shards: ChatML, whole within samples, with a loss mask."""
    exits.resumable()
    from dbrx_train.data.prepare.conversations import ChatFormat
    from dbrx_train.data.prepare.pipeline import prepare

    summary = prepare(
        sources,
        out,
        seq_len=seq_len,
        val_fraction=val_fraction,
        processes=processes,
        vocab_file=vocab_file,
        chat=ChatFormat(loss.value, long.value, preferences),
    )
    print(summary)


@data_app.command("inspect")
def data_inspect(
    folder: Annotated[str, typer.Argument(help="A prepared folder.")],
    split: Annotated[str, typer.Option(help="train or val.")] = "train",
    sample: Annotated[int | None, typer.Option(help="Which sample to show.")] = None,
    vocab_file: Annotated[str | None, typer.Option(help="The vocabulary it was prepared with.")] = None,
) -> None:
    """Show what a prepared folder holds."""
    from dbrx_train.data.inspect import inspect

    print(inspect(folder, split=split, sample=sample, vocab_file=vocab_file))


@data_app.command("mix")
def data_mix(
    config: Config,
    overrides: Overrides = None,
    picture: Annotated[Path, typer.Option(help="Where to write the picture.")] = Path("mix.png"),
) -> None:
    """Show the data mix of CONFIG over the run, with epochs per source, as a table and a picture."""
    from dbrx_train.config import load
    from dbrx_train.data.manifest import read_manifest
    from dbrx_train.data.mix import plots

    run = load(config, overrides or [])
    mix, sizes = run.mix_schedule(), dict[str, int]()
    lengths = mix.sample_lengths(run.clock)
    for name, source in run.data.sources.items():
        manifest = read_manifest(source.local)
        manifest.check_length(source.local, lengths.get(name))
        sizes[name] = manifest.splits["train"].samples
    run.check_repetition(mix, sizes)
    print(plots.table(mix, sizes, run.clock))
    picture = picture if picture.suffix else picture.with_suffix(".png")
    with atomic_write(picture) as partial:
        plots.draw(mix, sizes, run.clock, partial)
    off = f"{mix.max_deviation:.2f} samples per canonical node"
    print(f"a source is never further than {off} from its weight's integral; picture: {picture}")


@data_app.command("quickstart")
def data_quickstart(
    out: Out = "data/quickstart",
    seq_len: SeqLen = 512,
) -> None:
    """Prepare the quickstart's corpus: the code and the texts of this machine's Python."""
    exits.resumable()
    from dbrx_train.data.prepare.quickstart import prepare_quickstart

    for summary in prepare_quickstart(out, seq_len=seq_len).values():
        print(summary)


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
) -> None:
    """Train as CONFIG says; resume if a run of its name was started before."""
    exits.resumable()
    from dbrx_train.config import load

    logs.outlive_readers()
    loaded = load(config, overrides or [])
    with exits.hearing_alone():
        from dbrx_train.train.run import run

    run(loaded)


@app.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(help="How many GPUs; plan.gpus.")] = None,
    gpu: Annotated[str | None, typer.Option(help="Their kind, such as h100; plan.gpu.")] = None,
    machine: Annotated[int | None, typer.Option(help="GPUs of one machine; plan.machine.")] = None,
    price: Annotated[
        float | None, typer.Option(help="Dollars for a GPU and an hour; plan.gpu_hour_price.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, in bytes and seconds.")] = False,
    search: Annotated[
        bool, typer.Option("--search", help="Try all meshes, microbatches and activation checkpointings.")
    ] = False,
    dry: Annotated[
        bool, typer.Option("--dry-run", help="Run steps of one rank on fake tensors: its memory, observed.")
    ] = False,
) -> None:
    """Show what CONFIG will need on given GPUs: memory, traffic, time, money; 2 if it does not fit."""
    from dbrx_train.config import load
    from dbrx_train.plan.report import report

    given = {"gpus": gpus, "gpu": gpu, "machine": machine, "gpu_hour_price": price}
    options = [f"plan.{key}={value}" for key, value in given.items() if value is not None]
    run = load(config, [*(overrides or []), *options])
    if not dry:
        report(run, as_json=as_json, searching=search)
        return
    if as_json or search:
        raise ValueError("--dry-run: is one table of one mesh; leave out --json and --search")
    from dbrx_train.plan.dry_run_table import report_dry_run
    from dbrx_train.train.optim import build_optimizer

    report_dry_run(run, build_optimizer)


@app.command("eval")
def evaluate(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG|CKPT", help="A run's YAML or folder, a checkpoint, or a Hugging Face folder."
        ),
    ],
    overrides: Overrides = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="A run, checkpoint or Hugging Face folder; default: CONFIG's run."),
    ] = None,
    int8: Int8 = False,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help="Put in-context tasks to it instead: a file with icl_tasks:, `gauntlet`, or a task's label; "
            "may be repeated."
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="The folder of the tasks' data; default: their file's.")
    ] = None,
    gauntlet: Annotated[
        Path | None, typer.Option(help="A file with eval_gauntlet: to aggregate by; default: Gauntlet v0.3.")
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(
            help="Write results here, and examples to a .jsonl beside it; interrupted, the same command goes "
            "on."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Examples of each task, from the first on.")
    ] = None,
    max_seq_len: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of the longest prompt with its answer; default: the model's."),
    ] = None,
    as_foundry: Annotated[
        bool, typer.Option("--as-foundry", help="Score as LLM Foundry does even where it is wrong.")
    ] = False,
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Leave out tasks whose data is not there.")
    ] = False,
) -> None:
    """Show the loss on what was held out of each source of CONFIG, or the scores of in-context tasks."""
    from dbrx_train.evaluate.alone import Asked, evaluate
    from dbrx_train.evaluate.held_out import of_weights

    asked = Asked(tasks or [], data, gauntlet, json, limit, max_seq_len, int8, as_foundry, skip_missing)
    if tasks:
        found = weights or (source if not _is_config(source) else _run_folder(source, overrides))
        print(evaluate(found, asked, _aside))
        return
    if asked != Asked([], int8=int8):
        raise ValueError("--tasks: not given, and all other options but --weights and --int8 are about tasks")
    config = source if _is_config(source) else source / "config.yaml"
    for part in of_weights(config, overrides or [], weights, int8, _aside):
        print(f"held-out {part.source}: loss {part.loss:.4f} over {part.labels:,} tokens", flush=True)


def _is_config(source: Path) -> bool:
    return source.suffix in (".yaml", ".yml")


def _run_folder(config: Path, overrides: list[str] | None) -> Path:
    from dbrx_train.config import load

    return Path(load(config, overrides or []).folder)


def _aside(line: str) -> None:
    print(line, file=sys.stderr)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    out: Annotated[Path | None, typer.Option(help="The file to write; default: report.html in RUN.")] = None,
    tracking_uri: Annotated[
        str | None, typer.Option(help="The MLflow store that it is in; default: its configuration's.")
    ] = None,
) -> None:
    """Write what RUN was and how it went to one HTML file, which opens without a network."""
    from dbrx_train.report import read, render

    page, content = out or run / "report.html", render(read(run, tracking_uri))
    with atomic_write(page) as partial:
        partial.write_text(content, encoding="utf-8")
    print(page)


@checkpoint_app.command("consolidate")
def checkpoint_consolidate(
    checkpoint: Annotated[Path, typer.Argument(help="A run's folder or a checkpoint.")],
    out: Annotated[Path, typer.Option(help="The safetensors file to write.")],
    dtype: Annotated[Precision, typer.Option(help="Of the parameters.")] = Precision.float32,
) -> None:
    """Write the weights in CHECKPOINT to one safetensors file; adapters are merged into them."""
    import torch

    from dbrx_train.checkpoint.weights import consolidate

    size = consolidate(checkpoint, out, getattr(torch, dtype.full), _aside)
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

    for name in write_adapter(checkpoint, out, _aside):
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

    size = export(checkpoint, out, getattr(torch, dtype.full), _aside)
    print(f"{out}: {size:,} bytes")


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


@app.command()
def generate(
    checkpoint: Annotated[
        Path, typer.Argument(help="A run's folder, a checkpoint, its weights, or a Hugging Face folder.")
    ],
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Stop after this many tokens; default: 128, or what there is room for."),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Sample from this much probability; 0: the likeliest token."),
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the sampling.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="PROMPT is a user's turn: write the answer.")] = False,
    int8: Int8 = False,
) -> None:
    """Continue PROMPT with the model in CHECKPOINT."""
    from dbrx_train.evaluate.text import continue_text

    pieces = continue_text(
        checkpoint,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        chat=chat,
        int8=int8,
        aside=_aside,
    )
    print("" if chat else prompt, end="", flush=True)
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    finally:
        print()


for _each in (app, data_app, checkpoint_app):
    for _command in _each.registered_commands:
        _command.cls = _Command
