from __future__ import annotations

import errno
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstd

from dbrx_train.cli.data import data_prepare
from dbrx_train.data import mds
from dbrx_train.data.inspect import BOUNDARY, inspect
from dbrx_train.data.manifest import check_dataset, read_manifest
from dbrx_train.data.prepare import long_lines, pipeline, records, sources, workers
from dbrx_train.data.prepare.long_lines import string_chunks
from dbrx_train.data.prepare.pipeline import Summary, prepare
from dbrx_train.data.tokenizer import load_tokenizer

SEQ = 32
EOS = 100257
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "looked", "away"]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a few kilobytes, so that a small corpus has many."""
    monkeypatch.setattr(sources, "MIN_PART_BYTES", 4000)


def story(number: int, words: int = 60) -> str:
    pick = random.Random(number)
    return f"Story {number}.\n" + " ".join(pick.choices(WORDS, k=words))


def write_jsonl(path: Path, texts: Sequence[str], **fields: Any) -> Path:
    path.write_text("".join(json.dumps({"id": i, "text": t, **fields}) + "\n" for i, t in enumerate(texts)))
    return path


def corpus(folder: Path) -> list[str]:
    """Every kind of input; returns the documents in the order in which they are read."""
    (folder / "sub" / ".hidden").mkdir(parents=True)
    (folder / "sub" / ".hidden" / "no.txt").write_text("not to be read")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    texts = [story(i, 10 + i % 90) for i in range(240)]
    (folder / "a.txt").write_text(texts[0])
    write_jsonl(folder / "b.jsonl", texts[1:100])
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in texts[100:140]]
    (folder / "c.jsonl.gz").write_bytes(
        gzip.compress(b"".join(lines[:20])) + gzip.compress(b"".join(lines[20:]))
    )
    (folder / "d.jsonl.zst").write_bytes(zstd.compress(b"".join(json_line(t) for t in texts[140:160])))
    table = pa.table({"text": texts[160:220], "n": list(range(60))})
    pq.write_table(table, folder / "e.parquet", row_group_size=7)
    for i in range(220, 240):
        (folder / "sub" / f"{i}.md").write_text(texts[i])
    return texts


def json_line(text: str) -> bytes:
    return json.dumps({"text": text}).encode() + b"\n"


def tokens_of(folder: Path, split: str = "train") -> list[int]:
    shards = json.loads((folder / split / "index.json").read_text())["shards"]
    return [int(t) for shard in shards for t in mds.read_shard(folder / split, shard).ravel()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def run(source: Path | str, out: Path, **options: Any) -> Summary:
    return prepare([str(source)], str(out), **{"seq_len": SEQ, "val_fraction": 0, "processes": 1, **options})


def test_one_document_is_its_tokens_and_an_end(tmp_path: Path) -> None:
    text = story(1) + "<|endoftext|> is only text\r\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    summary = run(tmp_path / "a.txt", tmp_path / "out")
    expected = [*load_tokenizer().encode(text), EOS]
    split = summary.manifest.splits["train"]
    assert (split.documents, split.tokens) == (1, len(expected))
    assert split.samples == len(expected) // SEQ
    assert split.dropped_tokens == len(expected) % SEQ
    assert split.text_bytes == len(text.encode())
    assert tokens_of(tmp_path / "out") == expected[: split.samples * SEQ]


def test_nothing_is_lost_from_any_kind_of_input(tmp_path: Path) -> None:
    texts = corpus(tmp_path / "in")
    summary = run(tmp_path / "in", tmp_path / "out")
    assert summary.parts > 5
    assert not summary.manifest.problems
    split = summary.manifest.splits["train"]
    assert split.documents == len(texts)
    assert split.dropped_tokens < SEQ
    assert sum(split.lengths) == len(texts)
    tokenizer = load_tokenizer()
    served = tokens_of(tmp_path / "out")
    assert len(served) == split.tokens - split.dropped_tokens == split.samples * SEQ
    # Documents cut in two where a part ends come back in the samples packed last: compare as a multiset
    wanted = sorted(token for text in texts for token in [*tokenizer.encode(text), EOS])
    missing = list(wanted)
    for token in served:
        missing.remove(token)
    assert len(missing) == split.dropped_tokens
    assert "not to be read" not in tokenizer.decode(served)
    shown = tokenizer.decode(served)
    assert all(text in shown for text in texts[:5])


def test_streaming_reads_what_was_written(tmp_path: Path) -> None:
    streaming = pytest.importorskip("streaming")
    corpus(tmp_path / "in")
    run(tmp_path / "in", tmp_path / "out", val_fraction=0.2)
    for split in ("train", "val"):
        expected = tokens_of(tmp_path / "out", split)
        dataset = streaming.StreamingDataset(local=str(tmp_path / "out" / split), batch_size=1, shuffle=False)
        samples = [dataset[i]["tokens"] for i in range(len(dataset))]
        assert all(sample.dtype == np.uint32 and sample.shape == (SEQ,) for sample in samples)
        assert np.concatenate(samples).tolist() == expected
        assert tokens_of(tmp_path / "out", split) == expected  # now from the unpacked shards
        assert check_dataset(tmp_path / "out", SEQ, split=split)
    assert run(tmp_path / "in", tmp_path / "out", val_fraction=0.2).already_done


@pytest.mark.parametrize("columns", [mds.COLUMNS, mds.MASKED_COLUMNS])
@pytest.mark.parametrize(("seq_len", "samples"), [(5, 3), (255, 2), (256, 900), (70000, 3)])
def test_shards_are_those_of_streamings_writer(
    seq_len: int, samples: int, columns: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streaming = pytest.importorskip("streaming")
    limit = 600_000
    monkeypatch.setattr(mds, "SHARD_BYTES", limit)
    random = np.random.default_rng(0)
    rows = random.integers(0, 100352, (samples, seq_len), dtype=np.uint32)
    masks = random.integers(0, 2, (samples, seq_len), dtype=np.uint8)
    ours = mds.ShardWriter(tmp_path / "ours", seq_len, columns)
    theirs = streaming.MDSWriter(
        columns=columns,
        out=str(tmp_path / "theirs"),
        compression="zstd",
        hashes=["xxh64"],
        size_limit=limit,
    )
    with theirs:
        for row, mask in zip(rows, masks, strict=True):
            ours.write(row, mask if "loss" in columns else None)
            theirs.write({"tokens": row} | ({"loss": mask} if "loss" in columns else {}))
    ours.close()
    mds.write_index(tmp_path / "ours", ours.shards)
    assert contents(tmp_path / "ours") == contents(tmp_path / "theirs")
    for column, expected in (("tokens", rows), ("loss", masks)):
        if column in columns:
            read = [mds.read_shard(tmp_path / "ours", shard, column) for shard in ours.shards]
            assert np.array_equal(np.concatenate(read), expected)


def test_the_number_of_processes_changes_no_byte(tmp_path: Path) -> None:
    corpus(tmp_path / "in")
    outputs = []
    for processes in (1, 2, 3):
        run(tmp_path / "in", tmp_path / "out", val_fraction=0.1, processes=processes)
        outputs.append(contents(tmp_path / "out"))
        shutil.rmtree(tmp_path / "out")
    assert outputs[0] == outputs[1] == outputs[2]
    assert len(outputs[0]) > 10
    assert not any(name.startswith(".prepare") for name in outputs[0])


def test_held_out_documents_stay_so_when_others_join(tmp_path: Path) -> None:
    def held_out(texts: list[str]) -> set[str]:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        run(write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "out", seq_len=2, val_fraction=0.2)
        decoded = load_tokenizer().decode(tokens_of(tmp_path / "out", "val"))
        return {text.strip() for text in decoded.split("<|endoftext|>")}

    texts = [story(i, 5) for i in range(150)]
    few, many = held_out(texts[::3]), held_out(texts[::-1])
    known = set(texts[::3])
    assert 2 <= len(few & known) <= 25
    assert many & known == few & known


def test_done_says_so_and_other_options_are_refused(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [story(i) for i in range(50)], body="x")
    out = tmp_path / "out"
    first = run(file, out)
    before = contents(out)
    again = run(file, out)
    assert (first.already_done, again.already_done) == (False, True)
    assert again.manifest == first.manifest == read_manifest(out)
    assert "already prepared" in str(again)
    with pytest.raises(ValueError, match=r"out: was begun otherwise: seq_len was 32 and is 64; delete it"):
        run(file, out, seq_len=64)
    with pytest.raises(ValueError, match=r"text_field was 'text' and is 'body'"):
        run(file, out, text_field="body")
    with pytest.raises(ValueError, match=r"sources were .*a\.jsonl and are .*b\.jsonl"):
        run(write_jsonl(tmp_path / "b.jsonl", [story(1)] * 9), out)
    write_jsonl(file, [story(i) for i in range(51)])
    with pytest.raises(ValueError, match=r"source .*a\.jsonl has changed \(1 files of \d+ bytes then"):
        run(file, out)
    assert contents(out) == before


def test_a_stopped_run_is_taken_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus(tmp_path / "in")
    whole = run(tmp_path / "in", tmp_path / "whole")
    calls = []

    def failing(*args: Any, **kwargs: Any) -> None:
        calls.append(args[1])
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*args, **kwargs)

    real = pipeline.run_part
    monkeypatch.setattr(pipeline, "run_part", failing)
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"out: No space left on device$"):
        run(tmp_path / "in", out)
    with pytest.raises(ValueError, match=r"out: half written, it has no manifest\.json"):
        check_dataset(out, SEQ)
    with pytest.raises(ValueError, match="seq_len was 32 and is 16"):
        run(tmp_path / "in", out, seq_len=16)
    (out / "train" / "00003").mkdir()
    (out / "train" / "00003" / "shard.00001.mds.zstd").write_bytes(b"torn")
    resumed = run(tmp_path / "in", out)
    assert 3 <= resumed.parts_resumed < resumed.parts == whole.parts
    assert sorted({*calls}) == list(range(whole.parts))
    assert [calls.count(index) for index in range(4)] == [1, 1, 1, 2]
    assert contents(out) == contents(tmp_path / "whole")


KILLED = """
    import sys, time
    from dbrx_train.data.prepare import pipeline, sources, tokenize
    from dbrx_train.data.prepare.pipeline import prepare
    sources.MIN_PART_BYTES = 4000

    def slow(job, index, part, meter):
        tokenize.run_part(job, index, part, meter)
        for _ in range(20):
            meter.add()
            time.sleep(0.01)

    pipeline.run_part = slow  # in the workers too: they import this file
    if __name__ == "__main__":
        prepare([sys.argv[1]], sys.argv[2], seq_len=32, val_fraction=0, processes=2)
