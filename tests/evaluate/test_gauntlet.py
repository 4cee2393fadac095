"""Aggregation: categories, random baselines, averages, and what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from dbrx_train.evaluate.gauntlet import read_gauntlet
from dbrx_train.evaluate.outcomes import Result
from dbrx_train.evaluate.table import table

YAML = """
eval_gauntlet:
  weighting: EQUAL
  averages: {core: [sums, words]}
  categories:
  - name: sums
    benchmarks:
    - {name: plus, num_fewshot: 0, random_baseline: 0.5}
    - {name: minus, num_fewshot: 3, random_baseline: 0.0}
  - name: words
    benchmarks:
    - {name: nouns, num_fewshot: 0, random_baseline: 0.25}
"""


def results(**scores: tuple[float, int]) -> dict[str, Result]:
    shots = {"plus": 0, "minus": 3, "nouns": 0}
    return {
        f"{name}/{shots[name]}-shot": Result("accuracy", score, examples, 0.5, 1.5, 0)
        for name, (score, examples) in scores.items()
    }


def gauntlet(folder: Path, text: str) -> Path:
    path = folder / "gauntlet.yaml"
    path.write_text(text)
    return path


def test_scores_above_chance_are_averaged_alike(tmp_path: Path) -> None:
    made = read_gauntlet(gauntlet(tmp_path, YAML))
    found = results(plus=(0.75, 100), minus=(0.1, 4), nouns=(0.4, 7))
    categories, averages = made.standings(found)
    assert categories["sums"].score == pytest.approx((0.5 + 0.1) / 2)
    assert categories["words"].score == pytest.approx(0.15 / 0.75)
    assert averages["core"].score == pytest.approx((0.3 + 0.2) / 2)
    assert averages["all"].score == pytest.approx((0.5 + 0.1 + 0.2) / 3)
    shown = table(found, made, (categories, averages)).splitlines()
    assert shown[1].split() == ["sums", "0.300"]
    assert shown[2].split() == ["plus/0-shot", "100", "0.750", "0.500", "0.500", "1.500"]
    assert shown[-2].split() == ["core", "0.250"]


def test_weights_follow_the_number_of_examples(tmp_path: Path) -> None:
    found = results(plus=(0.75, 16), minus=(0.1, 4))
    for weighting, wanted in (
        ("SAMPLE_SZ", (0.5 * 16 + 0.1 * 4) / 20),
        ("LOG_SAMPLE_SZ", (0.5 * 4 + 0.1 * 2) / 6),
    ):
        made = read_gauntlet(gauntlet(tmp_path, YAML.replace("EQUAL", weighting)))
        assert made.standings(found)[0]["sums"].score == pytest.approx(wanted)


def test_a_category_that_lacks_a_benchmark_is_partial_and_to_foundry_nothing(tmp_path: Path) -> None:
    made = read_gauntlet(gauntlet(tmp_path, YAML))
    found = results(plus=(0.75, 100), nouns=(0.4, 7))
    categories, averages = made.standings(found)
    assert categories["sums"].score == pytest.approx(0.5)
    assert categories["sums"].missing == ["minus/3-shot"]
    assert averages["core"].missing == ["sums"]
    assert "core (partial: 1 missing)" in table(found, made, (categories, averages))
    categories, averages = made.standings(found, as_foundry=True)
    assert list(categories) == ["words"]
    assert averages["core"].score == pytest.approx(categories["words"].score)
    assert made.standings({}) == ({}, {})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("weighting: EQUAL", "weighting: ALIKE"), "weighting: 'ALIKE' is not one of EQUAL"),
        (("[sums, words]", "[sums, wrods]"), "averages.core: no category wrods; did you mean words?"),
        (("weighting:", "wieghting:"), "unknown key eval_gauntlet.wieghting; did you mean weighting?"),
        (("random_baseline: 0.25", "baseline: 0.25"), "categories: each has a name and benchmarks"),
        (("core:", "sums:"), "averages: sums is the name of something else"),
        (("eval_gauntlet", "gauntlet"), "has no categories"),
    ],
)
def test_what_is_wrong_with_a_gauntlet_is_one_line(
    tmp_path: Path, change: tuple[str, str], said: str
) -> None:
    with pytest.raises(ValueError, match=r"gauntlet\.yaml") as caught:
        read_gauntlet(gauntlet(tmp_path, YAML.replace(*change)))
    assert said in str(caught.value)
