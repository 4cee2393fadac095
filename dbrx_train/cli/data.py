"""``dbrx-train data``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from enum import StrEnum, auto
from pathlib import Path
from typing import Annotated

import typer

from dbrx_train import exits
from dbrx_train.cli.options import Config, Out, Overrides, Processes, SeqLen, VocabFile
from dbrx_train.errors import aside
from dbrx_train.files import atomic_write

__all__ = ["data_app"]

data_app = typer.Typer(no_args_is_help=True, help="Curate, prepare and look at training data.")


class Use(StrEnum):
    """What a source may be used for."""

    train = auto()
    eval = auto()


Licence = Annotated[
    str | None, typer.Option("--licence", "--license", help="Of the sources, such as CC-BY-4.0.")
]
Owner = Annotated[str | None, typer.Option(help="Whose the sources are.")]
Terms = Annotated[str | None, typer.Option(help="Their terms of use, or where these are.")]
Allowed = Annotated[
    list[Use] | None, typer.Option(help="What they may be used for; may be repeated; default: both.")
]


class Split(StrEnum):
    """Where documents go, all of them."""

    train = auto()
    val = auto()


SplitOption = Annotated[
    Split | None,
    typer.Option(
        help="Put all documents there: val makes held-out data for the `val` of a source. In place of "
        "--val-fraction."
    ),
]


def _fraction(split: Split | None, val_fraction: float) -> float:
    return val_fraction if split is None else {Split.train: 0.0, Split.val: 1.0}[split]


class Trained(StrEnum):
    """Which turns of a conversation are trained on."""

    assistant = auto()
    all = auto()


class Long(StrEnum):
    """What becomes of a conversation that is longer than a sample."""

    truncate = auto()
    drop = auto()


class Engine(StrEnum):
    """Who does the work."""

    local = auto()
    spark = auto()


EngineOption = Annotated[
    Engine, typer.Option(help="Processes of this machine, or a Spark session; the result is the same.")
]


@data_app.command("curate")
def data_curate(
    recipe: Annotated[str, typer.Argument(help="A recipe: sources and steps, as YAML.")],
    out: Out,
    engine: EngineOption = Engine.local,
    processes: Processes = None,
    allow_empty: Annotated[
        bool, typer.Option("--allow-empty", help="Accept that nothing is left of a source.")
    ] = False,
) -> None:
    """Clean, filter and deduplicate the sources of RECIPE; interrupted, the same command goes on."""
    exits.resumable()
    from dbrx_train.data.curate.pipeline import curate

    print(curate(recipe, out, engine=engine.value, processes=processes, allow_empty=allow_empty))


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
    val_fraction: Annotated[
        float, typer.Option(help="Share of the documents held out; enough for a sample at least.")
    ] = 0.01,
    split: SplitOption = None,
    engine: EngineOption = Engine.local,
    processes: Processes = None,
    vocab_file: VocabFile = None,
    licence: Licence = None,
    owner: Owner = None,
    terms: Terms = None,
    allowed: Allowed = None,
) -> None:
    """Tokenize SOURCES into shards; interrupted, the same command goes on."""
    exits.resumable()
    from dbrx_train.data.governance import Governance
    from dbrx_train.data.prepare.pipeline import TEXT_SUFFIXES, prepare

    summary = prepare(
        sources,
        out,
        seq_len=seq_len,
        text_field=text_field,
        template=template,
        suffixes=suffix or TEXT_SUFFIXES,
        val_fraction=_fraction(split, val_fraction),
        engine=engine.value,
        processes=processes,
        vocab_file=vocab_file,
        governance=Governance(licence, owner, terms, [use.value for use in allowed or []]),
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
    val_fraction: Annotated[
        float, typer.Option(help="Share of the conversations held out; one at least.")
    ] = 0.05,
    split: SplitOption = None,
    processes: Processes = None,
    vocab_file: VocabFile = None,
    licence: Licence = None,
    owner: Owner = None,
    terms: Terms = None,
    allowed: Allowed = None,
) -> None:
    """Turn conversations in SOURCES into shards: ChatML, whole within samples, with a loss mask."""
    exits.resumable()
    from dbrx_train.data.governance import Governance
    from dbrx_train.data.prepare.conversations import ChatFormat
    from dbrx_train.data.prepare.pipeline import prepare

    summary = prepare(
        sources,
        out,
        seq_len=seq_len,
        val_fraction=_fraction(split, val_fraction),
        processes=processes,
        vocab_file=vocab_file,
        chat=ChatFormat(loss.value, long.value, preferences),
        governance=Governance(licence, owner, terms, [use.value for use in allowed or []]),
    )
    print(summary)


@data_app.command("inspect")
def data_inspect(
    folder: Annotated[Path, typer.Argument(help="A prepared folder; with --step, a run's.")],
    split: Annotated[str | None, typer.Option(help="train or val; default: train, if there is one.")] = None,
    sample: Annotated[int | None, typer.Option(help="Which sample to show.")] = None,
    vocab_file: Annotated[str | None, typer.Option(help="The vocabulary it was prepared with.")] = None,
    step: Annotated[int | None, typer.Option(help="Of a run: show the samples of this bad step.")] = None,
) -> None:
    """Show what a prepared folder holds, or the texts of a run's bad step."""
    from dbrx_train.data.inspect import inspect

    if step is not None:
        print("\n".join(_bad_samples(folder, step)))
        return
    print(inspect(folder, split=split, sample=sample, vocab_file=vocab_file))


