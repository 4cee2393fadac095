"""Files as users have them: every form of text in JSON and Parquet is read, anything else named."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstd
from typer.testing import CliRunner

from dbrx_train.cli import app
from dbrx_train.data.manifest import read_manifest
from dbrx_train.data.prepare import content, records, sources
from dbrx_train.data.prepare.conversations import ChatFormat
from dbrx_train.data.prepare.documents import documents
from dbrx_train.data.prepare.long_lines import array_elements, string_chunks
from dbrx_train.data.prepare.pipeline import TEXT_SUFFIXES, prepare
from dbrx_train.data.prepare.sources import find_files, plan_parts
from dbrx_train.data.prepare.text_template import text_template

TEXTS = ["One.\n", 'a "quoted" \\ é 😀 ]}, [{', "", "x" * 700]


class Heard:
    def __init__(self) -> None:
        self.problems, self.bytes = Counter[str](), 0

    def problem(self, kind: str, where: Any) -> None:
        self.problems[kind] += 1

    def advance(self, size: int) -> None:
        self.bytes += size


def read(*given: Path, field: str = "text", template: str | None = None) -> tuple[list[str], Heard]:
    """Text of each document of the files, and what was reported."""
    heard, text, found = Heard(), text_template(field, template), []
    for part in plan_parts(find_files([str(path) for path in given], TEXT_SUFFIXES), text):
        for span in part:
            found += ["".join(chunks) for _, chunks in documents(span, text, heard)]
    return found, heard


def write_parquet(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


def array(texts: Sequence[str], **layout: Any) -> bytes:
    rows = [{"meta": {"text": "no", "list": [1, "]"]}, "text": text} for text in texts]
    return json.dumps(rows, **layout).encode()


@pytest.mark.parametrize("layout", [{}, {"indent": 2}, {"ensure_ascii": False}])
@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("ending", [".json", ".json.gz", ".json.zst"])
def test_a_json_array_is_a_document_an_element(
    ending: str, long: bool, layout: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if long:
        monkeypatch.setattr(records, "LONG_LINE", 100)
    pack = {".json": bytes, ".json.gz": gzip.compress, ".json.zst": zstd.compress}[ending]
    path = tmp_path / f"a{ending}"
    path.write_bytes(pack(b"\xef\xbb\xbf\n " + array(TEXTS, **layout) + b"\n"))
    found, heard = read(path)
    assert found == TEXTS
    assert 0.9 * path.stat().st_size < heard.bytes <= path.stat().st_size


def test_what_is_in_a_json_file_decides_how_it_is_read(tmp_path: Path) -> None:
    lines = tmp_path / "lines.json"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    assert read(lines)[0] == TEXTS
    (tmp_path / "empty.json").write_text("[ ]")
    (tmp_path / "blank.json").write_text("")
    assert read(tmp_path / "empty.json", tmp_path / "blank.json", lines)[0] == TEXTS
    for text, says in (
        ('[{"text": "a"}, {"body": "b"}]', r"a\.json\[1\]: no field 'text'; it has 'body'"),
        ('[{"text": "a"}, 7]', r"a\.json\[1\]: expected a JSON object with a field 'text', not b' 7'"),
        ('[{"text": "a"},]', r"a\.json\[1\]: not valid JSON \("),
        ('[{"text": "a"}, {"text": }]', r"a\.json\[1\]: not valid JSON \("),
        ('[{"text": "a"}, {"text": "b"]]', r"a\.json\[1\]: not valid JSON \("),
        ('[{"text": "a"}', r"a\.json: not valid JSON \(the array does not end"),
        ('[{"text": "a"}, {"text": "b', r"a\.json: not valid JSON \(the array does not end"),
        ('[{"text": "a"}] []', r"a\.json: not valid JSON \(the array does not end, or has something after"),
        ('{\n "data": 1}', r"a\.json:1: an object over several lines; it must be one line, or in an array"),
        ('{"data": [{"text": "a"}]}', r"a\.json:1: no field 'text'; it has 'data'"),
    ):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ValueError, match=says):
            read(tmp_path / "a.json")


def test_json_files_are_read_where_they_are_named(tmp_path: Path) -> None:
    (tmp_path / "about.json").write_text('{"name": "a corpus"}')
    (tmp_path / "a.txt").write_text("One.")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.json").write_bytes(array(["Two."]))
    assert read(tmp_path)[0] == read(tmp_path / "*")[0] == ["One."]
    assert read(tmp_path / "sub" / "*.json")[0] == ["Two."]
    with pytest.raises(ValueError, match=r"sub: nothing in it to read; .*\.json is read where it is named"):
        read(tmp_path / "sub")
    files = find_files([str(tmp_path / "about.json")], [".json"]).files
    assert files == ((str(tmp_path / "about.json"), "text"),), "as --suffix .json asks for"


def test_parts_of_an_array_are_found_whatever_is_in_its_strings() -> None:
    data = array(TEXTS, ensure_ascii=False)
    rows = [json.loads(data[start:stop]) for start, stop in array_elements(data, "f")]
    assert [row["text"] for row in rows] == TEXTS


STRINGS = pa.array(["a", None, "b", "a", "é"])


@pytest.mark.parametrize(
    "column",
    [
        STRINGS,
        STRINGS.cast(pa.large_string()),
        STRINGS.cast(pa.string_view()),
        STRINGS.cast(pa.binary()),
        STRINGS.cast(pa.large_binary()),
        STRINGS.dictionary_encode(),
        STRINGS.cast(pa.large_binary()).dictionary_encode(),
    ],
    ids=lambda column: str(column.type)[:24],
)
def test_parquet_text_of_every_type_is_read(column: pa.Array, tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", n=range(5), text=column)
    assert read(path)[0] == ["a", "", "b", "a", "é"]


ROWS = [
    {"doc": {"title": "T1", "body": {"text": "B1"}}, "text": "top"},
    {"doc": {"title": None, "body": {"text": "B2", "doc": 1}}, "text": "top"},
    {"doc": {"title": " ", "body": None}, "text": "top"},
    {"doc": None, "text": "top"},
]


def write_nested(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ROWS as JSON lines, ordinary ones or such as do not fit in memory, or as Parquet."""
    path = folder / f"a.{kind}"
    if kind == "parquet":
        return write_parquet(path, doc=[row["doc"] for row in ROWS], text=["top"] * 4)
    if kind == "long.jsonl":
        monkeypatch.setattr(records, "LONG_LINE", 20)
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "long.jsonl", "parquet"])
def test_nested_fields_are_read(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_nested(kind, tmp_path, monkeypatch)
    assert read(path, field="doc.body.text")[0] == ["B1", "B2", "", ""]
    assert read(path, field="text")[0] == ["top"] * 4
    for wrong in ("doc.text", "text.doc", "doc.title.body", "body"):
        with pytest.raises(ValueError, match=rf"no (field|column) '{wrong}'.* \(choose with --text-field\)"):
            read(path, field=wrong)
    with pytest.raises(ValueError, match=r"'doc.body'.*must hold (text|strings)"):
        read(path, field="doc.body")


@pytest.mark.parametrize("kind", ["jsonl", "long.jsonl", "parquet"])
def test_several_fields_make_a_text(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_nested(kind, tmp_path, monkeypatch)
    found, _ = read(path, template=r"# {doc.title}\n\n{doc.body.text} {{\\n}}")
    assert found == ["# T1\n\nB1 {\\n}", "# \n\nB2 {\\n}", "", ""], "nothing where all fields are blank"
    with pytest.raises(ValueError, match=r"no (field|column) 'titel'.* \(choose with --template\)"):
        read(path, template="{titel}: {text}")


def test_a_name_with_a_dot_goes_before_a_nested_field(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": {"b": "nested"}, "a.b": "plain"}\n')
    assert read(path, field="a.b")[0] == ["plain"]
    assert "".join(string_chunks(path.read_bytes(), "a.b", "f:1")) == "plain"
    parquet = write_parquet(tmp_path / "a.parquet", a=[{"b": "nested"}], **{"a.b": ["plain"]})
    assert read(parquet, field="a.b")[0] == ["plain"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"template": "{title"}, r"--template: '{title' is not well formed \("),
        ({"template": "{}"}, r"--template: '{}' holds braces without a plain name; it is like '{title}\\n"),
        ({"template": "{a:>9}"}, r"--template: '{a:>9}' holds braces without a plain name"),
        ({"template": "title"}, r"--template: 'title' names no field"),
        ({"template": "{a}", "text_field": "b"}, r"--template: given beside --text-field"),
    ],
)
def test_a_wrong_template_is_refused(options: dict[str, str], says: str) -> None:
    with pytest.raises(ValueError, match=f"^{says}"):
        text_template(**{"text_field": "text", "template": None, **options})


