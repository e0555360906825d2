"""Digits that move: short videos made of scikit-learn's digits, after Moving MNIST (arXiv:1502.04681); nothing to fetch."""

from __future__ import annotations

import numpy as np

from ar_jax.config import UsageError
from ar_jax.data.arrays import image_dataset
from ar_jax.data.digits import NUM_TEST
from ar_jax.data.protocol import Dataset

DIGIT = 8  # pixels a side


def load_moving_digits(num_frames: int = 4, side: int = 10, seed: int = 0) -> Dataset:
    """Videos [num_frames, side, side, 1] of 17 grey levels, one of each of the 1,797 digits; the last 360 are held out.

    A digit starts anywhere on the black canvas and goes at most one pixel a frame along each axis, but does not stand still;
    from the canvas's edge it comes back. The class is the digit.

    Args:
      num_frames: of a video.
      side: of the canvas, at least a digit's 8 pixels.
      seed: of the places and ways.

    Raises:
      UsageError: no frames, or a canvas that is too small.
    """
    from sklearn import datasets  # here, because it takes a second to import

    if num_frames < 1 or side < DIGIT:
        raise UsageError(f"config.data.num_frames={num_frames} must be at least 1, and side={side} at least {DIGIT}.")
    digits = datasets.load_digits()
    paths = bouncing(np.random.default_rng(seed), len(digits.images), num_frames, side - DIGIT)
    videos = np.zeros((len(paths), num_frames, side, side), np.uint8)
    number, frame = np.arange(len(paths))[:, None, None, None], np.arange(num_frames)[:, None, None]
    row, col = (paths[..., axis, None] + np.arange(DIGIT) for axis in (0, 1))  # [N, T, 8]
    videos[number, frame, row[..., :, None], col[..., None, :]] = digits.images[:, None].astype(np.uint8)
    train, test = (videos[:-NUM_TEST], digits.target[:-NUM_TEST]), (videos[-NUM_TEST:], digits.target[-NUM_TEST:])
    return image_dataset(train, test, "moving digits", levels=17, modality="video")


def bouncing(random: np.random.Generator, count: int, num_frames: int, span: int) -> np.ndarray:
    """[count, num_frames, 2] int, places from 0 to `span` along two axes of points that the ends of both throw back."""
    ways = np.asarray([(r, c) for r in (-1, 0, 1) for c in (-1, 0, 1) if r or c])
    start = random.integers(0, span + 1, (count, 1, 2))
    way = ways[random.integers(0, len(ways), count)][:, None]
    unfolded = (start + way * np.arange(num_frames)[:, None]) % max(2 * span, 1)
    return np.minimum(unfolded, 2 * span - unfolded)
