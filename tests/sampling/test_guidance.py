"""Schedules of the guidance scale."""

from __future__ import annotations

import numpy as np
import pytest

from ar_jax.config import UsageError
from ar_jax.sampling.guidance import SCHEDULES, guidance_scales

HALF = np.sqrt(0.5)


@pytest.mark.parametrize(
    ("schedule", "sizes", "expected"),
    [
        ("constant", (1, 1, 1, 1), [5, 5, 5, 5]),
        ("linear", (1, 1, 1, 1), [2, 3, 4, 5]),
        ("linear", (1, 3, 4), [1.5, 3, 5]),  # by the share of tokens, not of steps
        ("cosine", (1, 1, 1, 1), [3 - 2 * HALF, 3, 3 + 2 * HALF, 5]),
    ],
)
def test_scales_follow_their_schedule(schedule: str, sizes: tuple[int, ...], expected: list[float]) -> None:
    scales = guidance_scales(sizes, 5.0, schedule)
    assert scales.dtype == np.float32
    np.testing.assert_allclose(scales, expected, rtol=1e-6)  # float32


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_ends_with_the_full_scale_and_leaves_scale_one_alone(schedule: str) -> None:
    scales = guidance_scales((2, 1, 5), 3.0, schedule)
    assert scales[-1] == pytest.approx(3.0)
    assert (np.diff(scales) >= 0).all() and (scales >= 1).all()
    np.testing.assert_array_equal(guidance_scales((2, 1, 5), 1.0, schedule), np.ones(3))
    assert guidance_scales((1, 1), 0.0, schedule)[-1] == pytest.approx(0.0)  # the unconditional model


def test_an_unknown_schedule_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UsageError, match="Did you mean 'cosine'"):
        guidance_scales((1, 1), 2.0, "cosin")
