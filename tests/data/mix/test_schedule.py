"""The schedule's promises: exact shares at every moment, and a past that edits cannot touch."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dbrx_train.data.mix.schedule import MixPoint, MixSchedule
from dbrx_train.schedule import Clock

NAMES = ("web", "code", "books", "chat", "maths", "wiki")
TICKS = np.arange(201)


@st.composite
def schedules(draw: st.DrawFn, most_sources: int = 6) -> MixSchedule:
    names = NAMES[: draw(st.integers(1, most_sources))]
    times = [0, *sorted(draw(st.sets(st.integers(1, 150), max_size=4)))]
    weight = st.one_of(st.just(0.0), st.floats(1e-3, 10))
    points = []
    for at in times:
        weights = draw(
            st.dictionaries(st.sampled_from(names), weight, min_size=1).filter(lambda w: any(w.values()))
        )
        points.append(MixPoint(at, weights, draw(st.sampled_from(["step", "linear"]))))
    return MixSchedule(points, sources=names, canonical_nodes=draw(st.sampled_from([1, 2, 4, 8])))


def exact_integral(mix: MixSchedule) -> np.ndarray[Any, Any]:
    """The integral of the weights asked for, by the trapezium rule between ticks, at TICKS."""
    right = np.array([list(mix.weights_at(t).values()) for t in TICKS])
    left = np.array([list(mix.weights_at(t, "left").values()) for t in TICKS])
    steps = (right[:-1] + left[1:]) / 2
    return np.vstack([np.zeros(len(mix.sources)), np.cumsum(steps, 0)])


@settings(max_examples=60, deadline=None)
@given(schedules())
def test_every_prefix_is_within_the_bound_of_the_exact_integral(mix: MixSchedule) -> None:
    exact, nodes = exact_integral(mix), mix.canonical_nodes
    assert np.abs(mix.expected(TICKS) - exact).max() < 0.01
    assert np.abs(mix.totals(TICKS) / nodes - exact).max() < mix.max_deviation + 0.01
    counts = mix.counts(TICKS[:, None], np.arange(nodes))
    assert (counts.sum(-1) == TICKS[:, None]).all()
    assert (np.diff(counts, axis=0) >= 0).all()


@settings(max_examples=60, deadline=None)
@given(schedules(most_sources=4))
def test_up_to_four_sources_stay_within_one_sample_per_canonical_node(mix: MixSchedule) -> None:
    assert mix.max_deviation <= 1


@pytest.mark.parametrize("nodes", [1, 2, 64])
def test_two_sources_stay_within_half_a_sample_in_total(nodes: int) -> None:
    mix = MixSchedule([MixPoint(0, {"a": 2, "b": 1})], canonical_nodes=nodes)
    assert np.abs(mix.totals(TICKS) - nodes * mix.expected(TICKS)).max() <= 0.5 + 1e-6


def test_many_nodes_are_out_of_step_so_that_one_tick_already_has_the_mix() -> None:
    mix = MixSchedule([MixPoint(0, {"a": 50, "b": 30, "c": 20})], canonical_nodes=64)
    assert np.abs(mix.totals(TICKS) - 64 * mix.expected(TICKS)).max() < 4


@settings(max_examples=40, deadline=None)
@given(schedules(), st.integers(0, 150), st.integers(0, 7))
def test_order_is_the_difference_of_counts_from_any_start(mix: MixSchedule, start: int, node: int) -> None:
    node %= mix.canonical_nodes
    source, number = mix.order(start, start + 50, node)
    seen = mix.counts(start, node)
    for s, k in zip(source, number, strict=True):
        assert seen[s] == k
        seen[s] += 1
    assert (seen == mix.counts(start + 50, node)).all()


def test_a_trillion_token_ramp_is_answered_exactly_and_at_once() -> None:
    billion = 10**9
    points = [MixPoint(0, {"a": 1.0}), MixPoint(2 * billion, {"b": 1.0}, "linear")]
    mix = MixSchedule(points)
    assert mix.counts(billion).tolist() == [750_000_000, 250_000_000]
    assert mix.counts(3 * billion).tolist() == [billion, 2 * billion]


@settings(max_examples=60, deadline=None)
@given(schedules(), st.integers(1, 150), st.integers(0, 30), st.data())
def test_an_edited_future_leaves_what_was_served_and_goes_on_from_there(
    old: MixSchedule, at: int, later: int, data: st.DataObject
) -> None:
    points = [p for c in old._revisions for p in c.points]
    kept = [p for p in points if p.at < at]
    following = [p for p in points if p.at >= at]
    if following and following[0].interpolation == "linear":
        kept.append(MixPoint(at, old.weights_at(at, "left"), "linear"))
        later += 1
    future = data.draw(st.dictionaries(st.sampled_from((*old.sources, "new")), st.floats(0.1, 1), min_size=1))
    asked = MixSchedule(
        [*kept, MixPoint(at + later, future)],
        sources=("new", *old.sources),
        canonical_nodes=old.canonical_nodes,
    )
    new = asked.resume(old, at)
    nodes = np.arange(old.canonical_nodes)
    past = TICKS[: at + 1, None]
    assert (new.counts(past, nodes)[..., : len(old.sources)] == old.counts(past, nodes)).all()
    counts = new.counts(TICKS[:, None], nodes)
    assert new.sources[: len(old.sources)] == old.sources
    assert (counts.sum(-1) == TICKS[:, None]).all()
    assert (np.diff(counts, axis=0) >= 0).all()
    assert np.abs(new.totals(TICKS) / len(nodes) - exact_integral(new)).max() < new.max_deviation + 0.51
    again = MixSchedule.from_dict(new.to_dict())
    assert (again.counts(TICKS[:, None], nodes) == counts).all()
    assert asked.resume(again, at + 100).to_dict() == again.to_dict()


def test_a_longer_run_changes_nothing_while_the_resolved_past_is_the_same() -> None:
    raw: list[dict[str, Any]] = [
        {"at": "0tok", "weights": {"a": 3, "b": 1}},
        {"at": "0.5dur", "weights": {"b": 1}},
    ]
    short, longer = (
        MixSchedule.from_config(raw, Clock.of(duration, seq_len=8, global_batch_size=4))
        for duration in ("100ba", "200ba")
    )
    assert (longer.resume(short, 200).counts(200) == short.counts(200)).all()
    assert longer.resume(short, 200).weights_at(399)["a"] == 0.75
    with pytest.raises(
        ValueError, match=r"^mix: the past cannot change: at sample 200 it was b 1 and is now a 0.75"
    ):
        longer.resume(short, 201)


def test_a_changed_past_is_refused_and_shown() -> None:
    old = MixSchedule([MixPoint(0, {"a": 1, "b": 1}), MixPoint(100, {"b": 1}, "linear")], canonical_nodes=2)
    with pytest.raises(ValueError, match=r"it was a 0.5, b 0.5 and is now a 0.25, b 0.75") as caught:
        MixSchedule([MixPoint(0, {"a": 1, "b": 3})], canonical_nodes=2).resume(old, 50)
    assert "sample 100 (it was a 0.25, b 0.75 there)" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"^sources.a: "):
        MixSchedule([MixPoint(0, {"b": 1})], canonical_nodes=2).resume(old, 50)
    with pytest.raises(ValueError, match=r"^canonical_nodes: is 4"):
        MixSchedule([MixPoint(0, {"a": 1, "b": 1})], canonical_nodes=4).resume(old, 50)


@pytest.mark.parametrize("at", [50, 100, 130])
def test_the_refusal_of_a_changed_past_gives_the_points_that_keep_it(at: int) -> None:
    """In the middle of a ramp, at its end and after it; the edit has a ramp of its own there."""
    old = MixSchedule([MixPoint(0, {"a": 1, "b": 1}), MixPoint(100, {"b": 1}, "linear")], canonical_nodes=2)
    asked = MixSchedule(
        [MixPoint(0, {"a": 1}), MixPoint(20, {"a": 1, "b": 3}), MixPoint(200, {"a": 1, "b": 1}, "linear")],
        sources=old.sources,
        canonical_nodes=2,
    )
    with pytest.raises(ValueError, match="this keeps it: mix: ") as caught:
        asked.resume(old, at)
    points = yaml.safe_load(str(caught.value).partition("this keeps it: mix: ")[2])
    clock = Clock.of("1000sp", seq_len=8, global_batch_size=2)
    pasted = MixSchedule.from_config(points, clock, sources=old.sources, canonical_nodes=2)
    new = pasted.resume(old, at)
    past = np.arange(at + 1)
    assert (new.totals(past) == old.totals(past)).all()
    for tick in (at + 2, 180, 250):
        assert new.weights_at(tick) == pytest.approx(asked.weights_at(tick))


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([], r"^mix: the first point"),
        ([{"at": "5ba", "weights": {"a": 1}}], r"^mix: the first point"),
        ([{"at": "soon", "weights": {"a": 1}}], r"^mix\[0\].at: 'soon' is not a time"),
        ([{"at": "-1ba", "weights": {"a": 1}}], r"^mix\[0\].at: '-1ba' is not a time"),
        ([{"at": 0, "weights": {"a": -1}}], r"^mix\[0\].weights.a: -1"),
        ([{"at": 0, "weights": {"a": float("nan")}}], r"^mix\[0\].weights.a: nan"),
        ([{"at": 0, "weights": {"a": 0}}], r"^mix\[0\].weights: all are 0"),
        ([{"at": 0, "weights": {}}], r"^mix\[0\].weights: all are 0"),
        ([{"at": 0, "weights": {"c": 1}}], r"^mix\[0\].weights.c: no such source; use a, b"),
        (
            [{"at": 0, "weights": {"a": 1}, "interpolation": "jump"}],
            r"^mix\[0\].interpolation: 'jump' is unknown",
        ),
        ([{"at": 0, "weight": {"a": 1}}], r"^mix\[0\].weight: unknown key"),
        ([{"at": 0}], r"^mix\[0\].weights: is missing"),
        (
            [
                {"at": 0, "weights": {"a": 1}},
                {"at": "9ba", "weights": {"a": 1}},
                {"at": "9ba", "weights": {"b": 1}},
            ],
            r"^mix\[2\].at: comes no later",
        ),
    ],
)
def test_bad_mixes_are_refused_in_one_line(points: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        MixSchedule.from_config(points, Clock.of("99ba", seq_len=8, global_batch_size=2), sources=("a", "b"))
    assert "\n" not in str(caught.value)


def test_repetition_is_counted_warned_of_and_limited() -> None:
    mix = MixSchedule([MixPoint(0, {"a": 1, "b": 1})])
    assert mix.repetition({"a": 100, "b": 50}, 200) == {"a": 1.0, "b": 2.0}
    with pytest.warns(UserWarning, match=r"mix: b is read 5.0 times"):
        mix.repetition({"a": 200, "b": 20}, 200)
    with pytest.raises(
        ValueError, match=r"^sources.b.max_epochs: .* 5.00 times, not 2; it runs out at sample 81"
    ):
        mix.repetition({"a": 200, "b": 20}, 200, {"b": 2})


def test_it_is_imported_without_torch_or_streaming() -> None:
    heavy = "{'torch', 'streaming', 'composer'}"
    code = f"import sys, dbrx_train.data.mix.schedule; print({heavy} & set(sys.modules))"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert found.stdout.strip() == "set()"
