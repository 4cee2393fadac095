"""The numbers that training produces are those on record, in ``records``, one file a run.

Short runs of ``dbrx-train train`` that between them use everything: of each, the loss of every step, and
hashes of the weights and the optimizer's state at the end. A change that is meant to alter numbers records
them anew, all or those of one run, and its diff shows which:

    python -m pytest tests/golden --renew-golden
    python -m pytest tests/golden --renew-golden -k lora

On a machine like that of a record (``machine``: processor, torch and C library) numbers are held to be equal
bit for bit. Elsewhere rounding may differ, though with what is pinned no difference is known: there losses
alone are compared, and may differ by a run's ``tolerance``.
"""

from __future__ import annotations

import json
import math
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from corpora import prepare_pairs, prepare_sources
from paths import HELPERS
from tiny_run import mlflow_run, saved_tensors
from warm import Warm

RECORDS = Path(__file__).with_name("records")
BAD_STEPS = str(HELPERS / "bad_step_ranks.py")
PINNED = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_NUM_THREADS": "1",
}
"""Instruction sets that torch's own kernels, MKL and oneDNN (which multiplies bfloat16) would choose by the
processor, and round by: without any one of these, an AVX-512 machine has other numbers than an AVX2 one.
MKL takes the same way on Intel and AMD in ``COMPATIBLE`` alone."""


@dataclass
class Golden:
    """A run: what differs from ``SMALL``, on how many ranks, and which run's end it begins from."""

    options: list[str]
    ranks: int = 1
    steps: int = 6
    sources: str = "web code"
    begin: str | None = None
    """The run whose weights it begins with."""
    resume: tuple[str, int] | None = None
    """The run that it goes on with, and after which step."""
    faults: list[dict[str, Any]] = field(default_factory=list)
    """Of ``bad_step_ranks.py``."""
    tolerance: float = 1e-6
    """Of losses on another machine. Not pinned, AVX-512 moves them by 2e-7, in bfloat16 by 8e-6; a learning
    rate of 1.0001e-2 in place of 1e-2 moves them by 2e-6 and more."""


