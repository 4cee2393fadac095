"""Commands about a run: plan, train, look at it, and put its model to use."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dbrx_train import exits, logs
from dbrx_train.cli.options import Config, Int8, Overrides, Seed, Speaker, Temperature, TopP
from dbrx_train.errors import aside
from dbrx_train.files import atomic_write

if TYPE_CHECKING:
    from dbrx_train.config import RunConfig

__all__ = ["runs_app"]

runs_app = typer.Typer()


@runs_app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only say whether configuration, data and ranks fit together.")
    ] = False,
) -> None:
    """Train as CONFIG says; resume if a run of its name was started before."""
    exits.resumable()
    from dbrx_train.config import load

    logs.outlive_readers()
    loaded = load(config, overrides or [])
    _check(loaded)
    if check:
        from dbrx_train.plan.table import counted

        size, tokens = counted(loaded.model.num_params), counted(loaded.clock.total_tokens)
        sources = ", ".join(loaded.data.sources)
        print(f"{loaded.run_name} is in order: {size} parameters, {tokens} tokens of {sources}")
        return
    with exits.hearing_alone():
        from dbrx_train.train.run import run

    run(loaded)


def _check(config: RunConfig) -> None:
    """What can be told of a run without torch, so that a mistake costs no wait for it."""
    from dbrx_train.data.tokenizer import load_tokenizer
    from dbrx_train.plan.planner import count
    from dbrx_train.plan.world import check_world
    from dbrx_train.train.sources import check_sources
    from dbrx_train.train.tracking.installed import check_trackers

    check_trackers(config)
    check_world(config, int(os.environ.get("WORLD_SIZE", 0)) or count(config))
    if all(source.remote is None for source in config.data.sources.values()):
        sizes = check_sources(config, load_tokenizer(config.tokenizer.name, config.tokenizer.vocab_file))
        config.check_repetition(config.mix_schedule(), sizes)


@runs_app.command()
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


@runs_app.command("eval")
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
    unsafe_code: Annotated[
        bool,
        typer.Option("--unsafe-code", help="Run programs that the model writes without bubblewrap's walls."),
    ] = False,
    picture: Annotated[
        Path | None, typer.Option(help="Draw scores by length and position of the answer here.")
    ] = None,
) -> None:
    """Show the loss on what was held out of each source of CONFIG, or the scores of in-context tasks."""
    from dbrx_train.evaluate.alone import Asked, evaluate
    from dbrx_train.evaluate.held_out import of_weights

    asked = Asked(
        tasks or [],
        data,
        gauntlet,
        json,
        limit,
        max_seq_len,
        int8,
        as_foundry,
        skip_missing,
        unsafe_code,
        picture,
    )
    if tasks:
        found = weights or (source if not _is_config(source) else _run_folder(source, overrides))
        print(evaluate(found, asked, aside))
        return
    if asked != Asked([], int8=int8):
        raise ValueError("--tasks: not given, and all other options but --weights and --int8 are about tasks")
    config, weights = _run_of(source, weights)
    for part in of_weights(config, overrides or [], weights, int8, aside):
        print(f"held-out {part.source}: loss {part.loss:.4f} over {part.labels:,} tokens", flush=True)


@runs_app.command(
    "lm-eval",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def lm_eval(context: typer.Context) -> None:
    """Run lm-eval's own command with `--model dbrx_train`, as `--model_args path=RUN --tasks arc_easy`."""
    import importlib.util

    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("lm-eval: is not installed; pip install 'dbrx-train[eval]'")
    from dbrx_train.evaluate.harness import main

    main(context.args)


def _run_of(source: Path, weights: Path | None) -> tuple[Path, Path | None]:
    """A run's configuration, and the weights to evaluate; None for its newest."""
    from dbrx_train.checkpoint.registry import is_reference, resolve

    if _is_config(source):
        return source, weights
    if not is_reference(source):
        if (source / "config.json").is_file() and not (source / "config.yaml").is_file():
            raise ValueError(
                f"{source}: is a Hugging Face folder, which names no held-out data; put --tasks to it, or "
                f"give a run's CONFIG with --weights {source}"
            )
        return source / "config.yaml", weights
    checkpoint = resolve(source)
    return checkpoint.parent.parent / "config.yaml", weights or checkpoint


def _is_config(source: Path) -> bool:
    return source.suffix in (".yaml", ".yml")


def _run_folder(config: Path, overrides: list[str] | None) -> Path:
    from dbrx_train.config import load

    return Path(load(config, overrides or []).folder)


@runs_app.command()
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


@runs_app.command()
def generate(
    checkpoint: Speaker,
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from standard input.")],
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Stop after this many tokens; default: 128, or what there is room for."),
    ] = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    chat: Annotated[bool, typer.Option("--chat", help="PROMPT is a user's turn: write the answer.")] = False,
    int8: Int8 = False,
) -> None:
    """Continue PROMPT with the model in CHECKPOINT."""
    from dbrx_train.evaluate.text import continue_text

    if prompt == "-":
        prompt = sys.stdin.read()
    pieces = continue_text(
        checkpoint,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        chat=chat,
        int8=int8,
        aside=aside,
    )
    print("" if chat else prompt, end="", flush=True)
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    finally:
        print()


@runs_app.command()
def chat(
    checkpoint: Speaker,
    system: Annotated[str | None, typer.Option(help="A system prompt, ahead of all that is said.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the longest answer.")] = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    int8: Int8 = False,
) -> None:
    """Talk to the model in CHECKPOINT: a line is a turn; /clear forgets, /exit or Ctrl-D ends."""
    from dbrx_train.evaluate.chat import talk

    talk(
        checkpoint,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        int8=int8,
        aside=aside,
    )
