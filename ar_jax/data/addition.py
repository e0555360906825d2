"""Sums of two numbers, written out as they are on paper (addition of any length, S201, arXiv:2406.00075): made, not read."""

from __future__ import annotations

import numpy as np

from ar_jax.config import UsageError
from ar_jax.data.arrays import image_dataset
from ar_jax.data.protocol import Dataset

BASE = 10


def load_addition(num_digits: int = 2, num_train: int = 20_000, num_test: int = 500, seed: int = 0) -> Dataset:
    """Pictures [4, num_digits, 1] of ten levels: two numbers, digit under digit, and the sums of their columns.

    Column j, counted from the right, holds the digits a_j and b_j, the unit of a_j + b_j + carry_{j-1}, and below it its ten,
    carry_j, which is 0 or 1. So the third row, and in front of it the last carry, is the sum. The digits are uniform; a pair
    of numbers that is held out is not among those to learn from unless there are too few others.

    Args:
      num_digits: of each of the two numbers.
      num_train: sums to learn from.
      num_test: sums held out.
      seed: of the numbers.

    Raises:
      UsageError: a number of digits or sums below 1.
    """
    for name, value in (("num_digits", num_digits), ("num_train", num_train), ("num_test", num_test)):
        if value < 1:
            raise UsageError(f"config.data.{name}={value} must be at least 1.")
    random = np.random.default_rng(seed)
    digits = random.integers(0, BASE, (num_train + num_test, 2, num_digits), np.uint8)
    train, test = digits[:num_train], digits[num_train:]
    held_out = {pair.tobytes() for pair in test}
    other = np.asarray([pair.tobytes() not in held_out for pair in train])
    if other.any():  # each of the others takes the place of one that is held out
        train = np.where(other[:, None, None], train, train[other][np.arange(num_train) % other.sum()])
    data = image_dataset((written(train), None), (written(test), None), "sums", levels=BASE)
    told = np.zeros(data.shape, bool)
    told[:2] = True
    return Dataset("image", data.shape, BASE, train=data.train, test=data.test, told=told)


def written(digits: np.ndarray) -> np.ndarray:
    """Pairs of numbers as digits [N, 2, D] with their column sums, uint8 [N, 4, D]: two digits, unit, ten."""
    columns = digits.astype(int).sum(axis=1)
    for j in range(columns.shape[1] - 2, -1, -1):
        columns[:, j] += columns[:, j + 1] // BASE
    rows = np.stack([columns % BASE, columns // BASE], axis=1)
    return np.concatenate([digits, rows], axis=1).astype(np.uint8)
