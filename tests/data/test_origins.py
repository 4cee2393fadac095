"""From a sample back to the documents that it is made of."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dbrx_train.data import origins
from dbrx_train.data.inspect import BOUNDARY, inspect
from dbrx_train.data.mds import read_shard
from dbrx_train.data.origins import Origin, OriginLog, read_origins
from dbrx_train.data.prepare import sources
from dbrx_train.data.prepare.conversations import ChatFormat
from dbrx_train.data.prepare.pipeline import Summary, prepare
from dbrx_train.data.tokenizer import load_tokenizer

SEQ = 64


def story(number: int) -> str:
    pick = random.Random(number)
    return f"Story {number}. " + " ".join(pick.choices(["cat", "dog", "sat", "ran"], k=number % 120))


def write_corpus(folder: Path) -> dict[str, str]:
    """Every kind of file; returns each document by its place."""
    folder.mkdir()
    texts = [story(i) for i in range(200)]
    line = [json.dumps({"text": text}) for text in texts]
    (folder / "a.txt").write_text(texts[0])
    (folder / "b.jsonl").write_text("\n".join(["", *line[1:100]]))
    (folder / "c.json").write_text(json.dumps([{"text": text} for text in texts[100:140]]))
    pq.write_table(pa.table({"text": texts[140:200]}), folder / "d.parquet", row_group_size=7)
    found = {f"{folder}/a.txt": texts[0]}
    found |= {f"{folder}/b.jsonl:{i + 1}": texts[i] for i in range(1, 100)}
    found |= {f"{folder}/c.json[{i - 100}]": texts[i] for i in range(100, 140)}
    return found | {f"{folder}/d.parquet:{i - 139}": texts[i] for i in range(140, 200)}


def run(folder: Path, out: Path, processes: int = 1, chat: ChatFormat | None = None) -> Summary:
    files = [str(folder), str(folder / "*.json")]
    return prepare(files, str(out), seq_len=SEQ, val_fraction=0.2, processes=processes, chat=chat)


def samples(folder: Path) -> list[tuple[list[int], list[tuple[int, Origin]]]]:
    """Each sample's tokens and its documents."""
    found = []
    before: dict[Path, int] = {}
    for shard in json.loads((folder / "index.json").read_text())["shards"]:
        part = (folder / shard["raw_data"]["basename"]).parent
        for tokens in read_shard(folder, shard):
            begin = before.get(part, 0)
            documents = read_origins(part, begin, begin + SEQ)
            assert documents is not None
            found.append((tokens.tolist(), documents))
            before[part] = begin + SEQ
    return found


def test_every_token_of_a_sample_is_its_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MIN_PART_BYTES", 3000)
    tokenizer, texts = load_tokenizer(), write_corpus(tmp_path / "in")
    summary = run(tmp_path / "in", tmp_path / "out")
    assert summary.parts > 8
    seen = set()
    for split in ("train", "val"):
        for tokens, documents in samples(tmp_path / "out" / split):
            begins = [begin for begin, _ in documents]
            assert begins[0] == 0
            for (begin, origin), end in zip(documents, [*begins[1:], SEQ], strict=True):
                seen.add(origin())
                whole = [*tokenizer.encode(texts[origin()]), tokenizer.eos_id]
                part = tokens[begin:end]
                if end < SEQ:
                    assert part == whole[-len(part) :], "all of it, or the end of one begun before"
                else:
                    assert any(part == whole[i : i + len(part)] for i in range(len(whole)))
    assert len(seen) > 190, "all but the few tokens that fill no sample"


