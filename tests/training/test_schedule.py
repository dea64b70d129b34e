"""Learning-rate schedules: values by hand, and what must hold for any length."""
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unimo2_paddle.errors import ConfigError
from unimo2_paddle.training.schedule import SCHEDULES, ScheduleConfig, make_schedule


def rates(name, steps, **options):
    rate_at = make_schedule(ScheduleConfig(schedule=name, learning_rate=1.0, **options))
    return [rate_at(step) for step in steps]


def test_linear_warmup_decay_counts_its_line_from_step_0():
    found = rates("linear_warmup_decay", [0, 1, 3, 4, 5, 19, 20, 25], warmup_steps=4, total_steps=20)
    assert found == pytest.approx([0, 0.25, 0.75, 0.8, 0.75, 0.05, 0, 0]), "it never reaches the full rate: 1 - 4/20 after the warm-up"


def test_fleet_linear_counts_its_line_from_the_end_of_the_warm_up():
    found = rates("fleet_linear", [0, 2, 4, 5, 20, 24, 30], warmup_steps=4, total_steps=20)
    assert found == pytest.approx([0, 0.5, 1, 0.95, 0.2, 0, 0]), "at the last step the rate is still 4/20"


def test_the_two_noam_curves_differ_by_one_step():
    assert rates("fleet_noam", [0, 2, 4, 16], warmup_steps=4, total_steps=20) == pytest.approx([0, 0.5, 1, 0.5])
    assert rates("noam", [0, 1, 3, 15], warmup_steps=4, total_steps=20) == pytest.approx([0.25, 0.5, 1, 0.5])


def test_piecewise_drops_at_the_step_named():
    found = rates("piecewise", [0, 9, 10, 14, 15, 99], drop_at_steps=[10, 15], drop_factor=0.1, total_steps=20)
    assert found == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_cosine_and_constant_after_the_warm_up():
    assert rates("cosine", [0, 2, 4, 12, 20, 30], warmup_steps=4, total_steps=20) == pytest.approx([0, 0.5, 1, 0.5, 0, 0])
    assert rates("constant", [0, 2, 4, 19, 100], warmup_steps=4, total_steps=20) == pytest.approx([0, 0.5, 1, 1, 1])


@given(st.sampled_from(SCHEDULES), st.integers(1, 50), st.integers(1, 200), st.floats(1e-6, 10))
def test_a_rate_is_never_negative_never_above_the_full_one_and_scales_with_it(name, warmup, total, rate):
    options = {"schedule": name, "warmup_steps": warmup, "total_steps": total, "drop_at_steps": [total // 2]}
    one, scaled = make_schedule(ScheduleConfig(learning_rate=1.0, **options)), make_schedule(ScheduleConfig(learning_rate=rate, **options))
    for step in range(0, total + warmup + 2, max(1, total // 20)):
        assert 0 <= one(step) <= 1 + 1e-12
        assert scaled(step) == pytest.approx(rate * one(step))


@given(st.sampled_from([s for s in SCHEDULES if s not in ("piecewise", "linear_warmup_decay")]), st.integers(1, 50), st.integers(51, 300))
def test_a_schedule_rises_to_its_top_and_falls_after_it(name, warmup, total):
    found = rates(name, range(total), warmup_steps=warmup, total_steps=total)
    top = found.index(max(found))
    assert found[: top + 1] == sorted(found[: top + 1]) and found[top:] == sorted(found[top:], reverse=True)
    assert max(found) == pytest.approx(1)


@pytest.mark.parametrize("options, complaint", [
    ({"schedule": "linear"}, "is not one of"), ({"schedule": "cosine", "warmup_steps": -1}, "must be >= 0"),
    ({"schedule": "cosine", "total_steps": 0}, ">= 1"), ({"schedule": "noam"}, "needs warmup_steps >= 1"),
])
def test_an_impossible_schedule_is_refused(options, complaint):
    with pytest.raises(ConfigError, match=complaint):
        make_schedule(ScheduleConfig(**options))