"""


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT])
def test_killed_amid_the_work_and_started_again_the_output_is_the_same(tmp_path: Path, signum: int) -> None:
    corpus(tmp_path / "in")
    whole = run(tmp_path / "in", tmp_path / "whole")
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(KILLED))
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "in"), str(out)],
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    wait_for(lambda: len(list(out.glob(".prepare/part-*.json"))) >= 2)
    if signum == signal.SIGINT:
        os.killpg(process.pid, signum)  # what Ctrl-C does
    else:
        process.send_signal(signum)
    assert process.stderr is not None
    complaint = process.stderr.read().decode()  # ends when no worker is left to hold it open
    assert process.wait() != 0
    assert complaint.count("Traceback") == (1 if signum == signal.SIGINT else 0), complaint
    assert not (out / "manifest.json").exists()
    assert not list(out.rglob("index.json"))
    resumed = run(tmp_path / "in", out)
    assert 2 <= resumed.parts_resumed < whole.parts
    assert contents(out) == contents(tmp_path / "whole")


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def test_a_killed_worker_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_work", _die)
    write_jsonl(tmp_path / "a.jsonl", [story(i) for i in range(60)])
    with pytest.raises(ValueError, match=r"out: a worker process died, most likely for lack of memory"):
        run(tmp_path / "a.jsonl", tmp_path / "out", processes=2)


def _die(*_: object) -> None:
    os._exit(9)


def test_of_two_at_once_the_second_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, out = write_jsonl(tmp_path / "a.jsonl", [story(i) for i in range(60)]), tmp_path / "out"
    started, release = threading.Event(), threading.Event()

    def waiting(*args: Any, **kwargs: Any) -> None:
        started.set()
        release.wait(30)
        real(*args, **kwargs)

    real = pipeline.run_part
    monkeypatch.setattr(pipeline, "run_part", waiting)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(run, file, out)
        assert started.wait(30)
        with pytest.raises(ValueError, match=rf"out: is in use by process {os.getpid()} on \S+, since"):
            run(file, out)
        release.set()
        assert not first.result().already_done
    assert run(file, out).already_done
    assert sorted(path.name for path in out.iterdir()) == ["inputs.jsonl", "manifest.json", "train"]
    assert check_dataset(out, SEQ)


def test_bad_text_is_mended_counted_and_named(tmp_path: Path) -> None:
    good = story(1, 200)
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbf" + good.encode())
    (folder / "b.txt").write_bytes(b"one\ntwo\nthr\xffee\nfo\xfeur")
    (folder / "blank.txt").write_text(" \n\n ")
    lines = [json_line("fine"), b"\n", json_line(""), b'{"text": null}\n', b'{"text": "half \\ud83d pair"}\n']
    (folder / "c.jsonl").write_bytes(b"".join([*lines, b'{"text": "byte \xe9"}\n']))
    (folder / "link.txt").symlink_to(folder / "a.txt")
    twice = [str(folder), str(folder / "a.txt")]
    summary = prepare(twice, str(tmp_path / "out"), seq_len=8, val_fraction=0, processes=1)
    found = {kind: (problem.count, problem.examples) for kind, problem in summary.manifest.problems.items()}
    assert found == {
        "duplicate": (2, [f"{folder}/link.txt", f"{folder}/a.txt"]),
        "empty": (3, [f"{folder}/blank.txt", f"{folder}/c.jsonl:3", f"{folder}/c.jsonl:4"]),
        "undecodable": (3, [f"{folder}/b.txt:3", f"{folder}/c.jsonl:5", f"{folder}/c.jsonl:6"]),
    }
    assert summary.manifest.splits["train"].documents == 5
    text = load_tokenizer().decode(tokens_of(tmp_path / "out"))
    assert text.startswith(good)
    assert "thr\ufffdee\nfo\ufffdur" in text
    assert "empty: 3" in str(summary)


def test_wrong_lines_are_refused_by_name_and_line(tmp_path: Path) -> None:
    fine = [json_line(story(i)) for i in range(100)]
    for bad, message in (
        (b'{"text": "a"\n', r"not valid JSON \("),
        (b'{"body": "a", "id": 1}\n', r"no field 'text'; it has 'body', 'id'"),
        (b'["a"]\n', r"expected a JSON object with a field 'text'"),
        (b'{"text": 7}\n', r"field 'text' holds int; it must hold text"),
        (b"[" * 100_000 + b"\n", r"not valid JSON \("),
    ):
        file = tmp_path / "a.jsonl"
        file.write_bytes(b"".join([*fine, bad, *fine]))
        with pytest.raises(ValueError, match=rf"a\.jsonl:101: {message}") as caught:
            run(file, tmp_path / "out")
        assert "\n" not in str(caught.value)
        shutil.rmtree(tmp_path / "out")


def test_a_wrong_field_name_can_be_corrected_without_cleaning_up(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [story(i) for i in range(60)])
    with pytest.raises(ValueError, match=r"a\.jsonl:1: no field 'txet'"):
        run(file, tmp_path / "out", text_field="txet")
    assert run(file, tmp_path / "out").manifest.splits["train"].documents == 60


def test_wrong_sources_are_refused_by_name(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.rst").write_text("text")
    (tmp_path / "tiny.txt").write_text("few words")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 but not really")
    (tmp_path / "bad.jsonl.gz").write_bytes(gzip.compress(json_line(story(1)) * 99)[:-20])
    pq.write_table(pa.table({"body": ["a"], "n": [1]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"^sources: none given"):
        prepare([], str(out))
    for name, message in (
        ("nowhere", r"nowhere: no such file or folder"),
        ("empty", r"empty: nothing in it to read; looked for files ending in \.txt, \.md, \.py, \.jsonl"),
        ("*.pdf", r"\*\.pdf: nothing in it to read"),
        ("a.rst", r"a\.rst: of no known type; it must end in \.txt"),
        ("tiny.txt", r"out: the sources hold fewer than seq_len = 32 tokens"),
        ("bad.parquet", r"bad\.parquet: not a readable Parquet file \("),
        ("bad.jsonl.gz", r"bad\.jsonl\.gz: damaged \(Truncated"),
        ("other.parquet", r"other\.parquet: no column 'text'; it has body, n"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tmp_path / name, out)
    with pytest.raises(ValueError, match=r"column 'n' holds int64; it must hold strings"):
        run(tmp_path / "other.parquet", out, text_field="n")
    (tmp_path / "a.rst").write_text(story(1))
    assert run(tmp_path / "*.rst", out, suffixes=[".rst"]).manifest.splits["train"].documents == 1


def test_wrong_options_and_folders_are_refused_by_name(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [story(i) for i in range(20)])
    for options, message in (
        ({"seq_len": 1}, "^seq_len: 1 is too short"),
        ({"val_fraction": 1.1}, r"^val_fraction: 1\.1 does not lie in \[0, 1\]"),
        ({"processes": 0}, "^processes: 0 is too few"),
        ({"suffixes": ["txt"]}, "^--suffix: 'txt' must begin with a dot"),
    ):
        with pytest.raises(ValueError, match=message):
            run(file, tmp_path / "out", **options)
    with pytest.raises(ValueError, match=r"a\.jsonl: File exists"):
        run(file, file)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep")
    with pytest.raises(ValueError, match="mine: is not empty and holds no unfinished preparation"):
        run(file, tmp_path / "mine")
    assert contents(tmp_path / "mine") == {"thesis.txt": b"keep"}


def test_lines_too_long_for_memory_are_read_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "LONG_LINE", 5000)
    text = "".join(story(i) + ' "quoted" \\ 😀 é\t' for i in range(60))
    texts = [story(1), text, story(2), text[::-1]]
    file = tmp_path / "a.jsonl"
    rows = [{"meta": {"text": "wrong", "list": [1, "]", None]}, "other": "x", "text": t} for t in texts]
    file.write_text("\n".join(json.dumps(row, ensure_ascii=i % 2 == 0) for i, row in enumerate(rows)))
    summary = run(file, tmp_path / "out")
    assert summary.manifest.splits["train"].documents == 4
    assert summary.manifest.splits["train"].text_bytes == sum(len(t.encode()) for t in texts)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "a"}) + '\n{"body": "' + "x" * 9000 + '"}\n')
    with pytest.raises(ValueError, match=r"b\.jsonl:2: no field 'text'"):
        run(tmp_path / "b.jsonl", tmp_path / "b")


def test_string_pieces_of_a_long_line_are_its_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    text = 'plain é 😀 字\\"\n\t\u2028' * 9
    for ascii_only in (True, False):
        line = json.dumps({"a": {"text": 1}, "text": text, "b": 2}, ensure_ascii=ascii_only).encode()
        for size in range(13, 40):
            monkeypatch.setattr(long_lines, "CHUNK", size)
            pieces = list(string_chunks(line, "text", "f:1"))  # type: ignore[arg-type]
            assert "".join(pieces) == text
            assert len(pieces) > 3


def test_inspect_shows_what_is_there(tmp_path: Path) -> None:
    texts = [story(i, 30) for i in range(40)]
    run(write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "out", val_fraction=0.2)
    report = inspect(tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    split = manifest.splits["train"]
    assert f"train: {split.documents} documents, {split.tokens:,} tokens" in report
    assert "val: " in report
    assert "a.jsonl: 1 files" in report
    assert BOUNDARY in report
    counts = [int(line.split()[3].replace(",", "")) for line in report.splitlines() if " to " in line]
    assert sum(counts) == split.documents
    assert "Story" in inspect(tmp_path / "out", split="val", sample=0)
    with pytest.raises(ValueError, match=r"^sample: 99999 does not exist; train has samples 0 to"):
        inspect(tmp_path / "out", sample=99999)
    with pytest.raises(ValueError, match=r"has no split 'test', only train, val"):
        inspect(tmp_path / "out", split="test")


def test_inspect_lets_no_escape_sequence_through(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\x1b[2J" + story(1))
    run(tmp_path / "a.txt", tmp_path / "out")
    report = inspect(tmp_path / "out", sample=0)
    assert "\\x1b[2J" in report
    assert "\x1b" not in report


def test_check_dataset_names_what_is_wrong(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(write_jsonl(tmp_path / "a.jsonl", [story(i) for i in range(40)]), out)
    fingerprint = load_tokenizer().fingerprint
    assert check_dataset(out, SEQ, fingerprint, 100352).seq_len == SEQ
    with pytest.raises(ValueError, match="nowhere: no such folder; make it with"):
        check_dataset(tmp_path / "nowhere", SEQ)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: empty, it has no manifest"):
        check_dataset(tmp_path / "empty", SEQ)
    with pytest.raises(ValueError, match="prepared with samples of 32 tokens, but the run asks for 64; set"):
        check_dataset(out, 64)
    with pytest.raises(ValueError, match="out: prepared with another tokenizer, cl100k_base"):
        check_dataset(out, SEQ, "0" * 64)
    with pytest.raises(ValueError, match="holds ids up to 100351, but the model's vocabulary has only 50304"):
        check_dataset(out, SEQ, vocab_size=50304)
    with pytest.raises(ValueError, match="has no split 'val', only train"):
        check_dataset(out, SEQ, split="val")


def test_check_dataset_notices_damage(tmp_path: Path) -> None:
    run(write_jsonl(tmp_path / "a.jsonl", [story(i) for i in range(40)]), tmp_path / "good")

    def damaged(name: str, change: Callable[[Path], object]) -> Path:
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        change(tmp_path / "bad" / name)
        return tmp_path / "bad"

    shard = "train/00000/shard.00000.mds.zstd"
    for name, change, message in (
        (shard, Path.unlink, r"shard\.00000\.mds\.zstd: missing or cut short"),
        (shard, lambda p: p.write_bytes(p.read_bytes()[:-1]), r"zstd: missing or cut short"),
        ("train/index.json", Path.unlink, r"bad/train: has no index\.json"),
        ("train/index.json", lambda p: p.write_text("{"), r"train/index\.json: damaged \("),
        ("train/index.json", lambda p: p.write_text('{"shards": []}'), r"lists 0 samples, the manifest \d+"),
        ("manifest.json", Path.unlink, r"bad: half written"),
        ("manifest.json", lambda p: p.write_text("[]"), r"manifest\.json: no manifest of a prepared folder"),
        ("manifest.json", lambda p: p.write_text('{"version": 9}'), r"version 9; this program reads"),
    ):
        with pytest.raises(ValueError, match=message):
            check_dataset(damaged(name, change), SEQ)


def test_a_remote_folder_is_checked_without_its_shards(tmp_path: Path) -> None:
    remote, local = tmp_path / "remote", tmp_path / "cache" / "a"
    run(write_jsonl(tmp_path / "a.jsonl", [story(i) for i in range(40)]), remote)
    fingerprint = load_tokenizer().fingerprint
    manifest = check_dataset(local, SEQ, fingerprint, 100352, remote=str(remote))
    assert manifest == read_manifest(remote) == read_manifest(local)
    assert sorted(contents(local)) == ["manifest.json", "train/index.json"]
    with pytest.raises(ValueError, match="prepared with samples of 32 tokens, but the run asks for 64; set"):
        check_dataset(local, 64, remote=str(remote))
    with pytest.raises(ValueError, match="prepared with another tokenizer"):
        check_dataset(local, SEQ, "0" * 64, remote=str(remote))
    with pytest.raises(ValueError, match="has no split 'val', only train"):
        check_dataset(local, SEQ, split="val", remote=str(remote))
    shutil.rmtree(remote)  # what was fetched once must not pass for what is there now
    run(write_jsonl(tmp_path / "a.jsonl", [story(i) for i in range(60)]), remote)
    assert check_dataset(local, SEQ, remote=str(remote)) == read_manifest(remote) != manifest
    (remote / "train" / "index.json").write_text('{"shards": []}')
    with pytest.raises(ValueError, match=r"lists 0 samples, the manifest \d+"):
        check_dataset(local, SEQ, remote=str(remote))
    (remote / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"remote/manifest\.json: cannot be fetched to .*manifest") as caught:
        check_dataset(local, SEQ, remote=str(remote))
    assert "\n" not in str(caught.value)


def test_the_function_and_the_command_hold_out_the_same_share() -> None:
    function, command = (signature(f).parameters["val_fraction"] for f in (prepare, data_prepare))
    assert function.default == command.default == 0.01


def test_memory_stays_flat(tmp_path: Path) -> None:
    """Some 100 MB of process, whatever the size of the document; a copy of it more would show."""
    piece = story(1, 10_000).replace("\n", " ")
    with open(tmp_path / "long.jsonl", "w") as file:
        file.write('{"text": "')
        file.writelines([piece] * 2000)
        file.write('"}\n')
    code = """
        import sys
        from pathlib import Path
        from dbrx_train.data.prepare import pipeline, tokenize
        from dbrx_train.data.tokenizer import TiktokenTokenizer
        quick = lambda self, text: tokenize.np.zeros(len(text) // 100, "u4")
        TiktokenTokenizer.encode_array = quick
        pipeline.prepare([sys.argv[1]], sys.argv[2], val_fraction=0, processes=1)
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        print(status["VmHWM"].split()[0])
    """
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    command = [sys.executable, "-c", textwrap.dedent(code), tmp_path / "long.jsonl", tmp_path / "out"]
    result = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
    size = (tmp_path / "long.jsonl").stat().st_size
    assert read_manifest(tmp_path / "out").splits["train"].text_bytes > size - 100
    # The line's map counts once, as long as the memory is not needed for something else
    assert int(result.stdout) * 1024 - size < 200e6
    assert size > 80e6