LINES = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)
PARQUET = io.BytesIO()
pq.write_table(pa.table({"text": ["a"]}), PARQUET)


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".txt", ".jsonl.gz"])
@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("\ufeff".encode("utf-16-le") + LINES.decode().encode("utf-16-le"), "is UTF-16, and must be UTF-8"),
        (LINES.decode().encode("utf-16-le"), "is UTF-16LE, and must be UTF-8; convert it: iconv -f UTF-16LE"),
        (LINES.decode().encode("utf-16-be"), "is UTF-16BE, and must be UTF-8"),
        (LINES.decode().encode("utf-32"), "is UTF-32, and must be UTF-8"),
        (gzip.compress(LINES), r"is not text but gzip, which is read from files ending in \.gz"),
        (zstd.compress(LINES), r"is not text but Zstandard, which is read from files ending in \.zst"),
        (bz2.compress(LINES), "is not text but bzip2; unpack it"),
        (lzma.compress(LINES), "is not text but xz; unpack it"),
        (PARQUET.getvalue(), r"is not text but Parquet, which is read from files ending in \.parquet"),
    ],
    ids=["utf-16", "utf-16-le", "utf-16-be", "utf-32", "gzip", "zstd", "bzip2", "xz", "parquet"],
)
def test_what_is_no_utf_8_is_called_by_its_name(data: bytes, says: str, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{ending}"
    path.write_bytes(gzip.compress(data) if ending.endswith(".gz") else data)
    with pytest.raises(ValueError, match=rf"^{path}: {says}"):
        read(path)


def test_text_that_only_looks_a_little_like_it_is_read(tmp_path: Path) -> None:
    for data in (b"PK and BZh and PAR", b"a\0b\0c", b"\0" * 64, "ab".encode("utf-8-sig"), b"", b"\xff"):
        (tmp_path / "a.txt").write_bytes(data)
        assert len(read(tmp_path / "a.txt")[0]) == 1
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"text": "表"}\n'.encode("shift-jis"))  # whose second byte is a backslash
    with pytest.raises(ValueError, match=r"a\.jsonl:1: neither JSON nor UTF-8 \(.*\); convert it to UTF-8"):
        read(path)


