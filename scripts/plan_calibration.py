"""The plan's step time held against published runs: python scripts/plan_calibration.py FILE.csv...

Files are of the form of docs/data/measured_dense.csv: dense MPT models (an FFN of two matrices of 4 d, full
attention heads, 50,368 words, tied embedding) under FSDP. Prints predicted beside measured, and last a line
`rows N, median X %, worst Y %` of the errors' sizes.

--fit prints the constants that these rows ask for; --cross-validate the errors on rows left out of the fit.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dbrx_train.plan.collectives import Collective
from dbrx_train.plan.hardware import GPU, gpu
from dbrx_train.plan.step_time import (
    CALIBRATED,
    Architecture,
    Calibration,
    compute,
    optimizer_seconds,
    retries,
    with_overlap,
)

VISIBLE = Path(__file__).parent.parent / "docs" / "data" / "measured_dense.csv"
VOCABULARY, MACHINE = 50_368, 8
COLUMNS = ("model", "d_model", "n_layers", "n_heads", "params", "seq_len", "gpus", "gpu", "precision")
COLUMNS += ("microbatch", "grad_accum", "sharding", "activation_checkpointing", "tokens_per_s_per_gpu")
GATHERS = {"FULL_SHARD": 2, "SHARD_GRAD_OP": 1}


@dataclass(frozen=True)
class Row:
    """One published run."""

    model: str
    table: str
    """Of the publication: the GPU and its network."""
    gpu: GPU
    gpus: int
    architecture: Architecture
    params: int
    seq_len: int
    microbatch: int
    accumulated: int
    gathers: int
    checkpointing: bool
    measured: float
    """Tokens/s of a GPU."""

    @classmethod
    def of(cls, row: dict[str, str]) -> Row:
        """Raises ValueError for what is missing or not modelled."""
        if missing := [name for name in COLUMNS if not row.get(name)]:
            raise ValueError(f"no {missing[0]}")
        if row["precision"] not in ("amp_bf16", "bf16"):
            raise ValueError(f"precision: {row['precision']!r} is not modelled; bf16 is")
        if row["sharding"] not in GATHERS:
            raise ValueError(f"sharding: {row['sharding']!r} is not one of {', '.join(GATHERS)}")
        if row.get("activation_cpu_offload", "").lower() == "true":
            raise ValueError("activation_cpu_offload: is not modelled")
        d = int(row["d_model"])
        return cls(
            model=row["model"],
            table=row.get("network") or row["gpu"],
            gpu=gpu(row["gpu"]),
            gpus=int(row["gpus"]),
            architecture=Architecture(
                d_model=d,
                n_layers=int(row["n_layers"]),
                query_width=d,
                kv_width=d,
                ffn_hidden_size=4 * d,
                ffn_matrices=2,
                num_experts=1,
                top_k=1,
                vocab_size=VOCABULARY,
                stream_bytes=2,
                rotary=False,
            ),
            params=int(row["params"]),
            seq_len=int(row["seq_len"]),
            microbatch=int(row["microbatch"]),
            accumulated=int(row["grad_accum"]),
            gathers=GATHERS[row["sharding"]],
            checkpointing=row["activation_checkpointing"].lower() == "true",
            measured=float(row["tokens_per_s_per_gpu"]),
        )

    @property
    def tokens(self) -> int:
        """Of a microbatch on a GPU."""
        return self.microbatch * self.seq_len

    def held(self) -> float:
        """Bytes that a GPU's tensors take at the most: states, activations in bfloat16, logits."""
        d, layers = self.architecture.d_model, self.architecture.n_layers
        a_block = self.params / layers
        kept = (2 * layers + 24 if self.checkpointing else 24 * layers) * d * self.tokens
        logits = 6 * VOCABULARY * self.tokens
        gathered = 6 * a_block + 4 * VOCABULARY * d
        return 16 * self.params / self.gpus + kept + logits + gathered

    def predicted(self, constants: Calibration = CALIBRATED, gpus: dict[str, GPU] | None = None) -> float:
        """Tokens/s of a GPU."""
        card = (gpus or {}).get(self.gpu.name, self.gpu)
        computing = compute(
            self.architecture,
            card,
            tokens=self.tokens,
            seq_len=self.seq_len,
            activation_checkpointing="full" if self.checkpointing else "none",
            old_kernels=True,
            constants=constants,
        ).total
        # FSDP1 gathers and scatters in bfloat16 (mixed precision PURE).
        size, ring = 2 * self.params, (self.gpus - 1) / self.gpus
        calls = self.architecture.n_layers + 1
        communicating = sum(
            Collective(kind, "dense", size * ring * times, self.gpus, 1, calls * times)
            .way(card, MACHINE, constants=constants)
            .seconds
            for kind, times in (("gathered", self.gathers), ("scattered", 1))
        )
        microbatch = with_overlap(computing, communicating, constants.overlap)
        step = self.accumulated * microbatch
        step += optimizer_seconds(self.params / self.gpus, card, constants)
        return self.accumulated * self.tokens / (step * retries(self.held(), card, constants))


