"""Written sums are sums."""

from __future__ import annotations

import numpy as np
import pytest

from ar_jax.config import UsageError
from ar_jax.data.addition import load_addition


def rows_of(data, source) -> np.ndarray:
    """[N, 4, D] digits."""
    images = source.take(np.arange(len(source)))["image"][..., 0]
    return np.round((images + 1) / 2 * (data.levels - 1)).astype(int)


def number(digits) -> int:
    return int("".join(map(str, digits)))


def test_the_third_row_behind_the_last_carry_is_the_sum_of_the_first_two() -> None:
    data = load_addition(num_digits=30, num_train=5, num_test=20)
    for a, b, units, tens in rows_of(data, data.test):
        assert number([tens[0], *units]) == number(a) + number(b)
        assert tens.max() == 1
    np.testing.assert_array_equal(data.told[..., 0], np.repeat([[True], [True], [False], [False]], 30, axis=1))


def test_what_is_held_out_is_not_learned_from() -> None:
    data = load_addition(num_digits=2, num_train=3000, num_test=100)
    train, test = ({tuple(x.ravel()) for x in rows_of(data, part)} for part in (data.train, data.test))
    assert len(test) > 90 and not train & test


def test_no_digits_are_told() -> None:
    with pytest.raises(UsageError, match="num_digits=0 must be at least 1"):
        load_addition(num_digits=0)
