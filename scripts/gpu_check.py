"""The checks that need a GPU, in three parts: bash scripts/gpu_check.sh devices | train | speed

- devices: the numbers of a CPU on the GPU, and over NCCL on one rank, sharded, offloaded and recomputed.
- train: the README's run whole, through Composer, MDS shards and MLflow; begun, and gone on with.
- speed: DBRX's layer, the loss and a model of dbrx-9b's shape beside peers; a profile; memory.

Each writes ``gpu_PART.json`` into ``$OUT`` after every step, so that what was found stays when a later step
fails or time runs out, and exits with 1 if a step failed. Each step has a limit, and a part ends within
``--seconds``.

``--on-cpu`` tries all this without a GPU: the same steps with what is said in ``Step.on_cpu`` in the place of
what needs one. Its files say ``stubbed``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OUT = Path(os.environ.get("OUT", "."))
PYTHON = sys.executable
RUN = [PYTHON, "-m", "dbrx_train"]
TESTS = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "-m"]
BENCH = [PYTHON, "scripts/bench.py", "--rounds", "3", "--trained", "10", "--heats", "1", "--routing", "real"]
LAYER = ["ours", "ours, grouped_gemm", "transformers", "megablocks grouped", "scattermoe"]
MODEL = ["ours", "ours, packed", "ours, full", "transformers sdpa"]


@dataclass(frozen=True)
class Step:
    """A command of a part."""

    name: str
    command: list[str]
    seconds: int
    """At most; what is left of the part, if that is less."""
    on_cpu: list[str] | None = None
    """What is run instead where there is no GPU; None: the same."""
    json: str | None = None
    """The file that it writes, which becomes part of the result."""


def parts(work: Path) -> dict[str, list[Step]]:
    out = str(work)
    quickstart = [*RUN, "train", "configs/quickstart.yaml", f"folder={out}/run"]
    quickstart += [f"data.sources.{name}.local={out}/data/{name}" for name in ("prose", "code")]
    quickstart += [f"logging.mlflow_uri=sqlite:///{out}/mlruns.db", "precision=amp_bf16", "device=gpu"]
    short = ["device=cpu", "evaluation.max_samples=2", "model.d_model=32", "model.n_layers=1"]
    short += ["model.n_heads=2", "model.n_kv_heads=1", "model.ffn_hidden_size=56", "data.seq_len=512"]
    small = ["--shapes", "fine-grained", "--dtypes", "bfloat16"]
    on_gpu = ["--dtypes", "bfloat16"]

    def bench(task: str, shape: str, contestants: list[str], seconds: int) -> Step:
        file = f"{out}/{task}.json"
        common = [*BENCH, "--tasks", task, "--json", file]
        command = [*common, *on_gpu, "--shapes", shape, "--contestants", *contestants]
        return Step(task, command, seconds, [*common, *small, "--contestants", contestants[0]], file)

    def trained(tokens: int) -> list[str]:
        return [*quickstart, f"max_duration={tokens}tok"]

    tests = ["tests/model/test_devices.py", "tests/model/test_documents.py"]
    meshes, profile = "tests/parallel/test_meshes.py", f"{out}/profile.json"
    no_gpu = [PYTHON, "-c", "print('needs a GPU')"]
    return {
        "devices": [
            Step("devices", [*TESTS, "gpu", *tests], 120, [*TESTS, "not gpu", tests[1]]),
            Step("meshes", [*TESTS, "gpu", meshes], 120, [*TESTS, "not gpu and not slow", meshes]),
        ],
        "train": [
            Step("corpus", [*RUN, "data", "quickstart", "--out", f"{out}/data"], 90),
            Step("begun", trained(170_000), 110, [*trained(20_480), *short]),
            Step("gone on with", trained(340_000), 110, [*trained(40_960), *short]),
        ],
        "speed": [
            bench("layer", "dbrx-layer", LAYER, 80),
            bench("loss", "dbrx-layer", ["ours", "transformers", "liger"], 45),
            bench("step", "dbrx-9b, 6 layers", MODEL, 110),
            Step("profile", [PYTHON, "scripts/gpu_profile.py", profile], 45, json=profile),
            Step("memory", [PYTHON, "scripts/activation_memory.py"], 60, no_gpu),
        ],
    }


def run(step: Step, command: list[str], seconds: float) -> dict[str, Any]:
    """What came of it; a step that lasts too long is ended with all that it started."""
    begin = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        said, _ = process.communicate(timeout=seconds)
        code: int | str | None = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, code = process.communicate()[0], "timed out"
    found = {"name": step.name, "code": code, "seconds": round(time.monotonic() - begin, 1)}
    found |= {"command": command, "said": said.splitlines()[-60:]}
    if step.json is not None and Path(step.json).exists():
        found["found"] = json.loads(Path(step.json).read_text(encoding="utf-8"))
    return found


def machine() -> dict[str, Any]:
    import torch

    found = {"torch": torch.__version__, "python": platform.python_version(), "cuda": torch.version.cuda}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["memory"] = torch.cuda.get_device_properties(0).total_memory
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    work = OUT.absolute() / "gpu_check"
    parser.add_argument("part", choices=list(parts(work)))
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--on-cpu", action="store_true")
    args = parser.parse_args()
    about = machine()
    if "gpu" not in about and not args.on_cpu:
        print("no CUDA GPU; --on-cpu tries the steps without one", file=sys.stderr)
        return 1
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    target, end = OUT / f"gpu_{args.part}.json", time.monotonic() + args.seconds
    result: dict[str, Any] = {"part": args.part, "stubbed": args.on_cpu, "machine": about, "steps": []}
    for step in parts(work)[args.part]:
        command = step.on_cpu if args.on_cpu and step.on_cpu else step.command
        left = end - time.monotonic()
        if left < 5:
            found = {"name": step.name, "code": "no time left"}
        else:
            found = run(step, command, min(left, step.seconds))
        result["steps"].append(found)
        target.write_text(json.dumps(result, indent=1), encoding="utf-8")
        print(f"{step.name}: {found['code']}", *found.get("said", [])[-12:], sep="\n  ", flush=True)
    shutil.rmtree(work, ignore_errors=True)
    return int(any(step["code"] != 0 for step in result["steps"]))


if __name__ == "__main__":
    sys.exit(main())
