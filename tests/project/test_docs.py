"""The documents say what the code does."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from corpora import write_corpus
from paths import ROOT
from tiny_run import mlflow_run, run_yaml

sys.path.insert(0, str(ROOT / "scripts"))


def test_configuration_docs_are_those_of_the_dataclasses() -> None:
    import configuration_docs

    written = configuration_docs.TARGET.read_text(encoding="utf-8")
    assert written == configuration_docs.render(), "run: python scripts/configuration_docs.py"


def test_the_table_of_meshes_is_that_of_the_configurations() -> None:
    import parallelism_docs

    written = parallelism_docs.TARGET.read_text(encoding="utf-8")
    assert written == parallelism_docs.renewed(), "run: python scripts/parallelism_docs.py"


def test_the_steps_of_the_docs_are_those_of_the_dataclasses() -> None:
    import curate_docs

    written = curate_docs.TARGET.read_text(encoding="utf-8")
    assert written == curate_docs.renewed(), "run: python scripts/curate_docs.py"


def test_messages_and_interruptions_are_those_of_the_code() -> None:
    import messages

    written = messages.TARGET.read_text(encoding="utf-8")
    assert written == messages.render(), "run: python scripts/messages.py"


def test_the_list_of_messages_has_every_kind() -> None:
    import messages

    listed = dict.fromkeys(messages.messages())
    for known in (
        ("lease.py", "{folder}: is in use by {found}; wait for it, or stop it"),
        ("config/run.py", "{key}: must be longer than nothing"),
        ("config/unreached.py", "profile.at: is at {at} tokens, and the run ends before; nothing is traced"),
        ("kinds.py", "{name}: is missing; it {metadata}"),
        ("train/exports.py", "checkpoints.export: {out} could not be written ({error})"),
        ("train/run.py", "no picture of the run, or its last figures"),
    ):
        assert known in listed


def test_the_plans_of_the_docs_are_those_of_the_configurations() -> None:
    import planning_docs

    written = planning_docs.TARGET.read_text(encoding="utf-8")
    assert written == planning_docs.renewed(), "run: python scripts/planning_docs.py"


def test_links_between_the_documents_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            if not target.startswith(("http://", "https://")):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_fault_is_proved_by_a_test_that_exists() -> None:
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("|")]
    _, _, *faults = rows[rows.index("| fault | what happens | what is lost | proved by |") :]
    assert len(faults) > 15
    for row in faults:
        proofs = re.findall(r"`(test_\w+)`", row.split("|")[-2])
        assert proofs, row
        for name in proofs:
            assert f"\ndef {name}(" in tests, name


@pytest.mark.slow
def test_the_custom_trainer_of_the_docs_runs_without_composer(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "custom-trainer.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)[0]
    assert len(code.splitlines()) < 40
    code += "\nimport sys\nassert not {'composer', 'streaming', 'mlflow'} & set(sys.modules)\n"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    losses = [float(x) for x in re.findall(r"loss ([0-9.]+)", done.stdout)]
    assert losses[-1] < losses[0] - 1


@pytest.mark.slow
def test_the_data_mix_of_the_docs_is_read_in_ones_own_loop(tmp_path: Path) -> None:
    from dbrx_train.data.prepare.pipeline import prepare

    for seed, name in enumerate(("prose", "code")):
        text = write_corpus(tmp_path / "text" / name, seed, documents=150)
        prepare(
            [str(text)], str(tmp_path / "data/quickstart" / name), seq_len=512, processes=1, progress=False
        )
    page = (ROOT / "docs" / "custom-trainer.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)[1]
    code += "\nimport json\njson.dumps(state)\nprint(batch['input_ids'].shape, len(batch['source']))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "torch.Size([8, 512]) 8", done.stderr


@pytest.mark.slow
def test_a_callback_and_a_logger_of_the_docs_run_beside_a_runs_own(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs" / "custom-trainer.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)[2]
    loggers: list[Any] = []
    code = code.replace("InMemoryLogger()]", "loggers.append(it := InMemoryLogger()) or it]")
    path = run_yaml(workplace, tmp_path, "own")
    options = ["max_duration=2ba", "evaluation.max_samples=0", "data.mix=[]"]
    monkeypatch.setattr(sys, "argv", ["mine.py", str(path), *options])
    exec(code, {"__name__": "__main__", "loggers": loggers})
    assert {"data/longest_document", "loss/train/total"} <= set(loggers[0].data)
    _, found = mlflow_run(workplace, "own")
    assert 1 <= found.data.metrics["data/longest_document"] <= 32


@pytest.mark.parametrize("command", [0, 1])
def test_the_readme_opens_with_two_commands(command: int) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", readme, flags=re.DOTALL)
    assert len(blocks[command].strip().splitlines()) == 1
    assert "pip install" in blocks[command]
