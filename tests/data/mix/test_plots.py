"""The mix as a table."""

from __future__ import annotations

from dbrx_train.data.mix.plots import table
from dbrx_train.data.mix.schedule import MixPoint, MixSchedule
from dbrx_train.schedule import Clock


def test_a_row_is_in_tokens_and_steps_and_counts_are_written_alike() -> None:
    mix = MixSchedule([MixPoint(0, {"web": 3, "code": 1})])
    clock = Clock.of("1000ba", seq_len=2048, global_batch_size=8)
    last = table(mix, {"web": 6000, "code": 8000}, clock, rows=4).splitlines()[-1].split()
    assert last[:5] == ["16,384,000", "1,000", "8", "x", "2048"]
    assert last[5:] == ["0.750", "12,288,000", "1.00", "0.250", "4,096,000", "0.25"]
