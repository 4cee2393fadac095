"""Does a curriculum help? Train configs/curriculum.yaml beside a control and compare held-out losses.

CORPORA_DIR has a folder for each source of the configuration, with .txt or .jsonl files. The arms are
``late``, the mix of the configuration, and ``constant``, the same samples in a constant mix. KEY=VALUE goes
to every run. Stopped, the same command goes on; finished runs are passed over.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from mlflow import MlflowClient

from dbrx_train.config import RunConfig, load

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "curriculum.yaml"
PASSAGE = 4000  # characters; so that a source of one file, too, has documents to hold out
HELD_OUT = 0.08  # of the passages


def dbrx_train(out: Path, *arguments: object) -> None:
    """The command line, run in ``out``, where the configuration's relative paths then lead."""
    command = [sys.executable, "-m", "dbrx_train", *map(str, arguments)]
    if code := subprocess.run(command, cwd=out).returncode:
        sys.exit(code)


def passages(folder: Path) -> Iterator[str]:
    """The texts of a source (a file, or the text fields of a JSON line), cut at ends of lines."""
    for path in sorted(folder.iterdir()):
        texts = [path.read_text(encoding="utf-8", errors="replace")]
        if path.suffix == ".jsonl":
            rows = map(json.loads, texts[0].splitlines())
            texts = ["".join(value for value in row.values() if isinstance(value, str)) for row in rows]
        for text in texts:
            held = ""
            for line in text.splitlines(keepends=True):
                held += line
                if len(held) >= PASSAGE:
                    yield held
                    held = ""
            if held.strip():
                yield held


def prepare(config: RunConfig, corpora: Path, out: Path) -> None:
    """Write the shards of each source that has none yet."""
    for name, source in config.data.sources.items():
        folder, text = out / source.local, out / "data" / "passages" / f"{name}.jsonl"
        if not (folder / "manifest.json").exists():
            text.parent.mkdir(parents=True, exist_ok=True)
            text.write_text("".join(json.dumps({"text": p}) + "\n" for p in passages(corpora / name)))
            options = ("--seq-len", config.data.seq_len, "--val-fraction", HELD_OUT)
            dbrx_train(out, "data", "prepare", text, "--out", folder, *options)


def arms(config: RunConfig) -> dict[str, list[str]]:
    """Arm -> overrides of the configuration."""
    mix = config.mix_schedule()
    samples = dict(zip(mix.sources, mix.totals(config.mix_ticks).tolist(), strict=True))
    return {"late": [], "constant": [f"data.mix={json.dumps([{'at': '0tok', 'weights': samples}])}"]}


def held_out_losses(out: Path, run_name: str, sources: list[str]) -> list[float]:
    """Each source's last held-out cross-entropy in a run, in nats per token."""
    client = MlflowClient(f"sqlite:///{out / 'mlruns.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    newest = client.search_runs(experiments, f"run_name = '{run_name}'", order_by=["start_time DESC"])[0]
    return [newest.data.metrics[f"metrics/eval/{name}/cross_entropy"] for name in sources]


def report(sources: list[str], losses: dict[str, list[list[float]]], out: Path) -> None:
    """Print mean ± standard deviation over the seeds, of each arm and of the differences within a seed."""
    pairs = zip(losses["late"], losses["constant"], strict=True)
    rows = losses | {"late - constant": [[x - y for x, y in zip(a, b, strict=True)] for a, b in pairs]}
    print(f"\n| held-out loss | {' | '.join(sources)} |\n|{'---|' * (len(sources) + 1)}")
    for row, values in rows.items():
        columns = list(zip(*values, strict=True))
        spreads = [statistics.stdev(c) if len(c) > 1 else math.nan for c in columns]
        cells = (f"{statistics.mean(c):.3f} ± {s:.3f}" for c, s in zip(columns, spreads, strict=True))
        print(f"| {row} | {' | '.join(cells)} |")
    seeds = {row: [dict(zip(sources, one, strict=True)) for one in values] for row, values in rows.items()}
    (out / "curriculum.json").write_text(json.dumps(seeds, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpora", type=Path, metavar="CORPORA_DIR", help="folder of the sources' folders")
    parser.add_argument("--out", type=Path, required=True, help="folder for shards, runs and results")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm (default: 3)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for every run; with its own --out")
    given = parser.parse_intermixed_args()
    config, out = load(CONFIG, given.overrides), given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    prepare(config, given.corpora.resolve(), out)
    variants, sources = arms(config), list(config.data.sources)
    losses: dict[str, list[list[float]]] = {arm: [] for arm in variants}
    for arm, overrides in variants.items():
        for seed in range(1, given.seeds + 1):
            name = f"{arm}-{seed}"
            seeds = (f"run_name={name}", f"seed={seed}", f"data.shuffle_seed={seed}")
            dbrx_train(out, "train", CONFIG, *seeds, *given.overrides, *overrides)
            losses[arm].append(held_out_losses(out, name, sources))
    report(sources, losses, out)


if __name__ == "__main__":
    main()