def test_a_damaged_text_file_is_named(tmp_path: Path) -> None:
    for name in ("a.txt.gz", "a.json.gz"):
        (tmp_path / name).write_bytes(gzip.compress(array(TEXTS * 99))[:-20])
        with pytest.raises(ValueError, match=rf"{name}: damaged \(Truncated"):
            read(tmp_path / name)


def test_fields_beside_a_text_that_mean_something_are_told_of(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [
        {"text": "a", "weight": 0},
        {"text": "b", "weight": 1, "images": []},
        {"text": "c", "images": ["d"]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read(path)[1].problems == {"field 'weight' is not read": 1, "field 'images' is not read": 1}
    assert not read(path, template="{text}{text}")[1].problems.keys() & {"field 'text' is not read"}
    parquet = write_parquet(tmp_path / "a.parquet", text=["a"] * 5, weight=[0.5] * 5)
    assert read(parquet)[1].problems == {"field 'weight' is not read": 1}, "by file"


def test_a_missing_path_says_from_where_it_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"^data/a\.jsonl: no such file or folder, seen from {tmp_path}$"):
        find_files(["data/a.jsonl"], ())
    with pytest.raises(ValueError, match=rf"data/\*: nothing in it to read, seen from {tmp_path}; looked"):
        find_files(["data/*"], ())
    with pytest.raises(ValueError, match=rf"^{tmp_path}/b: no such file or folder$"):
        find_files([f"{tmp_path}/b"], ())
    with pytest.raises(ValueError, match=rf"^nowhere: no such folder, seen from {tmp_path}; make it with"):
        read_manifest("nowhere")


def test_arrays_and_templates_through_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MIN_PART_BYTES", 1000)
    monkeypatch.setattr(content, "BUFFER", 100)
    rows = [{"title": f"Title {i}", "doc": {"body": "word " * 20}} for i in range(60)]
    (tmp_path / "a.json").write_text(json.dumps(rows[:30]))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[30:]))
    files = [str(tmp_path / "a.json"), str(tmp_path / "b.jsonl")]
    command = ["data", "prepare", *files, "--out", str(tmp_path / "out")]
    command += ["--seq-len", "16", "--val-fraction", "0", "--processes", "1", "--template"]
    done = CliRunner().invoke(app, [*command, r"{title}\n\n{doc.body}"])
    assert done.exit_code == 0, done.output
    manifest = read_manifest(tmp_path / "out")
    expected = sum(len(f"{row['title']}\n\n{row['doc']['body']}") for row in rows)
    assert (manifest.splits["train"].documents, manifest.splits["train"].text_bytes) == (60, expected)
    assert manifest.options["template"] == r"{title}\n\n{doc.body}"
    with pytest.raises(
        ValueError, match=r"template was '.*' and is None; text_field was None and is 'title'"
    ):
        prepare(files, str(tmp_path / "out"), seq_len=16, val_fraction=0, text_field="title")


