import numpy as np
import pytest

from ar_jax.config import UsageError, build
from ar_jax.training.tables import SCHEDULES

# kind, options, {step: rate over peak}; 100 steps, 10 of them warm-up
RATES = [
    ("constant", {}, {0: 0.0, 5: 0.5, 10: 1.0, 100: 1.0}),
    ("cosine", {}, {0: 0.0, 10: 1.0, 55: 0.5, 100: 0.0}),
    ("cosine", {"final_scale": 0.1}, {10: 1.0, 55: 0.55, 100: 0.1, 200: 0.1}),
    ("warmup_stable_decay", {"decay_fraction": 0.2}, {5: 0.5, 10: 1.0, 80: 1.0, 90: 0.5, 100: 0.0}),
    ("warmup_stable_decay", {"decay_fraction": 0.0}, {10: 1.0, 99: 1.0}),
    (
        "warmup_stable_decay",
        {"decay_fraction": 0.2, "cosine_decay": True, "final_scale": 0.2},
        {80: 1.0, 90: 0.6, 100: 0.2},
    ),
    (
        "warmup_stable_decay",
        {"decay_fraction": 0.4, "stage_ends": (0.5, 1.0)},
        {5: 0.5, 10: 1.0, 30: 1.0, 40: 0.5, 50: 0.0, 55: 0.5, 60: 1.0, 80: 1.0, 90: 0.5, 100: 0.0},
    ),
    (
        "infinite",
        {"constant_scale": 0.5},
        {5: 0.5, 10: 1.0, 25: 0.75, 40: 0.5, 80: 0.5, 90: (0.5 * 0.01) ** 0.5, 100: 0.01},
    ),
    ("infinite", {"anneal_fraction": 0.0}, {40: 0.5, 100: 0.5, 1000: 0.5}),
]


@pytest.mark.parametrize(("kind", "options", "rates"), RATES)
def test_each_schedule_has_the_rates_of_its_definition(kind, options, rates):
    schedule = build(SCHEDULES, {"kind": kind, **options}, "schedule", peak=2.0, num_steps=100, **{"warmup_steps": 10})
    found = {step: float(schedule(step)) / 2.0 for step in rates}
    assert found == pytest.approx(rates, abs=1e-6)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_without_warmup_the_first_rate_is_the_peak(kind):
    assert np.isclose(SCHEDULES[kind](3.0, 100)(0), 3.0)


def test_every_schedule_has_a_row():
    assert {row[0] for row in RATES} == set(SCHEDULES)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("cosine", {"warmup_steps": 101}, "warmup_steps=101"),
        ("constant", {"warmup_steps": -1}, "warmup_steps=-1"),
        ("cosine", {"final_scale": 2.0}, "final_scale=2.0"),
        ("warmup_stable_decay", {"decay_fraction": -0.5}, "decay_fraction=-0.5"),
        ("infinite", {"cooldown_fraction": 0.9, "anneal_fraction": 0.2}, "take 110 steps"),
        ("infinite", {"final_scale": 0.0}, "above 0"),
        ("warmup_stable_decay", {"stage_ends": (0.5, 0.9)}, "must rise from above 0 to 1"),
    ],
)
def test_phases_that_do_not_fit_are_refused(kind, options, words):
    with pytest.raises(UsageError, match=words):
        SCHEDULES[kind](1.0, 100, **options)
