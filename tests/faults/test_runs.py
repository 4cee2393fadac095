"""Whatever happens to a run, the same command goes on, and ends with the weights of a run left alone."""

from __future__ import annotations

import itertools
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from tiny_run import saved_tensors
from warm import STEPS, Runs, equal, flip, truncate

from dbrx_train.checkpoint import folder as folders

TENSORS, MANIFEST = "__0_0.distcp", folders.MANIFEST


def committed(root: Path) -> int:
    """The newest step whose manifest is written, be it that its folder has not got its name yet."""
    return max(int(path.parent.name.removesuffix(".partial")[2:]) for path in root.glob(f"ba*/{MANIFEST}"))


@pytest.mark.slow
def test_killed_at_every_operation_on_checkpoints_nothing_saved_is_lost(runs: Runs) -> None:
    """One process after the other goes on, and is killed at the next operation of loading, saving or pruning.

    Every second one saves asynchronously: the operations are the same, on another thread.
    """
    root, in_turn = runs.checkpoints("killed"), itertools.cycle(["false", "true"])

    def go_on(**fault: Any) -> tuple[int, str]:
        return runs("killed", f"checkpoints.asynchronous={next(in_turn)}", **fault)

    # Killed before anything is kept, and when it has two
    assert go_on(kind="kill", at=f"write checkpoints/ba#.partial/{TENSORS}")[0] == -signal.SIGKILL
    assert folders.newest(root, pytest.fail) is None
    assert go_on(kind="kill", at=f"remove checkpoints/ba#/{MANIFEST}")[0] == -signal.SIGKILL
    assert committed(root) == 2

    shutil.copytree(runs.folder("killed"), runs.folder("traced"))
    out = runs.folder("killed") / "operations"
    assert runs("traced", kind="trace", out=str(out))[0] == 0
    operations = [
        line
        for line in dict.fromkeys(out.read_text().splitlines())
        # Of leases, tests/test_lease.py says what a kill leaves
        if ("checkpoints" in line and "probe" not in line)
        or (line.startswith("remove") and ".lease" not in line)
    ]
    assert sum(line.startswith("read checkpoints/ba#/") for line in operations) == 3, "loading"
    assert sum("ba#.partial" in line for line in operations) == 9, "saving"
    assert sum(line.startswith(("remove", "rmtree", "rmdir")) for line in operations) == 6, "pruning"
    faults: list[dict[str, Any]] = [{"kind": "kill", "at": at} for at in operations]
    for name, size in ((TENSORS, 40_000), (".metadata.tmp", 1000), (f"{MANIFEST}.partial", 1000)):
        faults.append({"kind": "torn", "at": f"write checkpoints/ba#.partial/{name}", "bytes": size})
    at = 2
    for fault in faults:
        code, said = go_on(**fault)
        assert code == -(signal.SIGXFSZ if fault["kind"] == "torn" else signal.SIGKILL), (fault, said)
        assert f"goes on from {root}/ba{at}," in said or "goes on" not in said, (fault, said)
        before, at = at, committed(root)
        assert at in (before, before + 1), fault
    assert 5 <= at < STEPS
    code, said = go_on()
    assert code == 0
    assert f"goes on from {root}/ba{at}," in said
    assert [path.name for path in root.iterdir()] == [f"ba{STEPS}"]
    assert equal(runs.final("killed"), runs.final("whole"))


@pytest.mark.slow
def test_damaged_checkpoints_are_named_and_passed_over_for_the_newest_good_one(runs: Runs) -> None:
    options = ["checkpoints.keep=7"]
    assert runs("damaged", *options)[0] == 0
    harms = list(itertools.product((flip, truncate), (TENSORS, ".metadata", MANIFEST)))
    for step, (harm, name) in enumerate(harms, STEPS - len(harms) + 1):
        harm(runs.checkpoints("damaged") / f"ba{step}" / name)
    code, said = runs("damaged", *options)
    assert code == 0, said
    lines = said.splitlines()
    for step, (harm, name) in enumerate(harms, STEPS - len(harms) + 1):
        (line,) = (each for each in lines if each.startswith("passed over") and f"/ba{step}" in each)
        assert name in line
        if name != MANIFEST:
            assert ("is damaged" if harm is flip else "bytes, not") in line
    assert f"goes on from {runs.checkpoints('damaged')}/ba{STEPS - len(harms)}," in said
    assert equal(runs.final("damaged"), runs.final("whole"))
    newest = folders.newest(runs.checkpoints("damaged"), pytest.fail)
    assert newest is not None
    assert newest.step == STEPS