def test_an_array_of_conversations(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"conversations": turns}] * 3))
    summary = prepare([str(path)], str(tmp_path / "out"), seq_len=64, processes=1, chat=ChatFormat())
    assert summary.manifest.splits["train"].documents == 3
    path.write_text(json.dumps([{"conversations": turns}, {"text": "a"}]))
    with pytest.raises(ValueError, match=r"a\.json\[1\]: no conversation; it must have messages"):
        prepare([str(path)], str(tmp_path / "no"), seq_len=64, processes=1, chat=ChatFormat())


def test_conversations_in_parquet(tmp_path: Path) -> None:
    turns = [
        [
            {"role": "user", "content": "Hi", "weight": None},
            {"role": "assistant", "content": "Ho", "weight": 1},
        ]
    ]
    empty: dict[str, Any] = {"prompt": None, "response": None, "images": []}
    rows = [{"messages": turns[0], **empty}] * 3 + [
        {**empty, "messages": None, "prompt": "Hi", "response": "Ho"}
    ] * 2
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    path = write_parquet(tmp_path / "a.parquet", **columns, embedding=[[0.5]] * 5)
    summary = prepare([str(path)], str(tmp_path / "out"), seq_len=64, processes=1, chat=ChatFormat())
    assert summary.manifest.splits["train"].documents == 5
    assert not summary.manifest.problems
    write_parquet(path, messages=[*turns, [{"role": "bot", "content": "", "weight": 0}]])
    with pytest.raises(ValueError, match=r"a\.parquet:2: messages\[0\]\.role is 'bot'; it must be one of"):
        prepare([str(path)], str(tmp_path / "no"), seq_len=64, processes=1, chat=ChatFormat())
    pairs = write_parquet(tmp_path / "p.parquet", prompt=["Hi", None], chosen=["a", "b"], rejected=["c", "d"])
    with pytest.raises(ValueError, match=r"p\.parquet:2: chosen is an answer alone; there must be a prompt"):
        prepare([str(pairs)], str(tmp_path / "no"), processes=1, chat=ChatFormat(preferences=True))
    write_parquet(path, text=["a"])
    with pytest.raises(
        ValueError, match=r"a\.parquet: none of its columns is of a conversation; .* has text$"
    ):
        prepare([str(path)], str(tmp_path / "no"), seq_len=64, processes=1, chat=ChatFormat())
