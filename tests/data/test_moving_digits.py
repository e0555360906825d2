"""Digits that move, and boxes cut from what moves."""

from __future__ import annotations

import numpy as np
from PIL import Image
from sklearn import datasets

from ar_jax.data.crops import boxes_of, load_crops
from ar_jax.data.moving_digits import bouncing, load_moving_digits


def test_a_digit_stays_what_it_is_and_goes_a_pixel_at_most() -> None:
    data = load_moving_digits(num_frames=5, side=11)
    videos = np.round((data.test.take(np.arange(360))["video"][..., 0] + 1) * 8).astype(int)
    digits = datasets.load_digits().images[1437:].astype(int)
    assert (videos.sum(axis=(2, 3)) == digits.sum(axis=(1, 2))[:, None]).all()
    windows = np.lib.stride_tricks.sliding_window_view(videos, (8, 8), axis=(2, 3))
    found = (windows == digits[:, None, None, None]).all(axis=(4, 5))
    assert found.any(axis=(2, 3)).all()  # in every frame, somewhere
    np.testing.assert_array_equal(data.test.take(np.arange(360))["label"], datasets.load_digits().target[1437:])


def test_points_bounce_between_the_ends() -> None:
    paths = bouncing(np.random.default_rng(0), 500, 9, 3)
    assert paths.min() == 0 and paths.max() == 3
    steps = np.abs(np.diff(paths, axis=1))
    assert steps.max() == 1 and (steps.max(axis=2) == 1).all()  # nothing stands still
    turns = np.diff(paths[:, :, 0], axis=1)
    inner = (paths[:, 1:-1, 0] > 0) & (paths[:, 1:-1, 0] < 3)
    assert (turns[:, 1:] == turns[:, :-1])[inner].all() and (turns[:, 1:] == -turns[:, :-1])[~inner].all()
    assert not bouncing(np.random.default_rng(0), 5, 4, 0).any()


def test_boxes_are_where_they_were_cut() -> None:
    frames = np.arange(5 * 5 * 7).reshape(5, 5, 7, 1)
    boxes = boxes_of(frames, (2, 2, 3))
    assert boxes.shape == (2 * 2 * 2, 2, 2, 3, 1)
    np.testing.assert_array_equal(boxes[0, ..., 0], frames[:2, :2, :3, 0])
    np.testing.assert_array_equal(boxes[1, ..., 0], frames[:2, :2, 3:6, 0])
    np.testing.assert_array_equal(boxes[-1, ..., 0], frames[2:4, 2:4, 3:6, 0])


def test_pictures_are_shrunken_and_their_right_side_is_held_out(tmp_path) -> None:
    image = np.zeros((8, 20, 3), np.uint8)
    image[:, :, 1] = np.repeat(np.arange(10), 2) * 20  # green grows by the pair of columns
    Image.fromarray(image).save(tmp_path / "a.png")
    data = load_crops(str(tmp_path / "a.png"), height=2, width=2, shrink=2, test_fraction=0.2)
    assert data.shape == (2, 2, 1) and len(data.train) == 2 * 4 and len(data.test) == 2 and data.label_names == ("a",)
    levels = np.round((data.test[0]["image"][..., 0] + 1) * 127.5)
    np.testing.assert_array_equal(levels, np.round(np.asarray([[160, 180]] * 2) * 0.587))