@pytest.mark.slow
def test_a_killed_worker_of_the_loader_ends_the_run_which_goes_on(runs: Runs) -> None:
    options = ["data.num_workers=1"]
    after = str(runs.checkpoints("worker") / "ba2")
    code, said = runs("worker", *options, kind="worker", after=after)
    assert code == 1, said
    assert "DataLoader worker" in said
    code, said = runs("worker", *options)
    assert code == 0
    assert "goes on from" in said
    assert equal(runs.final("worker"), runs.final("whole"))


@pytest.mark.slow
def test_one_rank_of_two_killed_amid_a_save_ends_both_and_nothing_is_lost(runs: Runs) -> None:
    def both(name: str, **job: Any) -> tuple[list[int], str]:
        options = ["max_duration=4ba", "checkpoints.keep=2"]
        return runs.warm.ranks(*runs.command(name, *options), ranks=2, **job)

    codes, said = both("two")
    assert codes == [0, 0], said
    at = "write checkpoints/ba#.partial/__1_0.distcp"
    fault = {"kind": "kill", "rank": 1, "root": str(runs.folder("one-of-two")), "at": at}
    codes, said = both("one-of-two", faults=[fault])
    assert codes == [1, -signal.SIGKILL], said
    codes, said = both("one-of-two")
    assert codes == [0, 0], said
    end, whole = (saved_tensors(runs.checkpoints(name) / "ba4") for name in ("one-of-two", "two"))
    assert equal(end, whole)
    # What one rank finds damaged, both pass over.
    flip(runs.checkpoints("two") / "ba4" / "__1_0.distcp")
    codes, said = both("two")
    assert codes == [0, 0], said
    assert f"passed over {runs.checkpoints('two')}/ba4/__1_0.distcp: is damaged" in said
    assert f"goes on from {runs.checkpoints('two')}/ba3," in said
    assert equal(saved_tensors(runs.checkpoints("two") / "ba4"), whole)


@pytest.mark.slow
def test_a_clock_that_jumps_changes_nothing(runs: Runs) -> None:
    if not runs.warm.has_clock:
        pytest.skip("needs a C compiler")
    jumps = [-7200, 3 * 86400, -30 * 86400, 3600]
    saving = "mkdir checkpoints/ba#.partial"
    code, said = runs(
        "clock",
        "checkpoints.keep=2",
        "checkpoints.keep_every=4ba",
        "data.cache_limit=100000",
        kind="clock",
        at=saving,
        seconds=jumps,
    )
    assert code == 0, said
    kept = {path.name for path in runs.checkpoints("clock").iterdir()}
    assert kept == {"ba4", "ba8", "ba12", f"ba{STEPS - 1}", f"ba{STEPS}"}
    assert equal(runs.final("clock"), runs.final("whole"))


@pytest.mark.slow
def test_a_mark_says_what_made_it(runs: Runs, workplace: Path) -> None:
    made = folders.read(runs.checkpoints("whole") / f"ba{STEPS}").metadata["made_by"]
    assert made["mesh"] == {"replicate": 1, "shard": 1, "expert": 1, "innermost": "expert"}
    assert made["versions"]["torch"] == torch.__version__.split("+")[0]
    for name, digest in made["data"].items():
        assert digest == xxhash.xxh3_128_hexdigest((workplace / name / "manifest.json").read_bytes())
    code, said = runs.warm("checkpoint", "verify", str(runs.folder("whole")))
    assert code == 0, said
    assert (
        f"whole, step {STEPS}, {STEPS * 4 * 32:,} tokens; on 1 x 1 ranks, experts over 1; dbrx-train" in said
    )
    assert f"configuration {made['config'][:12]}, web {made['data']['web'][:12]}" in said