SMALL = """
run_name: {name}
max_duration: {steps}ba
folder: {root}/{name}
model: {{d_model: 16, n_layers: 2, n_heads: 2, n_kv_heads: 1, ffn_hidden_size: 28, num_experts: 8, top_k: 2,
  max_seq_len: 64}}
data: {{seq_len: 16, num_workers: 0, sources: {{{sources}}}}}
optimization:
  global_batch_size: 4
  microbatch_size: 2
  optimizer: {{lr: 1.0e-2}}
  learning_rate: {{warmup: 2ba}}
checkpoints: {{interval: 1dur}}
logging: {{mlflow_uri: "sqlite:///{root}/mlruns.db", interval: 2ba, progress: false, peak_flops: 1.0e+12}}
evaluation: {{max_samples: 0}}
"""
RAMP = (
    "data.mix=[{at: 0tok, weights: {web: 0.9, code: 0.1}}, {at: 1ba, weights: {web: 0.9, code: 0.1}}, "
    "{at: 5ba, weights: {web: 0.2, code: 0.8}, interpolation: linear}, "
    "{at: 6ba, weights: {long-web: 0.5, long-code: 0.5}, seq_len: 32}]"
)
RUNS = {
    "one-process": Golden(
        [
            "data.mix=[{at: 0tok, weights: {web: 3, code: 1}}, {at: 0.75dur, weights: {web: 1, code: 3}}]",
            "model.router_jitter=0.1",
            "evaluation={interval: 4ba, batch_size: 2, max_samples: 4}",
        ],
        steps=8,
    ),
    "sharded": Golden(["checkpoints.interval=3ba", "parallelism.activation_checkpointing=full"], ranks=2),
    "experts-spread": Golden(
        [
            "parallelism.expert=2",
            "model.router_z_loss_weight=0.01",
            "model.output_z_loss_weight=0.001",
            "model.mask_documents=false",
        ],
        ranks=2,
    ),
    "replicated-and-sharded": Golden(
        ["parallelism={replicate: 2, shard: 2}", "optimization.global_batch_size=8"], ranks=4, steps=4
    ),
    "stages": Golden(
        [
            RAMP,
            "optimization.global_batch_size=8",
            "optimization.batch_size_warmup=[{until: 2ba, global_batch_size: 4}]",
            "optimization.learning_rate.schedule=linear",
            "model.norm=rmsnorm",
            "model.reset_positions=true",
            "model.expert_impl=loop",
        ],
        steps=8,
        sources="web code long-web long-code",
    ),
    "lora": Golden(["lora.rank=2"], begin="one-process"),
    "preferences": Golden(
        ["data.seq_len=64", "preferences.beta=0.5"], steps=3, begin="one-process", sources="pairs"
    ),
    "bias": Golden(
        [
            "model.loss_free_bias_rate=0.01",
            "optimization.balance_over=global_batch",
            "optimization.microbatch_size=1",
            "data.canonical_nodes=2",
        ],
        ranks=2,
    ),
    "bfloat16": Golden(["precision=amp_bf16"], tolerance=3e-5),
    "bad-steps": Golden(
        [
            "checkpoints.interval=2ba",
            "optimization.learning_rate.schedule=constant",
            "bad_steps={warmup: 3, rollback_after: 2}",
            "model.loss_free_bias_rate=0.01",
        ],
        steps=8,
        faults=[
            {"step": 1, "in": "gradient", "factor": "nan"},
            *({"step": step, "in": "loss", "factor": "1e4", "times": 1} for step in (5, 6)),
        ],
    ),
    "resumed-on-one": Golden([], resume=("sharded", 3)),
    "lion": Golden(
        [
            "optimization.optimizer={name: lionw, lr: 1.0e-3, router_lr_scale: 0.5, decay_embeddings: false}",
            "optimization.learning_rate={schedule: wsd, decay: 2ba}",
            "model.init_method=trunc_normal",
            "model.balance_loss=huggingface",
            "model.expert_impl=grouped",
        ],
    ),
}


class Runner:
    """Makes runs, each once: others begin from some."""

    def __init__(self, root: Path) -> None:
        prepare_sources(root, {"web": 0, "code": 1}, seq_len=16)
        prepare_sources(root, {"long-web": 10, "long-code": 11}, seq_len=32, documents=40)
        prepare_pairs(root)
        self.root, self.made = root, dict[str, Any]()
        (root / "warm").mkdir()
        self.warm = Warm(root / "warm", PINNED)

    def numbers(self, name: str) -> dict[str, Any]:
        """What a record holds of a run, but for the machine."""
        if name not in self.made:
            self._train(name, RUNS[name])
            self.made[name] = self._numbers(name, RUNS[name])
        return self.made[name]

    def _train(self, name: str, run: Golden) -> None:
        options, yaml = list(run.options), self.root / f"{name}.yaml"
        sources = ", ".join(f"{source}: {{local: {self.root}/{source}}}" for source in run.sources.split())
        yaml.write_text(SMALL.format(root=self.root, name=name, steps=run.steps, sources=sources))
        if run.begin is not None:
            self.numbers(run.begin)
            options.append(f"init_from.path={self.root / run.begin}")
        if run.resume is not None:
            of, step = run.resume
            self.numbers(of)
            kept = f"checkpoints/ba{step}"
            shutil.copytree(self.root / of / kept, self.root / name / kept)
        if run.faults:
            job = {"name": name, "faults": run.faults, "options": options, "favourite": None}
            program = {"program": BAD_STEPS, "arguments": [str(yaml), json.dumps([job])]}
            codes, said = self.warm.ranks(ranks=run.ranks, **program)
        else:
            codes, said = self.warm.ranks("train", str(yaml), *options, ranks=run.ranks)
        assert codes == [0] * run.ranks, f"golden run {name}: {codes}\n{said[-9000:]}"

    def _numbers(self, name: str, run: Golden) -> dict[str, Any]:
        client, found = mlflow_run(self.root, name)
        history = client.get_metric_history(found.info.run_id, "loss/train/total")
        losses = [[m.step, m.value] for m in sorted(history, key=lambda m: m.timestamp)]
        saved = saved_tensors(self.root / name / "checkpoints" / f"ba{run.steps}")
        hashes = {part: digest(saved, f"{part}.") for part in ("model", "optimizer")}
        return {"losses": losses, "hashes": hashes}


