"""The clock's arithmetic: what a run has seen, in tokens, samples and steps of changing size."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbrx_train.schedule import Clock, Unit, parse_time

CLOCK = Clock.of("100ba", seq_len=5, global_batch_size=2)


@pytest.mark.parametrize(
    ("text", "number", "unit"),
    [("0tok", 0, "tok"), (0, 0, "tok"), ("2B tok", 2 * 10**9, "tok"), ("2_000_000tok", 2 * 10**6, "tok"),
     (" 1.5K tok ", 1500, "tok"), ("0.7dur", 0.7, "dur"), ("3e2ba", 300, "ba"), ("3sp", 3, "sp")],
)  # fmt: skip
def test_times(text: str | int, number: float, unit: str) -> None:
    value, found = parse_time(text, "at")
    assert (float(value), found) == (number, unit)


@pytest.mark.parametrize("text", ["", "10", "ba", "-1ba", "1ep", "0.5", "ten ba"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^warmup: .* is not a time"):
        CLOCK.tokens(text, "warmup")


def test_the_last_batch_is_whole() -> None:
    clock = Clock.of("1001tok", seq_len=50, global_batch_size=2)
    assert (clock.total_batches, clock.total_tokens, clock.total_samples) == (11, 1100, 22)
    assert clock.tokens("0.5dur") == 550
    assert [clock.interval(text) for text in ("101tok", "2.5ba", "0.5dur", "3sp")] == [
        "101tok",
        "3ba",
        "550tok",
        "3sp",
    ]


def test_changes_take_effect_at_the_first_step_that_begins_then_or_later() -> None:
    clock = CLOCK.with_batch_size("21tok", 4).with_batch_size("8ba", 8).with_seq_len("95tok", 20)
    assert [(s.batch, s.token, s.sample, s.global_batch_size, s.seq_len) for s in clock.stages] == [
        (0, 0, 0, 2, 5),
        (3, 30, 6, 4, 5),
        (7, 110, 22, 1, 20),
        (8, 130, 23, 2, 20),
    ]
    assert clock.total_tokens == 130 + 92 * 40
    assert clock.tokens("10ba") == 210
    assert clock.tokens("24sp") == 150
    assert clock.samples("120tok") == Fraction(45, 2)
    assert clock.before_end("2ba") == clock.total_tokens - 80
    assert clock.before_end("0.25dur") == round(0.75 * clock.total_tokens)
    assert clock.before_end("1T tok") == 0


def test_changes_out_of_order_or_relative_to_what_they_change_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^until: '0.5dur' is relative to the run's length; write it like"):
        CLOCK.with_batch_size("0.5dur", 4)
    for early in ("0tok", "20tok"):
        with pytest.raises(ValueError, match=rf"^until: '{early}' leaves no step for this size"):
            CLOCK.with_batch_size("20tok", 4).with_batch_size(early, 8)


@st.composite
def clocks(draw: st.DrawFn) -> Clock:
    seq_len = draw(st.integers(1, 4))
    clock = Clock.of("1000tok", seq_len=seq_len, global_batch_size=24)
    at = 0
    for size in draw(st.lists(st.sampled_from([24, 48, 72]), max_size=3)):
        at += draw(st.integers(300, 500))
        clock = clock.with_batch_size(f"{at}tok", size)
    for times in draw(st.lists(st.sampled_from([2, 3, 6]), max_size=2)):
        clock = clock.with_seq_len(f"{draw(st.integers(0, 1500))}tok", seq_len * times)
    return clock


@given(
    clocks(), st.integers(0, 3000), st.sampled_from(["tok", "sp", "ba"]), st.sampled_from(["tok", "sp", "ba"])
)
def test_units_convert_there_and_back_in_order(clock: Clock, number: int, unit: Unit, to: Unit) -> None:
    there = clock.convert(number, unit, to)
    assert clock.convert(there, to, unit) == number
    assert clock.convert(number + 1, unit, to) > there
    assert (
        clock.total_tokens
        >= 1000
        > clock.total_tokens - clock.stage(clock.total_batches - 1, "ba").tokens_per_batch
    )
    for before, stage in zip(clock.stages, clock.stages[1:], strict=False):
        assert before.at_batch(stage.batch).token == stage.token
        assert before.at_batch(stage.batch).sample == stage.sample
