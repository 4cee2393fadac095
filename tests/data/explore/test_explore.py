"""A corpus as a page: what is counted, found and shown."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from dbrx_train.data.explore.corpus import PASSAGE, read_corpus, sources_of
from dbrx_train.data.explore.explore import explore
from dbrx_train.data.explore.filters import TermFilter, term_filters
from dbrx_train.data.explore.signals import SIGNALS, frequent_ngrams, signals
from dbrx_train.data.prepare.pipeline import prepare
from dbrx_train.data.prepare.text_template import text_template
from dbrx_train.data.tokenizer import load_tokenizer

pytest.importorskip("sklearn", reason="the extra explore")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TOPICS = {
    "sea": ["ship", "sail", "harbour", "captain", "anchor", "tide", "storm", "sailor", "deck", "mast"],
    "law": [
        "court",
        "judge",
        "statute",
        "appeal",
        "verdict",
        "counsel",
        "clause",
        "plaintiff",
        "ruling",
        "trial",
    ],
}
COMMON = ["the", "of", "and", "with", "under", "for", "when"]
TEXT = text_template("text", None)


def story(topic: str, number: int) -> str:
    pick = random.Random(f"{topic} {number}")
    return " ".join(pick.choices(TOPICS[topic] + COMMON, k=60)) + "."


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw ``sea`` with five texts twice, three of ``law`` among it; prepared ``law``; a curated folder."""
    root = tmp_path_factory.mktemp("explore")
    sea = [story("sea", i) for i in range(60)] + [story("sea", i).upper() for i in range(5)]
    law = [story("law", i) for i in range(60)]
    for name, texts in (("sea", sea + law[:3]), ("law", law)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare([str(root / "law.jsonl")], str(root / "law"), seq_len=256, processes=1, val_fraction=0)
    for name in ("one", "two"):
        (root / "curated" / name).mkdir(parents=True)
        shutil.copy(root / f"{'sea' if name == 'one' else 'law'}.jsonl", root / "curated" / name / "0.jsonl")
    (root / "curated" / "curation.json").write_text("{}")
    return root


def test_sources_are_what_folders_say(corpus: Path) -> None:
    found = sources_of([str(corpus / "sea.jsonl"), str(corpus / "law"), str(corpus / "curated")])
    assert [(source.name, source.kind) for source in found] == [
        ("sea", "raw"),
        ("law", "prepared"),
        ("one", "curated"),
        ("two", "curated"),
    ]
    assert [source.name for source in sources_of([str(corpus)])] == ["law"]
    with pytest.raises(ValueError, match="none: no such file or folder"):
        sources_of([str(corpus / "none")])


def test_passages_are_of_their_documents_and_sizes_those_of_the_corpus(corpus: Path) -> None:
    sources = sources_of([str(corpus / "sea.jsonl"), str(corpus / "law")])
    read_corpus(sources, 60, TEXT, (), None, lambda stage: None)
    raw, prepared = sources
    lines = [json.loads(line)["text"] for line in (corpus / "sea.jsonl").read_text().splitlines()]
    assert (raw.documents, raw.text_bytes) == (68, sum(map(len, lines)))
    assert len(raw.passages) == 30
    for passage in raw.passages:
        line = int(passage.place.removeprefix(f"{corpus}/sea.jsonl:"))
        assert passage.text in lines[line - 1]
        assert 0 < len(passage.text) <= PASSAGE
    assert prepared.documents == 60
    laws = [json.loads(line)["text"] for line in (corpus / "law.jsonl").read_text().splitlines()]
    for passage in prepared.passages:
        assert passage.text in laws[int(passage.place.rpartition(":")[2]) - 1]
    assert len(np.unique(raw.keys)) == 63, "five are there twice"


def test_a_page_finds_topics_and_duplicates(corpus: Path, tmp_path: Path) -> None:
    given = [str(corpus / "sea.jsonl"), str(corpus / "law.jsonl")]
    out, again = tmp_path / "a.html", tmp_path / "b.html"
    for path in (out, again):
        explore(given, path, passages=100, clusters=2, template=TEXT, suffixes=())
    assert out.read_bytes() == again.read_bytes()
    page = out.read_text()
    assert "5 (7.4%)" in page, "within"
    assert "3 (5.0%)" in page, "of law in sea"
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    for title in data["clusters"]:
        assert len({*title.split(", ")} & {*TOPICS["sea"]}) in (0, 4), "of one topic alone"
    assert "http://" not in page
    assert "https://" not in page


def test_a_cluster_is_a_filter() -> None:
    texts = [story(topic, i) for topic in TOPICS for i in range(50)]
    cluster = np.repeat([0, 1], 50)
    for number, found in enumerate(term_filters(texts, cluster, list(TOPICS.values()))):
        assert (found.precision, found.recall) == (1.0, 1.0)
        matched = [found.filter.matches(text) for text in texts]
        assert matched == (cluster == number).tolist()
        assert "drop_if_at_least: " in found.recipe("title")
    assert TermFilter(("sea", "law"), 2).matches("The LAW of the sea.")
    assert not TermFilter(("sea", "law"), 2).matches("The lawless sea, sea")


def test_signals_say_what_they_are_called() -> None:
    text = "one two\none two\n1234\n"
    ((words, length, letters, digits, repeated, ratio),) = signals([text], load_tokenizer())
    assert len(SIGNALS) == 6
    assert (words, length) == (5, 16 / 5)
    assert (letters, digits, repeated) == (12 / 21, 4 / 21, 7 / 21)
    assert 1 < ratio < 5
    assert frequent_ngrams(["a b c d e f g", "x a b c d e f", "a b c d e y", "other"]) == [("a b c d e", 3)]


def test_too_little_text_is_one_line(tmp_path: Path) -> None:
    for text, said in (("", "nothing in it to read|holds no text"), ("word", "too few words in common")):
        (tmp_path / "a.txt").write_text(text)
        with pytest.raises(ValueError, match=said) as caught:
            explore(
                [str(tmp_path)],
                tmp_path / "x.html",
                passages=9,
                clusters=2,
                template=TEXT,
                suffixes=(".txt",),
            )
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "x.html").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_the_page_searches_and_filters_offline(corpus: Path, tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    out = tmp_path / "a.html"
    given = [str(corpus / "sea.jsonl"), str(corpus / "law.jsonl")]
    explore(given, out, passages=100, clusters=2, template=TEXT, suffixes=())
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_context(offline=True).new_page()
        wrong: list[str] = []
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(out.as_uri())
        page.wait_for_selector("html[data-ready]", timeout=30_000)
        count = page.locator("#count")
        assert count.inner_text().startswith("100 of 100 passages")
        page.fill("#search", "anchor")
        some = int(count.inner_text().split()[0])
        assert 0 < some < 60
        page.fill("#search", "anchor nowhere")
        assert count.inner_text().startswith("0 of 100")
        page.click("#reset")
        page.click("#legend button:first-child")
        assert count.inner_text().startswith("50 of 100")
        page.click("#reset")
        page.click("[data-cluster='0']")
        assert 0 < int(count.inner_text().split()[0]) < 100
        page.fill("#low", "100000")
        assert count.inner_text().startswith("0 of 100")
        assert not wrong
        browser.close()
