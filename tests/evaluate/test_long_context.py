"""Questions after long texts: as long as asked for, the answer where it is said to be, scores by both."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from foundry import FOUNDRY, golden_model

from dbrx_train import cli
from dbrx_train.data.tokenizer import load_tokenizer
from dbrx_train.evaluate.alone import Asked, evaluate
from dbrx_train.evaluate.benchmark import Benchmark
from dbrx_train.evaluate.long_context import POSITIONS, key_value_pairs, read_hotpot, write_tasks
from dbrx_train.evaluate.long_table import by_position, position_table
from dbrx_train.evaluate.outcomes import Result
from dbrx_train.evaluate.tasks import read_tasks


@pytest.fixture(scope="module")
def hotpot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    entries = []
    for n in range(30):
        titles = [f"Town {n}", f"River {n}", *(f"Hill {n} {m}" for m in range(4))]
        context = [[title, [f"{title} is old. ", "It has a name of its own. " * 4]] for title in titles]
        context[0][1][0] = f"Town {n} lies on river {n}. "
        facts = [[titles[0], 0], [titles[1], 0], [titles[0], 1]]
        question = {"question": f"Where does town {n} lie?", "answer": f"river {n}"}
        entries.append({**question, "supporting_facts": facts, "context": context})
    path = tmp_path_factory.mktemp("hotpot") / "hotpot.json"
    path.write_text(json.dumps(entries))
    return path


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, hotpot: Path) -> Path:
    tokenizer = load_tokenizer()
    makers = {"key_value_pairs": key_value_pairs(tokenizer), "hotpotqa": read_hotpot(hotpot).maker(tokenizer)}
    return write_tasks(tmp_path_factory.mktemp("tasks"), makers, [512, 2048], 6)


def test_prompts_fill_their_length_and_are_never_cut(tasks: Path) -> None:
    benchmark = Benchmark(read_tasks(tasks), load_tokenizer(), max_seq_len=2048)
    assert len(benchmark.parts) == 2 * 2 * 3
    for part in benchmark.parts:
        (subset,) = part.subsets
        for prompt in subset.prompts(None):
            used = len(prompt.pairs[0][0]) + subset.max_new_tokens
            assert not prompt.truncated
            assert part.task.max_seq_len is not None
            assert part.task.max_seq_len - 140 <= used <= part.task.max_seq_len, part.name


@pytest.mark.parametrize("kind", ["key_value_pairs", "hotpotqa"])
@pytest.mark.parametrize("position", POSITIONS)
def test_the_answer_lies_in_its_third(tasks: Path, kind: str, position: str) -> None:
    third = POSITIONS.index(position)
    for line in (tasks.parent / f"{kind}_{position}_2048.jsonl").read_text().splitlines():
        row = json.loads(line)
        text = row["context"]
        number = row["answer"].split()[-1]
        at = text.index(f"Document: Town {number}\n" if kind == "hotpotqa" else row["answer"])
        assert third / 3 - 0.06 <= at / len(text) <= (third + 1) / 3 + 0.06
        assert row["answer_location"] == position


def test_tasks_are_the_same_each_time(tasks: Path, tmp_path: Path) -> None:
    makers = {"key_value_pairs": key_value_pairs(load_tokenizer())}
    write_tasks(tmp_path, makers, [512], 6)
    name = "key_value_pairs_last_512.jsonl"
    assert (tmp_path / name).read_bytes() == (tasks.parent / name).read_bytes()


def test_scores_are_shown_by_length_and_position(tmp_path: Path, tasks: Path) -> None:
    weights = tmp_path / "hf"
    golden_model().save_pretrained(weights)
    labels = [f"key_value_pairs_{position}_512" for position in POSITIONS]
    asked = Asked([str(tasks), *labels], limit=1, picture=tmp_path / "positions.png")
    shown = evaluate(weights, asked, print)
    block = shown[shown.index("key_value_pairs   ") :].splitlines()
    assert block[0].split() == ["key_value_pairs", "first", "middle", "last", "mean"]
    assert block[1].split() == ["512", "tokens", "0.000", "0.000", "0.000", "0.000"]
    assert (tmp_path / "positions.png").read_bytes()[:4] == b"\x89PNG"
    other = Asked([str(FOUNDRY / "tasks.yaml"), "capitals"], picture=tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"^--picture: is of tasks by length and position"):
        evaluate(weights, other, print)


def test_the_table_has_what_there_is() -> None:
    def result(score: float) -> Result:
        return Result("x", score, 1, 0.0, None, 0)

    grid = by_position(
        {
            "a_first_2048/0-shot": result(1.0),
            "a_last_2048/0-shot": result(0.5),
            "a_middle_32768/0-shot": result(0.25),
            "b_first_512/0-shot": result(0.125),
            "arc_easy/3-shot": result(1.0),
        }
    )
    lines = [line.split() for line in position_table(grid).splitlines()]
    assert lines[1:3] == [
        ["2,048", "tokens", "1.000", "0.500", "0.750"],
        ["32,768", "tokens", "0.250", "0.250"],
    ]
    assert lines[3][0] == "b"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--lengths", "64"], "--lengths: 64 tokens have no room for four keys"),
        (["--lengths", "512", "--examples", "0"], "--examples: must be at least 1, not 0"),
        (
            ["--lengths", "9999", "--examples", "1", "--hotpot", "HOTPOT"],
            "--lengths: all passages together have",
        ),
        (["--lengths", "512", "--hotpot", "OTHER"], "OTHER: is no file of HotpotQA"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path,
    hotpot: Path,
    options: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    other = tmp_path / "other.json"
    other.write_text('[{"question": "?"}]')
    names = {"HOTPOT": str(hotpot), "OTHER": str(other)}
    arguments = ["--out", str(tmp_path / "out"), *(names.get(each, each) for each in options)]
    monkeypatch.setattr(sys, "argv", ["dbrx-train", "data", "long-context", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert said.replace("OTHER", str(other)) in line
