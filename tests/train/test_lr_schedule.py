"""The learning rate's shape, from its formula."""

import math

import pytest

from dbrx_train.config import LearningRateConfig
from dbrx_train.schedule import Clock
from dbrx_train.train.lr_schedule import learning_rate_factor

CLOCK = Clock.of("100ba", seq_len=5, global_batch_size=2)


def factor(batch: int, **fields: object) -> float:
    config = LearningRateConfig(**fields)  # type: ignore[arg-type]
    return learning_rate_factor(config, CLOCK, batch * 10)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd", "inverse_sqrt"])
def test_warmup_is_linear_and_no_step_has_rate_zero(schedule: str) -> None:
    warming = [factor(b, schedule=schedule, warmup="5ba") for b in range(5)]
    assert warming == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factor(5, schedule=schedule, warmup="5ba") == pytest.approx(1.0)


def test_decays() -> None:
    assert factor(99, schedule="constant") == 1.0
    assert factor(50, schedule="linear", final=0.0) == pytest.approx(0.5)
    assert factor(55, schedule="cosine", warmup="10ba", final=0.1) == pytest.approx(0.55)
    assert factor(25, schedule="cosine", final=0.0) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert factor(100, schedule="cosine", final=0.1) == pytest.approx(0.1)
    assert factor(79, schedule="wsd", decay="0.2dur", final=0.0) == 1.0
    assert factor(90, schedule="wsd", decay="0.2dur", final=0.0) == pytest.approx(0.5)


def test_inverse_square_root_is_llm_foundrys() -> None:
    """``current_factor`` of its scheduler: t_warmup 10ba, t_scale 20ba, t_cooldown 20ba."""
    given = {"schedule": "inverse_sqrt", "warmup": "10ba", "scale": "20ba", "decay": "20ba", "final": 0.02}
    for batch in (10, 30, 79):
        assert factor(batch, **given) == pytest.approx(((batch + 20 - 10) / 20) ** -0.5)
    assert factor(30, **given, floor=0.1) == pytest.approx(0.1 + 0.9 / 2**0.5)
    begin = ((80 + 20 - 10) / 20) ** -0.5
    assert factor(90, **given) == pytest.approx((begin + 0.02) / 2)
    assert factor(100, **given) == pytest.approx(0.02)
    rates = [factor(batch, **given | {"final": 0.9}) for batch in range(10, 100)]
    assert rates == sorted(rates, reverse=True), "it never rises again"
    assert factor(20, schedule="inverse_sqrt", warmup="10ba") == pytest.approx(2**-0.5), "scale is warmup's"


def test_warmup_follows_steps_that_grow() -> None:
    clock = CLOCK.with_batch_size("4ba", 4)
    config = LearningRateConfig(schedule="constant", warmup="6ba")
    seen = [0, 10, 20, 30, 40, 60, 80]
    factors = [learning_rate_factor(config, clock, tokens) for tokens in seen]
    assert factors == pytest.approx([10 / 80, 20 / 80, 30 / 80, 40 / 80, 60 / 80, 1.0, 1.0])