def test_a_sample_of_conversations_names_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MIN_PART_BYTES", 2000)
    folder = tmp_path / "in"
    folder.mkdir()
    rows = [{"prompt": f"Question {i}?", "response": "yes " * (i % 30 + 1)} for i in range(150)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:100]))
    (folder / "b.json").write_text(json.dumps(rows[100:]))
    summary = run(folder, tmp_path / "out", chat=ChatFormat())
    assert summary.parts > 3
    tokenizer, places = load_tokenizer(), list[str]()
    for split in ("train", "val"):
        for tokens, documents in samples(tmp_path / "out" / split):
            parts = np.split(np.array(tokens), [begin for begin, _ in documents])[1:]
            for part, (_, origin) in zip(parts, documents, strict=True):
                asked = re.findall(r"user\nQuestion (\d+)\?", tokenizer.decode(part.tolist()))
                line, place = int(asked[0]), origin()
                assert len(asked) == 1
                wanted = f"a.jsonl:{line + 1}" if line < 100 else f"b.json[{line - 100}]"
                assert place == f"{folder}/{wanted}"
                places.append(place)
    assert len(set(places)) == len(places) == 150


def test_inspect_says_from_which_documents_a_sample_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MIN_PART_BYTES", 3000)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": story(i)}) + "\n" for i in range(100)))
    prepare([str(path)], str(tmp_path / "out"), seq_len=SEQ, val_fraction=0, processes=1)
    for sample in (0, 20):
        shown = inspect(tmp_path / "out", sample=sample)
        named = re.findall(rf"from token ([\d,]+): {path}:(\d+)\n", shown)
        # As many documents end as lie between two places
        assert shown.count(BOUNDARY) in (len(named) - 1, len(named))
        for number in re.findall(r"Story (\d+)\. ", shown):
            assert str(int(number) + 1) in [line for _, line in named]
    origins._count_lines.cache_clear()
    path.unlink()  # a line in the middle of the file can no longer be counted
    assert f"from token 0: {path}:1\n" in inspect(tmp_path / "out", sample=0)
    assert re.search(
        rf"from token 0: {path}, line \d+ after byte \d+\n", inspect(tmp_path / "out", sample=20)
    )
    files = sorted((tmp_path / "out").rglob("documents.npz"))
    files[0].write_bytes(files[0].read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"documents\.npz: damaged \(.*\); prepare the data again") as caught:
        inspect(tmp_path / "out", sample=0)
    assert "\n" not in str(caught.value)
    files[0].unlink()
    assert "from which documents is not known" in inspect(tmp_path / "out", sample=0)


def test_a_few_documents_more_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' * 64)
    prepare([str(path)], str(tmp_path / "out"), seq_len=SEQ, val_fraction=0, processes=1)
    assert "… and 12 more" in inspect(tmp_path / "out", sample=0)


def test_documents_of_what_is_left_over_are_handed_on(tmp_path: Path) -> None:
    log, places = OriginLog(), [Origin("a", "jsonl", 0, i) for i in range(4)]
    for token, place in zip((0, 5, 9, 14), places, strict=True):
        log.add(token, place)
    assert log.since(8) == [(0, places[1]), (1, places[2]), (6, places[3])]
    assert log.since(9) == [(0, places[2]), (5, places[3])]
    log.write(tmp_path, 10)
    assert read_origins(tmp_path, 5, 10) == [(0, places[1]), (4, places[2])]
    assert read_origins(tmp_path, 6, 9) == [(0, places[1])]
    assert read_origins(tmp_path, 0, 99) == list(zip((0, 5, 9), places[:3], strict=True))


def test_documents_are_called_what_their_rows_call_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MIN_PART_BYTES", 3000)
    rows = [{"text": f"{story(i)} {i}", "id": f"n{i}", "origin": f"book {i % 3}"} for i in range(120)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:60]))
    pq.write_table(pa.Table.from_pylist(rows[60:]), tmp_path / "b.parquet", row_group_size=7)
    prepare([str(tmp_path)], str(tmp_path / "out"), seq_len=SEQ, val_fraction=0, processes=1)
    named = set[int]()
    for sample in range(0, 60, 4):
        shown = inspect(tmp_path / "out", sample=sample)
        for place, number, book in re.findall(r": (\S+) \(id n(\d+), origin book (\d)\)\n", shown):
            i = int(number)
            assert int(book) == i % 3
            assert place == (f"{tmp_path}/a.jsonl:{i + 1}" if i < 60 else f"{tmp_path}/b.parquet:{i - 59}")
            named.add(i)
    assert min(named) < 60 <= max(named)
