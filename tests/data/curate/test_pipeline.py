"""A recipe run from raw text to Parquet, interrupted, changed, refused, and prepared."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from paths import ROOT

from dbrx_train.data.curate import parts, pipeline
from dbrx_train.data.curate.pipeline import curate
from dbrx_train.data.curate.recipe import load_recipe
from dbrx_train.data.manifest import read_manifest
from dbrx_train.data.prepare import engines, sources
from dbrx_train.data.prepare.pipeline import prepare

WORDS = [
    "the",
    "of",
    "and",
    "report",
    "that",
    "was",
    "made",
    "spring",
    "had",
    "been",
    "read",
    "bridge",
    "heard",
]
RECIPE = """
sources:
  web: {{paths: [{folder}/web.jsonl], id_field: key, keep: [url]}}
  books: {{paths: [{folder}/books]}}
steps:
  - gopher_quality: {{min_words: 20, sources: [web]}}
  - personal_data
  - exact_duplicates
  - near_duplicates
"""


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a few kilobytes, so that a small corpus has many."""
    monkeypatch.setattr(sources, "MIN_PART_BYTES", 4000)


def story(number: int) -> str:
    pick = random.Random(number)
    return " ".join([f"Story {number}.", *pick.choices(WORDS, k=60)])


def corpus(folder: Path) -> str:
    """60 stories of the web, of which two are too short, and 12 books, of which one is a story of the web."""
    (folder / "books").mkdir(parents=True)
    rows = [{"key": f"k{i}", "url": f"http://w/{i}", "text": story(i)} for i in range(58)]
    rows[7]["text"] += " Write to someone@example.org."
    rows += [{"key": f"k{i}", "url": None, "text": "Too short."} for i in (58, 59)]
    (folder / "web.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for i in range(11):
        (folder / "books" / f"{i:02}.txt").write_text(story(1000 + i))
    (folder / "books" / "99.txt").write_text(story(30).upper())
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(folder=folder))
    return str(recipe)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def table(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def run(recipe: str, out: Path, **options: Any) -> pipeline.Summary:
    return curate(recipe, str(out), **{"processes": 1, "progress": False, **options})


def test_what_is_kept_removed_and_reported(tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary = run(corpus(tmp_path / "in"), out)
    web, books = table(out / "web"), table(out / "books")
    assert [row["id"] for row in web] == [f"k{i}" for i in range(58)]
    assert web[3]["metadata.url"] == "http://w/3"
    assert web[7]["text"].endswith(" Write to <EMAIL>.")
    assert web[0]["gopher_quality.words"] == 62
    assert [Path(row["id"]).name for row in books] == [f"{i:02}.txt" for i in range(11)]
    removed = table(out / ".removed" / "web") + table(out / ".removed" / "books")
    assert [(row["reason"], row["duplicate_of"]) for row in removed] == [
        ("gopher_quality.words", None),
        ("gopher_quality.words", None),
        ("exact_duplicates.duplicate", "k30"),
    ]
    report = json.loads((out / "curation.json").read_text())
    first, second = report["sources"]
    assert (first["name"], first["documents"], first["kept_documents"]) == ("web", 60, 58)
    rule = next(rule for rule in first["removed"] if rule["rule"] == "gopher_quality.words")
    assert (rule["documents"], rule["bytes"], rule["alone"]) == (2, 20, 2)
    assert rule["examples"][0] == {"id": "k58", "text": "Too short.", "gopher_quality.words": 2}
    assert first["totals"]["personal_data.emails"] == 1
    assert second["removed"][-1]["examples"][0]["duplicate_of"] == "k30"
    assert report["recipe_digest"] == load_recipe(str(tmp_path / "in" / "recipe.yaml")).digest
    assert report["inputs"]["web"][0]["files"] == 1
    assert sum(output["documents"] for output in report["outputs"]) == 69
    assert "web: 58 of 60 documents kept" in str(summary)
    assert sorted(path.name for path in out.iterdir()) == [".removed", "books", "curation.json", "web"]
    assert run(str(tmp_path / "in" / "recipe.yaml"), out).already_done


def test_prepare_reads_what_is_kept(tmp_path: Path) -> None:
    run(corpus(tmp_path / "in"), tmp_path / "out")
    prepare(
        [str(tmp_path / "out")],
        str(tmp_path / "mds"),
        seq_len=32,
        val_fraction=0,
        processes=1,
        progress=False,
    )
    assert read_manifest(tmp_path / "mds").splits["train"].documents == 69


def test_any_number_of_processes_and_interruptions_give_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = corpus(tmp_path / "in")
    whole = run(recipe, tmp_path / "whole")
    assert whole.parts > 5
    run(recipe, tmp_path / "two", processes=2)
    assert contents(tmp_path / "two") == contents(tmp_path / "whole")

    out = tmp_path / "out"
    for name in ("annotate_part", "write_part"):
        calls = 0
        real = getattr(parts, name)

        def failing(*args: Any, real: Any = real, **kwargs: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == 4:
                raise OSError(28, "No space left on device")
            real(*args, **kwargs)

        monkeypatch.setattr(pipeline, name, failing)
        with pytest.raises(ValueError, match=r"out: No space left on device$"):
            run(recipe, out)
        assert not (out / "curation.json").exists()
        monkeypatch.setattr(pipeline, name, real)
    resumed = run(recipe, out)
    assert resumed.parts_resumed == whole.parts
    assert contents(out) == contents(tmp_path / "whole")


KILLED = """
    import os, sys
    from dbrx_train.data.curate import parts, pipeline
    from dbrx_train.data.prepare import sources
    sources.MIN_PART_BYTES = 4000

    def dying(job, index, source, part, meter):
        if index == 3:
            os.kill(os.getpid(), 9)
        parts.annotate_part(job, index, source, part, meter)

    pipeline.annotate_part = dying  # in the workers too: they import this file
    if __name__ == "__main__":
        try:
            pipeline.curate(sys.argv[1], sys.argv[2], processes=2)
        except ValueError as error:
            sys.exit(str(error))
"""


def test_after_a_killed_worker_the_same_command_goes_on(tmp_path: Path) -> None:
    recipe, out = corpus(tmp_path / "in"), tmp_path / "out"
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(KILLED))
    command = [sys.executable, str(script), recipe, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "a worker process died" in done.stderr.splitlines()[-1]
    run(recipe, out)
    run(recipe, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    """A recipe, and a folder in which one part is done."""
    recipe, out = corpus(tmp_path / "in"), tmp_path / "out"

    def failing(job: Any, index: int, *args: Any) -> None:
        if index == 1:
            raise OSError(28, "No space left on device")
        parts.annotate_part(job, index, *args)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "annotate_part", failing)
        with pytest.raises(ValueError, match="No space"):
            run(recipe, out)
    return recipe, out


def test_an_input_that_changed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, out = begun(tmp_path, monkeypatch)
    (tmp_path / "in" / "books" / "05.txt").write_text("something else")
    with pytest.raises(ValueError, match=r"was begun otherwise: \S+/books/05\.txt has changed; delete it or"):
        run(recipe, out)
    shutil.rmtree(out)
    run(recipe, out)
    with (tmp_path / "in" / "web.jsonl").open("a") as file:
        file.write('{"key": "new", "url": null, "text": "new"}\n')
    with pytest.raises(ValueError, match=r"web\.jsonl of source web has changed \(1 files of \d+ bytes then"):
        run(recipe, out)


def test_a_recipe_that_changed_is_refused_with_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = begun(tmp_path, monkeypatch)
    Path(recipe).write_text(Path(recipe).read_text().replace("min_words: 20", "min_words: 21"))
    differs = r"the recipe differs \(steps\[0\]\.gopher_quality\.min_words was 20 and is 21\)"
    with pytest.raises(ValueError, match=differs):
        run(recipe, out)


def test_nothing_left_is_refused_with_the_counts(tmp_path: Path) -> None:
    recipe, out = corpus(tmp_path / "in"), tmp_path / "out"
    Path(recipe).write_text(Path(recipe).read_text().replace("min_words: 20", "min_words: 2000"))
    with pytest.raises(
        ValueError,
        match=r"sources\.web: nothing is left of 60 documents \(gopher_quality\.words removes 60\).*-empty$",
    ):
        run(recipe, out)
    Path(recipe).write_text(Path(recipe).read_text().replace("min_words: 2000", "min_words: 3000"))
    report = run(recipe, out, allow_empty=True).report
    assert [source["kept_documents"] for source in report["sources"]] == [0, 12]
    assert not (out / "web").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("min_words", "min_word"),
            r"unknown key steps\[0\]\.gopher_quality\.min_word; did you mean min_words\?$",
        ),
        (("min_words: 20", "min_words: many"), r"min_words: must be a whole number, not 'many'$"),
        (
            ("min_words: 20", "min_words: -1"),
            r"steps\[0\]\.gopher_quality\.min_words: must not be negative, not -1$",
        ),
        (("gopher_quality", "gopher"), r"steps\[0\]: no step gopher; did you mean gopher_\w+\?$"),
        (("sources: [web]", "sources: [wep]"), r"\.sources: no source wep; did you mean web\?$"),
        (("paths: [", "path: ["), r"unknown key sources\.web\.path; did you mean paths\?$"),
        (("steps:", "step:"), r"unknown key step; did you mean steps\?$"),
        (("- personal_data", "- near_duplicates"), r"near_duplicates is named twice for source web"),
        (
            ("- personal_data", "- license: {field: terms}"),
            r"sources\.web\.keep: must name 'terms', by which license goes, too$",
        ),
        (
            ("- near_duplicates", "- fineweb"),
            r"fineweb comes after exact_duplicates; what looks at all documents",
        ),
        (
            ("id_field: key", "id_field: kay"),
            r"web\.jsonl:1: no field 'kay' \(id_field\); it has 'key', 'url', 'text'$",
        ),
        (("{paths", "[paths"), r"recipe\.yaml, line \d+: not valid YAML"),
        (("- personal_data", "- decontaminate: {against: [none/]}"), r"against: none/: no JSON lines there"),
        (
            ("- personal_data", "- classifier"),
            r"steps\[1\]\.classifier\.model: is missing; it names a fastText",
        ),
    ],
)
def test_mistakes_in_a_recipe_are_one_line(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    recipe = corpus(tmp_path / "in")
    text = Path(recipe).read_text()
    assert change[0] in text
    Path(recipe).write_text(text.replace(change[0], change[1], 1))
    with pytest.raises(ValueError, match=message) as caught:
        run(recipe, tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_a_column_that_is_not_there_is_named(tmp_path: Path) -> None:
    first = tmp_path / "first"
    run(corpus(tmp_path / "in"), first)
    recipe = tmp_path / "again.yaml"
    recipe.write_text(f"sources: {{web: {{paths: [{first}/web], text_field: body}}}}\n")
    with pytest.raises(ValueError, match=r"00000\.parquet: no column 'body'; it has id, text, metadata\.url"):
        run(str(recipe), tmp_path / "out")
    recipe.write_text(f"sources: {{web: {{paths: [{first}/web], id_field: id, keep: [metadata.url]}}}}\n")
    run(str(recipe), tmp_path / "out")
    assert [row["id"] for row in table(tmp_path / "out" / "web")] == [f"k{i}" for i in range(58)]


def test_java_and_pyspark_that_are_missing_or_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARK_REMOTE", raising=False)
    monkeypatch.setitem(sys.modules, "pyspark", None)
    with pytest.raises(
        ValueError, match=r"pyspark is not installed; spark needs: pip install 'dbrx-train\[spark\]'$"
    ):
        engines.check_engine("spark")
    monkeypatch.setitem(sys.modules, "pyspark", sys)
    monkeypatch.setattr(engines, "_active_session", lambda: None)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(
        ValueError, match=r"no Java found at \S+/bin/java; spark needs Java 17 or newer: apt install"
    ):
        engines.check_engine("spark")
    java = tmp_path / "bin" / "java"
    java.parent.mkdir()
    for version, good in (("1.8.0_412", False), ("11.0.2", False), ("17.0.15", True), ("21", True)):
        java.write_text(f"#!/bin/sh\necho 'openjdk version \"{version}\" 2025-04-15' >&2\n")
        java.chmod(0o755)
        if good:
            engines.check_engine("spark")
        else:
            with pytest.raises(ValueError, match=rf"java is Java {version}; spark needs Java 17"):
                engines.check_engine("spark")
    with pytest.raises(ValueError, match=r"engine: 'flink' is not one of local, spark"):
        engines.check_engine("flink")


def test_the_recipes_that_come_along_are_read() -> None:
    found = sorted((ROOT / "configs" / "curate").glob("*.yaml"))
    assert found
    for path in found:
        assert load_recipe(str(path)).steps


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("pyspark") is None, reason="needs: pip install 'dbrx-train[spark]'"
)
@pytest.mark.skipif(shutil.which("java") is None, reason="needs Java 17")
def test_spark_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MIN_PART_BYTES", 12000)
    recipe = corpus(tmp_path / "in")
    assert run(recipe, tmp_path / "local").parts > 2
    run(recipe, tmp_path / "spark", engine="spark", processes=2)
    assert contents(tmp_path / "spark") == contents(tmp_path / "local")
    for engine in ("local", "spark"):
        prepare(
            [str(tmp_path / "local" / "web")],
            str(tmp_path / f"mds-{engine}"),
            seq_len=32,
            val_fraction=0.2,
            processes=1,
            progress=False,
            engine=engine,
        )
    assert contents(tmp_path / "mds-spark") == contents(tmp_path / "mds-local")
    (tmp_path / "in" / "web.jsonl").write_text('{"key": "a", "url": null}\n')
    with pytest.raises(ValueError, match=r"web\.jsonl:1: no field 'text'"):
        run(recipe, tmp_path / "bad", engine="spark")
