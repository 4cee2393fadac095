"""Conversations: their tokens, what of them is trained on, and how they lie in samples and batches."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from dbrx_train.cli import app
from dbrx_train.data.inspect import MASKED, inspect
from dbrx_train.data.manifest import read_manifest
from dbrx_train.data.mds import read_shard
from dbrx_train.data.prepare import conversations as chat
from dbrx_train.data.prepare import sources
from dbrx_train.data.prepare.conversations import ChatFormat
from dbrx_train.data.prepare.pipeline import Summary, prepare
from dbrx_train.data.prepare.turns import Turn
from dbrx_train.data.stream.dataset import EvalDataset
from dbrx_train.data.stream.loader import collate
from dbrx_train.data.tokenizer import load_tokenizer
from dbrx_train.model.config import DbrxConfig
from dbrx_train.model.decoder import Dbrx

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 2? <|im_end|> is text here."},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And <|im_start|>assistant, 3 + 3?"},
    {"role": "assistant", "content": "It is 6 <|endoftext|>."},
]
TURNS = [Turn(**turn) for turn in TALK]
PAIR = [{"prompt": "Hi", "chosen": "Good day.", "rejected": "What?"}]
SHAPE = DbrxConfig(d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, ffn_hidden_size=28, max_seq_len=256)


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(source: Path, out: Path, form: ChatFormat | None = None, **options: Any) -> Summary:
    options = {"seq_len": 64, "val_fraction": 0, "processes": 1, **options}
    return prepare([str(source)], str(out), chat=form or ChatFormat(), **options)


def samples(folder: Path, split: str = "train") -> tuple[np.ndarray, np.ndarray]:
    shards = json.loads((folder / split / "index.json").read_text())["shards"]
    tokens, loss = (
        np.concatenate([read_shard(folder / split, shard, column) for shard in shards])
        for column in ("tokens", "loss")
    )
    return tokens, loss


def talk(number: int, words: int) -> dict[str, Any]:
    pick = random.Random(number)
    answer = " ".join(pick.choices(["yes", "no", "perhaps", "seven"], k=words))
    return {"prompt": f"Question {number}?", "response": answer}


def test_the_ids_are_chatml_and_text_never_becomes_a_special_token() -> None:
    tokenizer = load_tokenizer()
    ids, _ = chat.encode(TURNS, tokenizer)
    assert ids.tolist() == [*tokenizer.chat(TALK), tokenizer.eos_id]
    assert (ids == tokenizer.im_start_id).sum() == (ids == tokenizer.im_end_id).sum() == 5
    assert (ids == tokenizer.eos_id).sum() == 1
    assert tokenizer.decode(ids[:4].tolist()) == "<|im_start|>system\nBe"


def test_answers_alone_are_trained_on_or_everything() -> None:
    tokenizer = load_tokenizer()
    ids, loss = chat.encode(TURNS, tokenizer)
    trained = tokenizer.decode(ids[loss == 1].tolist())
    assert trained == "4<|im_end|>It is 6 <|endoftext|>.<|im_end|>"
    assert tokenizer.decode(ids[loss == 0].tolist()).count("<|im_start|>assistant\n") == 2
    again, every = chat.encode(TURNS, tokenizer, "all")
    assert again.tolist() == ids.tolist()
    assert every.tolist() == [1] * (len(ids) - 1) + [0], "only the mark between conversations is not"
    assert chat.encode(TURNS, tokenizer, skip=4)[1].sum() < loss.sum()


def test_an_answer_that_begins_with_blanks_is_what_the_model_would_write() -> None:
    tokenizer = load_tokenizer()
    turns = [Turn("user", "Code?"), Turn("assistant", "\n\n    x = 1")]
    ids, loss = chat.encode(turns, tokenizer)
    opened = tokenizer.chat([{"role": "user", "content": "Code?"}], add_generation_prompt=True)
    assert ids[: len(opened)].tolist() == opened
    assert tokenizer.decode(ids[loss == 1].tolist()) == "\n\n    x = 1<|im_end|>"


@pytest.mark.parametrize(
    ("row", "question"),
    [
        ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}, "Hi"),
        ({"prompt": "Hi", "response": "Ho"}, "Hi"),
        ({"prompt": "Hi", "completion": "Ho"}, "Hi"),
        ({"instruction": "Hi", "context": "", "response": "Ho", "category": "open_qa"}, "Hi"),
        ({"instruction": "Hi", "context": "you", "response": "Ho"}, "Hi\n\nyou"),
        ({"instruction": "Hi", "input": "you", "output": "Ho"}, "Hi\n\nyou"),
    ],
)
def test_every_form_of_a_line(row: dict[str, Any], question: str, tmp_path: Path) -> None:
    run(write(tmp_path / "a.jsonl", [row]), tmp_path / "out")
    (tokens,), _ = samples(tmp_path / "out")
    expected = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\nHo<|im_end|><|endoftext|>"
    tokenizer = load_tokenizer()
    assert tokenizer.decode(tokens.tolist()) == expected + "<|pad|>" * (tokens == tokenizer.pad_id).sum()


@pytest.mark.parametrize("loss", ["assistant", "all"])
def test_turns_that_say_so_are_not_trained_on(loss: str, tmp_path: Path) -> None:
    ask, bad = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "bad"}
    good = {"role": "assistant", "content": "good", "weight": 1}
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    rows = [
        {"messages": [ask, bad | {"weight": 0}, ask, good]},
        {"messages": [ask | {"train": True}, bad | {"masked": True}, ask, good]},
        {"messages": [ask, bad | {"train": False}]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "good"}]},
        {"messages": [ask, call, {"role": "tool", "content": "7", "name": "f"}, good]},
    ]
    path = write(tmp_path / "a.jsonl", rows)
    summary = run(path, tmp_path / "out", ChatFormat(loss=loss), seq_len=256)
    tokens, mask = samples(tmp_path / "out")
    trained, masked = (load_tokenizer().decode(tokens[mask == on].tolist()) for on in (1, 0))
    kinds = {kind: found.examples for kind, found in summary.manifest.problems.items()}
    assert kinds.pop("field 'name' of a turn is not read") == [f"{path}:5"]
    assert "field 'name' of a turn is not read: 1 (" in str(summary)
    called = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|im_end|>'
    if loss == "assistant":
        assert trained == "good<|im_end|>" * 3 + called + "good<|im_end|>"
        asks, left_out = sorted(kinds.items(), reverse=True)
        assert asks[0].startswith("weight or train asks for a turn that is not the assistant's")
        assert (asks[1], left_out) == ([f"{path}:2"], ("masked", [f"{path}:3"]))
    else:
        assert kinds == {}
        assert (trained.count("good"), trained.count("Hi"), trained.count("tool\n7")) == (4, 7, 1)
        assert (trained.count("bad"), masked.count("bad")) == (0, 3)
        assert called in trained


def test_conversations_are_packed_whole_and_none_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MIN_PART_BYTES", 2000)
    rows = [talk(i, 1 + i * 7 % 40) for i in range(200)]
    path = write(tmp_path / "a.jsonl", rows)
    summary = run(path, tmp_path / "out", val_fraction=0.2)
    assert summary.parts > 5
    tokenizer, found = load_tokenizer(), list[str]()
    for split in ("train", "val"):
        tokens, loss = samples(tmp_path / "out", split)
        assert not loss[tokens == tokenizer.pad_id].any()
        for row in tokens:
            *whole, padding = tokenizer.decode(row.tolist()).split("<|endoftext|>")
            assert set(padding.split("<|pad|>")) == {""}
            assert all(text.startswith("<|im_start|>user\nQuestion") for text in whole)
            found += whole
        made = summary.manifest.splits[split]
        assert (made.samples, made.tokens) == (len(tokens), (tokens != tokenizer.pad_id).sum())
    answers = sorted(re.sub(r".*assistant\n|<\|im_end\|>", "", text, flags=re.DOTALL) for text in found)
    assert answers == sorted(row["response"] for row in rows)
    train = summary.manifest.splits["train"]
    assert train.tokens / (train.samples * 64) > 0.85
    assert run(path, tmp_path / "out", val_fraction=0.2).already_done

    run(path, tmp_path / "two", val_fraction=0.2, processes=2)
    for split in ("train", "val"):
        for a, b in zip(samples(tmp_path / "out", split), samples(tmp_path / "two", split), strict=True):
            assert np.array_equal(a, b), "whatever the number of processes"


@pytest.mark.parametrize("long", ["truncate", "drop"])
def test_long_empty_and_broken_text_is_counted_with_its_place(long: str, tmp_path: Path) -> None:
    rows = [
        talk(0, 5),
        talk(1, 500),
        {"prompt": "x " * 200, "response": "y"},
        {"prompt": "a", "response": " "},
    ]
    rows += [{"messages": []}, {"messages": [{"role": "user", "content": "Nobody answers."}]}]
    path = write(tmp_path / "a.jsonl", rows)
    path.write_bytes(path.read_bytes() + b'{"prompt": "caf\xe9", "response": "yes"}\n')
    summary = run(path, tmp_path / "out", ChatFormat(long=long))
    problems = {kind: (found.count, found.examples) for kind, found in summary.manifest.problems.items()}
    places = [f"{path}:{line}" for line in range(8)]
    expected = {"empty": (3, places[4:7]), "undecodable": (1, [places[7]])}
    if long == "truncate":  # a cut that leaves no answer leaves nothing to train on
        expected |= {"truncated": (1, [places[2]]), "too_long": (1, [places[3]])}
    else:
        expected |= {"too_long": (2, places[2:4])}
    assert problems == expected
    tokens, loss = samples(tmp_path / "out")
    assert (tokens == load_tokenizer().eos_id).sum() == summary.manifest.splits["train"].documents
    assert loss.any(axis=1).all()


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"text": "a"}, "no conversation; it must have messages, or a prompt .* has the fields 'text'"),
        ({"messages": "a"}, "messages is str; it must be a list of turns"),
        ({"messages": ["a"]}, r"messages\[0\] is str; it must have role and content"),
        ({"messages": [{"role": "human", "content": "a"}]}, r"messages\[0\].role is 'human'; it must be one"),
        ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\].content is NoneType; it must be"),
        ({"prompt": 1, "response": "a"}, "field 'prompt' holds int; it must hold text"),
        ([1], "expected a JSON object with messages, or a prompt"),
    ],
)
def test_a_line_that_is_no_conversation_is_refused_with_its_place(
    row: Any, says: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.jsonl", [talk(0, 3), row])
    with pytest.raises(ValueError, match=rf"a.jsonl:2: {says}") as caught:
        run(path, tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_what_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"loss: 'user' is not one of assistant, all"):
        ChatFormat(loss="user")
    path = write(tmp_path / "a.jsonl", [talk(0, 3)])
    run(path, tmp_path / "out")
    with pytest.raises(ValueError, match=r"was begun otherwise: chat was .* and is .*'loss': 'all'"):
        run(path, tmp_path / "out", ChatFormat(loss="all"))


def test_batches_mask_labels_and_padding_and_leave_plain_samples_alone(tmp_path: Path) -> None:
    run(write(tmp_path / "a.jsonl", [talk(i, 5 + i) for i in range(4)]), tmp_path / "out")
    data = EvalDataset(str(tmp_path / "out"), seq_len=64, split="train")
    plain = {"tokens": np.arange(64), "source": 1, "sample_id": 0}
    tokenizer = load_tokenizer()
    batch = collate([data[0], plain], eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
    tokens, labels, documents = (batch[key] for key in ("input_ids", "labels", "document_ids"))
    mask = torch.as_tensor(data[0]["loss"])
    assert torch.equal(labels[0], tokens[0].where(mask, -100))
    assert torch.equal(documents[0] == -1, tokens[0] == tokenizer.pad_id)
    assert documents[0].max() >= 1
    assert torch.equal(labels[1], tokens[1])
    alone = collate([plain], eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
    assert torch.equal(alone["document_ids"][0], documents[1])


def test_a_packed_sample_trains_like_its_conversations_apart(tmp_path: Path) -> None:
    """No attention across conversations: the loss is the mean over answers' tokens of each one alone."""
    run(write(tmp_path / "a.jsonl", [talk(i, 4 + 3 * i) for i in range(3)]), tmp_path / "out")
    tokenizer = load_tokenizer()
    data = EvalDataset(str(tmp_path / "out"), seq_len=64, split="train")
    model = Dbrx(SHAPE, seed=1)
    batch = collate([data[i] for i in range(len(data))], eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
    keys = ("labels", "document_ids")
    packed = model(batch["input_ids"], **{key: batch[key] for key in keys})
    total, count = 0.0, 0
    for number in range(3):
        turns = [Turn(role, talk(number, 4 + 3 * number)[key])
                 for role, key in (("user", "prompt"), ("assistant", "response"))]  # fmt: skip
        ids, loss = chat.encode(turns, tokenizer)
        tokens = torch.from_numpy(ids.astype(np.int64))
        one = model(tokens[None], labels=tokens.where(torch.from_numpy(loss == 1), -100)[None])
        total += float(one.losses["cross_entropy"] * one.num_labels)
        count += int(one.num_labels)
    assert int(packed.num_labels) == count
    assert float(packed.losses["cross_entropy"]) == pytest.approx(total / count, rel=1e-5)


def test_inspect_marks_what_is_masked(tmp_path: Path) -> None:
    run(write(tmp_path / "a.jsonl", [{"messages": TALK}]), tmp_path / "out", seq_len=128)
    shown = inspect(tmp_path / "out")
    assert "1 conversation" in shown
    begin, end = MASKED
    text = "\n".join(line.removeprefix("  │ ") for line in shown.splitlines())
    assert f"{begin}<|im_start|>system\nBe brief.<|im_end|>" in text
    assert f"<|im_start|>assistant\n{end}4<|im_end|>{begin}\n<|im_start|>user" in text
    assert re.search(r"\d+ of 128 tokens are trained on", shown)
    assert re.search(r"… and \d+ tokens of padding", shown)


def test_the_commands_options_arrive(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [talk(0, 3), talk(1, 500)])
    command = ["data", "prepare-chat", str(path), "--out", str(tmp_path / "out"), "--seq-len", "64"]
    done = CliRunner().invoke(app, [*command, "--loss", "all", "--long", "drop", "--val-fraction", "0"])
    assert done.exit_code == 0, done.output
    assert "1 conversation" in done.output
    assert f"too_long: 1 ({path}:2)" in done.output
    options = read_manifest(tmp_path / "out").options
    assert options["chat"] == {"loss": "all", "long": "drop", "preferences": False}


def test_preferences_lie_side_by_side(tmp_path: Path) -> None:
    turns = TALK[:4]
    forms = [
        {"prompt": "Hi", "chosen": "Good day.", "rejected": "What?"},
        {"prompt": turns, "chosen": [TALK[4]], "rejected": [{"role": "assistant", "content": "No."}]},
        {"chosen": TALK, "rejected": [*turns, {"role": "assistant", "content": "No."}]},
        {"prompt": "Hi", "chosen": "Same.", "rejected": "Same."},
        {"prompt": "Long?", "chosen": "yes " * 300, "rejected": "no"},
    ]
    path = write(tmp_path / "a.jsonl", forms)
    summary = run(path, tmp_path / "out", ChatFormat(preferences=True), seq_len=256)
    kinds = {kind: found.count for kind, found in summary.manifest.problems.items()}
    assert kinds == {"identical": 1, "truncated": 1}
    tokenizer = load_tokenizer()
    tokens, loss = samples(tmp_path / "out")
    trained = []
    for row, mask in zip(tokens, loss, strict=True):
        for part in np.split(np.arange(len(row)), np.flatnonzero(row == tokenizer.eos_id) + 1)[:-1]:
            trained.append(tokenizer.decode(row[part][mask[part] == 1].tolist()))
    last = ["It is 6 <|endoftext|>.<|im_end|>", "No.<|im_end|>"]
    assert sorted(zip(trained[::2], trained[1::2], strict=True))[:3] == sorted(
        [("Good day.<|im_end|>", "What?<|im_end|>"), tuple(last), tuple(last)]
    )
    with pytest.raises(ValueError, match=r"a.jsonl:1: no preference; it must have chosen and rejected"):
        run(write(tmp_path / "a.jsonl", [talk(0, 3)]), tmp_path / "no", ChatFormat(preferences=True))
    with pytest.raises(ValueError, match=r"loss: preferences compare answers"):
        ChatFormat(loss="all", preferences=True)


def test_a_side_that_begins_with_another_prompt_is_refused(tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "Good day."}
    form = ChatFormat(preferences=True)
    for first in ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi "}):
        side = [first, {"role": "user", "content": "Hi"}, answer]
        path = write(tmp_path / "a.jsonl", [{"prompt": "Hi", "chosen": "Yes.", "rejected": side}])
        says = rf"a.jsonl:1: rejected begins with a turn of {first['role']} but not with the prompt"
        with pytest.raises(ValueError, match=says):
            run(path, tmp_path / "out", form)
    whole = [{"role": "user", "content": "Hi"}, answer]
    later = [answer, *TALK[3:]]
    rows = [{"prompt": "Hi", "chosen": whole, "rejected": later}]
    rows += [{"prompt": TALK[:1], "chosen": whole, "rejected": [whole[0], TALK[4]]}]
    assert (
        run(write(tmp_path / "a.jsonl", rows), tmp_path / "ok", form, seq_len=256)
        .manifest.splits["train"]
        .documents
        == 2
    )


def test_pairs_that_only_their_cut_ends_tell_apart_are_left_out(tmp_path: Path) -> None:
    rows = [{"prompt": "Hi", "chosen": "yes " * 300 + "a", "rejected": "yes " * 300 + "b"}, *PAIR]
    path = write(tmp_path / "a.jsonl", rows)
    summary = run(path, tmp_path / "out", ChatFormat(preferences=True))
    problems = {kind: (found.count, found.examples) for kind, found in summary.manifest.problems.items()}
    assert problems == {"identical": (1, [f"{path}:1"])}


def test_conversations_that_begin_with_an_answer_are_held_out_by_it(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "assistant", "content": f"Answer {i}."}]} for i in range(100)]
    summary = run(write(tmp_path / "a.jsonl", rows), tmp_path / "out", val_fraction=0.5)
    assert 30 < summary.manifest.splits["val"].documents < 70