def read(paths: Iterable[str | Path]) -> list[Row]:
    """The rows of all files; those that are not modelled are named on stderr and left out."""
    rows = []
    for path in paths:
        with open(path, newline="", encoding="utf-8") as file:
            for number, row in enumerate(csv.DictReader(file), 2):
                try:
                    rows.append(Row.of(row))
                except ValueError as error:
                    print(f"{path}, line {number}: left out: {error}", file=sys.stderr)
    return rows


def errors(rows: Sequence[Row], predict: Callable[[Row], float] = Row.predicted) -> list[float]:
    """Of predicted against measured, signed shares."""
    return [predict(row) / row.measured - 1 for row in rows]


def summary(found: Sequence[float]) -> str:
    sizes = [abs(error) for error in found]
    return f"rows {len(sizes)}, median {statistics.median(sizes):.1%}, worst {max(sizes):.1%}".replace(
        "%", " %"
    )


# What is fitted, and between which bounds it is physical.
SHARED = {"passes": (1, 4), "overlap": (1, 5), "hop": (1e-6, 1e-5), "retries": (1, 1.5)}
OWN = {"products": (0.4, 0.86), "attention_2023": (0.1, 0.8)}


def fit(rows: Sequence[Row]) -> tuple[Calibration, dict[str, GPU]]:
    """The constants of least squares of log errors; large errors count linearly."""
    from scipy.optimize import least_squares

    names = sorted({row.gpu.name for row in rows})
    start = [getattr(CALIBRATED, each) for each in SHARED]
    start += [getattr(gpu(name), each) for name in names for each in OWN]
    bounds = [*SHARED.values(), *(bound for _ in names for bound in OWN.values())]

    def constants(logs: Sequence[float]) -> tuple[Calibration, dict[str, GPU]]:
        values = [value * math.exp(log) for value, log in zip(start, logs, strict=True)]
        shared = replace(CALIBRATED, **dict(zip(SHARED, values[: len(SHARED)], strict=True)))
        own = iter(values[len(SHARED) :])
        return shared, {name: replace(gpu(name), **{each: next(own) for each in OWN}) for name in names}

    def residuals(logs: Sequence[float]) -> list[float]:
        shared, own = constants(logs)
        return [math.log(row.predicted(shared, own) / row.measured) for row in rows]

    logs = [
        [math.log(limit / value) for limit, value in zip(side, start, strict=True)]
        for side in zip(*bounds, strict=True)
    ]
    middle = [(low + high) / 2 for low, high in zip(*logs, strict=True)]
    return constants(least_squares(residuals, middle, bounds=logs, loss="soft_l1", f_scale=0.05).x)


def cross_validated(rows: Sequence[Row], group: Callable[[Row], str]) -> list[float]:
    """Errors on each group's rows by the constants of the other groups' rows."""
    found = []
    for name in sorted({group(row) for row in rows}):
        shared, own = fit([row for row in rows if group(row) != name])
        left_out = [row for row in rows if group(row) == name and row.gpu.name in own]
        found += errors(left_out, lambda row, shared=shared, own=own: row.predicted(shared, own))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("files", nargs="*", default=[VISIBLE], metavar="FILE.csv")
    parser.add_argument("--fit", action="store_true", help="fit the constants to these rows")
    parser.add_argument("--cross-validate", action="store_true", help="leave out models, and tables, in turn")
    given = parser.parse_args()
    try:
        rows = read(given.files)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        parser.error(str(error))
    if not rows:
        parser.error(f"{', '.join(map(str, given.files))}: no row that is modelled")
    if given.fit:
        shared, own = fit(rows)
        print(*(f"{name} = {getattr(shared, name):.4g}" for name in SHARED), sep="\n")
        print(*(f"{n}.{name} = {getattr(own[n], name):.4g}" for n in own for name in OWN), sep="\n")
        print("fitted:", summary(errors(rows, lambda row: row.predicted(shared, own))))
    if given.cross_validate:
        print("models left out:", summary(cross_validated(rows, lambda row: row.model)))
        print("tables left out:", summary(cross_validated(rows, lambda row: row.table)))
    for row, error in zip(rows, errors(rows), strict=True):
        batch = f"{row.microbatch} x {row.seq_len} tokens"
        print(
            f"{row.model:9} {row.gpus:4} x {row.gpu.name:9} {batch:17} "
            f"{row.measured:9,.0f} measured {row.predicted():9,.0f} predicted {error:+6.1%}"
        )
    print(summary(errors(rows)))


if __name__ == "__main__":
    main()
