"""Schedules of the guidance scale."""

from __future__ import annotations

import numpy as np
import pytest

from ar_jax.config import UsageError
from ar_jax.sampling.guidance import SCHEDULES, guidance_scales, temperature_factors

HALF = np.sqrt(0.5)


@pytest.mark.parametrize(
    ("schedule", "sizes", "expected"),
    [
        ("constant", (1, 1, 1, 1), [5, 5, 5, 5]),
        ("linear", (1, 1, 1, 1), [2, 3, 4, 5]),
        ("linear", (1, 3, 4), [1.5, 3, 5]),  # by the share of tokens, not of steps
        ("linear_mar", (1, 3, 4), [1.5, 3, 4.5]),
        ("linear_steps", (1, 5, 9), [1, 3, 5]),
        ("linear_before", (1, 5, 9, 9), [1, 2, 3, 4]),
        ("cosine", (1, 1, 1, 1), [1, 3 - 2 * HALF, 3, 3 + 2 * HALF]),
    ],
)
def test_scales_follow_their_schedule(schedule: str, sizes: tuple[int, ...], expected: list[float]) -> None:
    scales = guidance_scales(sizes, 5.0, schedule)
    assert scales.dtype == np.float32
    np.testing.assert_allclose(scales, expected, rtol=1e-6)  # float32


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_rises_to_at_most_the_full_scale_and_leaves_scale_one_alone(schedule: str) -> None:
    scales = guidance_scales((2, 1, 5), 3.0, schedule)
    assert (np.diff(scales) >= 0).all() and (scales >= 1).all() and 1 < scales[-1] <= 3
    np.testing.assert_array_equal(guidance_scales((2, 1, 5), 1.0, schedule), np.ones(3))


def test_a_power_bends_the_cosine_and_only_the_first_steps_may_be_guided() -> None:
    bent = guidance_scales((1,) * 4, 5.0, "cosine", power=2.0)
    np.testing.assert_allclose(bent, 1 + 2 * (1 - np.cos(np.pi * (np.arange(4) / 4) ** 2)), rtol=1e-6)  # float32
    np.testing.assert_array_equal(guidance_scales((1,) * 4, 5.0, num_guided=2), [5, 5, 1, 1])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [1, 1, 1, 1]), ("linear", [0.75, 0.5, 0.25, 0]), ("annealed", [0.825, 0.45, 0.175, 0])],
)
def test_the_temperature_falls_to_nothing_in_the_last_step(schedule: str, expected: list[float]) -> None:
    np.testing.assert_allclose(temperature_factors(4, schedule), expected, atol=1e-7)  # float32


def test_an_unknown_schedule_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UsageError, match="Did you mean 'cosine'"):
        guidance_scales((1, 1), 2.0, "cosin")