def digest(tensors: dict[str, torch.Tensor], part: str) -> str:
    """xxh3 over name, type, shape and bytes of those whose name begins with ``part``."""
    found = xxhash.xxh3_128()
    for name in sorted(name for name in tensors if name.startswith(part)):
        tensor = tensors[name].contiguous()
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def machine() -> dict[str, str]:
    """What rounding may depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    facts = dict(reversed([[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]))
    sets = [flag for flag in facts.get("flags", "").split() if flag.startswith(("avx", "amx", "fma", "f16c"))]
    return {
        "cpu": facts.get("model name", platform.processor()),
        "instructions": " ".join(sorted(sets)),
        "torch": torch.__version__,
        "libc": "-".join(platform.libc_ver()),
    }


def difference(found: dict[str, Any], record: dict[str, Any], tolerance: float) -> str | None:
    """How numbers differ from a record's; None if they do not."""
    here = found["machine"] == record["machine"]
    steps, kept_steps = ([step for step, _ in each["losses"]] for each in (found, record))
    if steps != kept_steps:
        return f"the steps are {steps}, and {kept_steps} on record"
    for (step, loss), (_, kept) in zip(found["losses"], record["losses"], strict=True):
        if not (loss == kept if here else math.isclose(loss, kept, rel_tol=tolerance)):
            return f"the loss of step {step} is {loss!r}, and {kept!r} on record"
    if here and found["hashes"] != record["hashes"]:
        parts = [part for part, value in found["hashes"].items() if value != record["hashes"].get(part)]
        return f"all losses are those on record, but not the final {' and '.join(parts)}"
    return None


def test_what_is_not_on_record_is_told() -> None:
    record = {
        "machine": {"cpu": "a"},
        "losses": [[0, 3.0], [1, 2.0]],
        "hashes": {"model": "1", "optimizer": "2"},
    }
    assert difference(record, record, 1e-6) is None
    nearly = {**record, "losses": [[0, 3.0], [1, math.nextafter(2.0, 3.0)]]}
    says = "the loss of step 1 is 2.0000000000000004, and 2.0 on record"
    assert difference(nearly, record, 1e-6) == says
    moved = {**record, "hashes": {"model": "1", "optimizer": "3"}}
    assert difference(moved, record, 1e-6) == "all losses are those on record, but not the final optimizer"
    elsewhere = {"machine": {"cpu": "b"}}
    assert difference({**nearly, **elsewhere}, record, 1e-6) is None
    assert difference({**moved, **elsewhere}, record, 1e-6) is None
    for wrong in (2.00001, math.nan):
        far = {**record, **elsewhere, "losses": [[0, 3.0], [1, wrong]]}
        assert difference(far, record, 1e-6) == f"the loss of step 1 is {wrong}, and 2.0 on record"
    short = {**record, **elsewhere, "losses": [[0, 3.0]]}
    assert difference(short, record, 1e-6) == "the steps are [0], and [0, 1] on record"


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    made = Runner(tmp_path_factory.mktemp("golden"))
    yield made
    made.warm.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_training_makes_the_numbers_on_record(
    name: str, runner: Runner, request: pytest.FixtureRequest
) -> None:
    found, path = {"machine": machine(), **runner.numbers(name)}, RECORDS / f"{name}.json"
    if request.config.getoption("--renew-golden"):
        path.write_text(json.dumps(found, indent=1) + "\n")
    renew = f"if that is meant: python -m pytest tests/golden --renew-golden -k {name}"
    assert path.exists(), f"golden run {name}: nothing is on record; {renew}"
    differs = difference(found, json.loads(path.read_text()), RUNS[name].tolerance)
    assert differs is None, f"golden run {name}: {differs}; {renew}"
