"""Experiments: ``train`` their runs, or ``draw`` from the curves that are in the repository.

    python scripts/experiments train experiments/flops.yaml --budget cpu --work WORK
    python scripts/experiments draw

The corpus is made first, where it is not there. Stopped, the same command goes on; several at once share the
work. ``--until`` leaves out longer runs.
"""

from __future__ import annotations

import argparse
import signal
import sys
from dataclasses import replace
from pathlib import Path

import corpus
import page
import results
import spec
import training

EXPERIMENTS = page.ROOT / "experiments"


def curves(experiment: spec.Experiment, budget: str) -> Path:
    return EXPERIMENTS / "curves" / f"{experiment.name}-{budget}.csv"


def train(path: Path, budget: str, work: Path, until: int | None) -> None:
    """All runs of a budget, then the curves; raises ValueError for an experiment or budget that is none."""
    experiment = spec.read(path)
    chosen = experiment.budgets.get(budget)
    if chosen is None:
        raise ValueError(f"{path}: has no budget {budget}; must be one of {', '.join(experiment.budgets)}")
    data = work / f"corpus-{chosen.corpus['ranks']}-{chosen.corpus['seq_len']}"
    if not (data / "docs_heldout" / "manifest.json").is_file():  # the last of it
        corpus.make(data, **chosen.corpus)
    if until is not None:
        chosen = replace(chosen, steps=[steps for steps in chosen.steps if steps <= until])
    shop = training.Workshop(work / "runs", data)
    try:
        training.train_all(experiment, chosen, shop)
    finally:
        results.write(
            curves(experiment, budget), results.collect(experiment, experiment.budgets[budget], shop)
        )


def draw() -> None:
    """Every experiment's figures and tables."""
    text = page.PAGE.read_text(encoding="utf-8")
    for path in sorted(EXPERIMENTS.glob("*.yaml")):
        experiment = spec.read(path)
        for budget in experiment.budgets:
            file = curves(experiment, budget)
            rows = results.load(file) if file.is_file() else []
            text = page.renewed(text, f"{experiment.name} {budget}", page.parts(experiment, budget, rows))
            if any(row.part == "final" for row in rows):
                page.draw(experiment, budget, rows, page.picture(experiment, budget))
    page.PAGE.write_text(text, encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="experiments"
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    training_verb = verbs.add_parser("train", help="train an experiment's runs and keep their curves")
    training_verb.add_argument("experiment", type=Path, help="its YAML")
    training_verb.add_argument("--budget", required=True, help="one of its budgets: cpu or gpu")
    training_verb.add_argument("--work", type=Path, required=True, help="folder for the corpus and the runs")
    training_verb.add_argument("--until", type=int, metavar="STEPS", help="train no runs longer than this")
    verbs.add_parser("draw", help="draw figures and tables into docs/experiments.md; trains nothing")
    given = parser.parse_args(arguments)
    try:
        if given.verb == "draw":
            draw()
        else:
            train(given.experiment, given.budget, given.work, given.until)
    except ValueError as error:
        print(f"experiments: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"experiments: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
