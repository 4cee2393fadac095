"""Every way out, at every moment: one line on the screen and an exit code (docs/troubleshooting.md)."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from moments import CLOSES, COLD, ENDED, INT, NAMES, OTHERS, RESUMING, TERM, TRAIN, TRAINING, Moment
from paths import HELPERS
from warm import Runs

QUICK = ("max_duration=3ba",)


def check(moment: Moment, number: int, code: int, got: int, said: str) -> None:
    """One line, the last, says that it was interrupted, and nothing says how."""
    about = f"{moment.command}, {moment.name}, {NAMES[number]}: {got}\n{said[-3000:]}"
    assert got == code, about
    assert "Traceback" not in said, about
    assert "Exception ignored" not in said, about
    pattern = re.escape(moment.line.replace("NAME", NAMES[number]))
    pattern = pattern.replace("…", ".*").replace(r"\[", "[").replace(r"\]", "]")
    lines = said.strip().splitlines()
    assert re.fullmatch(pattern, lines[-1]), about
    ways_out = [line for line in lines if re.search(r"interrupted|^stopped \(|and it ends", line)]
    assert len(ways_out) == 1, about


def fault(moment: Moment, number: int) -> dict[str, object]:
    return {"kind": "call", "of": moment.call, "signal": int(number), **moment.more}


@pytest.mark.slow
def test_interrupted_amid_an_import_it_says_so_in_a_line(runs: Runs) -> None:
    for moment in COLD:
        for number, code in zip(moment.signals, moment.codes, strict=True):
            command = [HELPERS / "moments.py", moment.call, str(int(number)), *runs.command("cold", *QUICK)]
            done = subprocess.run(
                [sys.executable, *command], capture_output=True, text=True, timeout=100, check=False
            )
            check(moment, number, code, done.returncode, done.stdout + done.stderr)


@pytest.mark.slow
def test_interrupted_at_every_moment_of_training_it_says_so_in_a_line(runs: Runs) -> None:
    for moment in TRAINING:
        for number, code in zip(moment.signals, moment.codes, strict=True):
            shutil.rmtree(runs.folder("moment"), ignore_errors=True)
            command = runs.command("moment", *QUICK, *moment.options)
            check(moment, number, code, *runs.warm(*command, faults=[fault(moment, number)]))
    shutil.rmtree(runs.folder("moment"), ignore_errors=True)
    assert runs("moment", *QUICK)[0] == 0
    command = runs.command("moment", "max_duration=4ba")
    check(RESUMING, INT, 130, *runs.warm(*command, faults=[fault(RESUMING, INT)]))


@pytest.mark.slow
def test_interrupted_once_all_is_saved_it_ends_as_it_would(runs: Runs) -> None:
    for moment in ENDED:
        ((number, code),) = zip(moment.signals, moment.codes, strict=True)
        shutil.rmtree(runs.folder("ended"), ignore_errors=True)
        got, said = runs.warm(*runs.command("ended", "max_duration=1ba"), faults=[fault(moment, number)])
        order = sorted(said.splitlines(), key=lambda line: line.startswith("dbrx-train:"))
        check(moment, number, code, got, "\n".join(order))  # what is said of the run may come after
        assert (runs.checkpoints("ended") / "ba1").exists()


@pytest.mark.slow
def test_interrupted_at_a_moment_of_any_other_command_it_says_so_in_a_line(
    runs: Runs, workplace: Path, tmp_path: Path
) -> None:
    whole, yaml = str(runs.folder("whole")), str(runs.yaml)
    for moment in OTHERS:
        for number, code in zip(moment.signals, moment.codes, strict=True):
            out = tmp_path / f"{moment.command}-{moment.name}-{number}".replace(" ", "-")
            arguments = {
                "data prepare": [str(workplace / "text" / "web"), "--out", str(out), "--seq-len", "32"],
                "data inspect": [str(workplace / "web")],
                "data mix": [yaml, "--picture", str(out)],
                "generate": [whole, "the model", "--max-new-tokens", "8"],
                "eval": [yaml, "evaluation.max_samples=2", "--weights", whole],
                "report": [whole],
                "checkpoint export": [whole, "--out", str(out)],
                "checkpoint consolidate": [whole, "--out", str(out)],
                "checkpoint verify": [whole],
            }[moment.command]
            command = [*moment.command.split(), *arguments]
            check(moment, number, code, *runs.warm(*command, faults=[fault(moment, number)]))
            if moment.command == "data prepare":
                assert runs.warm(*command)[0] == 0
            else:
                assert not out.exists()
                assert not [*tmp_path.glob("*.partial")]


@pytest.mark.slow
def test_what_fails_while_a_run_ends_is_a_line_and_its_exit_code_stays(runs: Runs) -> None:
    def close(name: str, *faults: dict[str, object], options: tuple[str, ...] = ()) -> tuple[int, list[str]]:
        shutil.rmtree(runs.folder("closes"), ignore_errors=True)
        command = runs.command("closes", "max_duration=1ba", *options)
        code, said = runs.warm(*command, faults=[{"kind": "call", **each} for each in faults])
        assert "Traceback" not in said, (name, said)
        return code, said.splitlines()

    for name, (of, line) in CLOSES.items():
        options = ("checkpoints.export.interval=1ba",) if name == "an export fails" else ()
        code, said = close(name, {"of": of}, options=options)
        assert code == 0, (name, said)
        found = [each for each in said if "what a test raises" in each]
        assert len(found) == 1, (name, said)
        assert re.fullmatch(re.escape(line).replace("…", ".*"), found[0]), name
    closing = {"of": CLOSES["MLflow's run cannot be closed"][0]}
    code, said = close("a mistake", {"of": f"{TRAIN}run:_record", "mistake": True}, closing)
    assert code == 2
    assert "dbrx-train: what a test raises" in said
    # A store that takes no run has none to end
    code, said = close("no run", {"of": "composer.loggers:MLFlowLogger.init", "mistake": True})
    assert code == 2
    assert said[-1] == "dbrx-train: what a test raises"
    code, said = close("a stop", {"of": f"{TRAIN}run:_record", "signal": int(TERM)}, closing)
    assert code == 75
    assert said[-1].startswith("stopped (SIGTERM); the same command goes on from the beginning")