def _bad_samples(run: Path, step: int) -> Iterator[str]:
    """The samples of a step that was skipped; where some had no finite loss, these alone."""
    from dbrx_train.config import load
    from dbrx_train.data.inspect import inspect_sample
    from dbrx_train.jsonl import EVENTS, Tail

    path = run / EVENTS
    bad = [event for event in Tail(path).read() if event.get("kind") == "bad_step"]
    events = [event for event in bad if event["step"] == step]
    if not events:
        known = ", ".join(str(event["step"]) for event in bad[:20]) or "none"
        raise ValueError(f"step: {path} has no bad step {step}; it has {known}")
    config = load(run / "config.yaml")
    for source, numbers in (events[-1].get("not_finite") or events[-1]["samples"]).items():
        for number in numbers:
            local = config.data.sources[source].local
            yield f"{source}: {inspect_sample(local, number, config.tokenizer.vocab_file)}"
            yield ""


@data_app.command("explore")
def data_explore(
    sources: Annotated[
        list[str],
        typer.Argument(help="Prepared or curated folders, or what `data prepare` takes; each is a source."),
    ],
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("explore.html"),
    passages: Annotated[int, typer.Option(min=10, help="Passages to look at, of all sources.")] = 20_000,
    clusters: Annotated[int, typer.Option(min=1, max=500, help="Clusters to find.")] = 24,
    text_field: Annotated[str, typer.Option(help="Field or column that holds the text.")] = "text",
    template: Annotated[str | None, typer.Option(help="Text made of several fields instead.")] = None,
    suffix: Annotated[list[str] | None, typer.Option(help="Ending of text files; may be repeated.")] = None,
    vocab_file: VocabFile = None,
) -> None:
    """Write what is in SOURCES to one HTML file: sizes, duplicates, examples, a map, clusters, search."""
    import importlib.util

    if importlib.util.find_spec("sklearn") is None:
        raise ValueError("scikit-learn is not installed; this needs: pip install 'dbrx-train[train,explore]'")
    from dbrx_train.data.explore.explore import explore
    from dbrx_train.data.prepare.pipeline import TEXT_SUFFIXES
    from dbrx_train.data.prepare.text_template import text_template

    size = explore(
        sources,
        out,
        passages=passages,
        clusters=clusters,
        template=text_template(text_field, template),
        suffixes=suffix or TEXT_SUFFIXES,
        vocab_file=vocab_file,
        advance=aside,
    )
    print(f"{out}: {size:,} bytes")


@data_app.command("lineage")
def data_lineage(
    path: Annotated[
        Path, typer.Argument(metavar="CKPT|DIR", help="A run, checkpoint or export; or a prepared folder.")
    ],
    runs: Annotated[Path, typer.Option(help="Of DIR: the folder to look for checkpoints in.")] = Path("runs"),
    tracking_uri: Annotated[
        str | None, typer.Option(help="Of DIR: an MLflow store to look for runs in, too.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every file.")] = False,
) -> None:
    """Show what CKPT was trained on, down to its files; or which checkpoints have seen DIR."""
    from dbrx_train.checkpoint import lineage

    if not lineage.is_prepared(path):
        found = lineage.read(path, aside)
        if as_json:
            print(json.dumps(lineage.as_json(found), indent=1))
        else:
            print("\n".join(lineage.describe(found, most=20)))
        return
    if as_json:
        print(json.dumps(lineage.seen_as_json(path, runs), indent=1))
        return
    print("\n".join(lineage.describe_seen(path, runs)))
    if tracking_uri is not None:
        from dbrx_train.train.tracking.lineage import runs_that_read

        print(f"read by runs in {tracking_uri}")
        for reader in runs_that_read(tracking_uri, path, lineage.shards_of(path)):
            print(f"  {reader}")


@data_app.command("mix")
def data_mix(
    config: Config,
    overrides: Overrides = None,
    picture: Annotated[
        Path, typer.Option(help="The picture to write, of any format of matplotlib's.")
    ] = Path("mix.png"),
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
    print(f"a source is never further than {off} from its weight's integral\npicture: {picture.absolute()}")


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


@data_app.command("long-context")
def data_long_context(
    out: Out,
    lengths: Annotated[list[int], typer.Option(help="Tokens of question and answer; may be repeated.")],
    hotpot: Annotated[
        Path | None, typer.Option(help="A file of HotpotQA's JSON: its questions, too.")
    ] = None,
    examples: Annotated[int, typer.Option(help="Questions of each length and position.")] = 100,
    vocab_file: VocabFile = None,
) -> None:
    """Write tasks for `eval`: questions whose answer lies in a given third of a long text."""
    from dbrx_train.data.tokenizer import load_tokenizer
    from dbrx_train.evaluate.long_context import key_value_pairs, read_hotpot, write_tasks

    tokenizer = load_tokenizer(vocab_file=vocab_file)
    makers = {"key_value_pairs": key_value_pairs(tokenizer)}
    if hotpot:
        makers["hotpotqa"] = read_hotpot(hotpot).maker(tokenizer)
    print(write_tasks(Path(out), makers, lengths, examples))
