"""Batches: every example once per epoch, in an order fixed by the seed, whatever the number of processes."""

import json
import time

import numpy as np
import pytest

from ar_jax.config import UsageError
from ar_jax.data import pipeline
from ar_jax.data.arrays import TextArrays, image_dataset
from ar_jax.data.protocol import Dataset


def numbered(num_train=10, num_test=7):
    """Images that show their own number, brighter to the right."""
    images = np.arange(num_train + num_test, dtype=np.uint8)[:, None, None] + np.array([0, 100], np.uint8)
    labels = np.arange(num_train + num_test)
    train, test = (images[:num_train], labels[:num_train]), (images[num_train:], labels[num_train:])
    return image_dataset(train, test, "numbered", label_names=[str(label) for label in labels])


def labels_of(iterator, count):
    return [next(iterator)["label"].tolist() for _ in range(count)]


def assert_same_batches(first, second, count):
    for _ in range(count):
        a, b = next(first), next(second)
        np.testing.assert_array_equal(a["label"], b["label"])
        np.testing.assert_array_equal(a["image"], b["image"])


@pytest.mark.parametrize("batch_size", [1, 3, 4, 5, 10])
def test_every_example_comes_once_per_epoch_and_epochs_differ(batch_size):
    stream = np.concatenate(labels_of(pipeline.train_iterator(numbered(), batch_size, seed=0), 30 // batch_size))
    epochs = stream[: len(stream) // 10 * 10].reshape(-1, 10)
    for epoch in epochs:
        assert sorted(epoch) == list(range(10))
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    assert all(list(epoch) != sorted(epoch) for epoch in epochs)


def test_the_seed_fixes_the_order():
    first, same, other = (labels_of(pipeline.train_iterator(numbered(), 4, seed), 9) for seed in (3, 3, 4))
    assert first == same != other


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    "done", [0, 1, 2, 3, 5]
)  # 10 examples in fours: batch 2 crosses the epoch's end, batch 5 begins one
@pytest.mark.parametrize("num_threads", [0, 2])
def test_a_saved_position_goes_on_with_the_same_batches(done, flip, num_threads):
    def make():
        return pipeline.train_iterator(numbered(), 4, seed=5, flip=flip, num_threads=num_threads)

    iterator, again = make(), make()
    labels_of(iterator, done)
    state = json.dumps(iterator.get_state())
    labels_of(again, 7)  # where the other stands does not matter
    again.set_state(json.loads(state))
    assert json.dumps(again.get_state()) == state
    assert_same_batches(iterator, again, 6)


def test_prefetching_does_not_move_the_position():
    iterator = pipeline.train_iterator(numbered(), 4, seed=5, num_threads=4)
    states = [(next(iterator), iterator.get_state())[1] for _ in range(3)]
    time.sleep(0.05)  # let the threads run ahead
    assert iterator.get_state() == states[-1]
    assert len({str(state) for state in states}) == 3


@pytest.mark.parametrize("process_count", [2, 4])
def test_the_processes_together_read_what_one_would(process_count):
    whole = pipeline.train_iterator(numbered(), 8, seed=2, flip=True)
    rows = np.split(np.arange(8), process_count)
    parts = [pipeline.train_iterator(numbered(), 8, 2, own, flip=True) for own in rows]
    for _ in range(6):
        batch, shares = next(whole), [next(part) for part in parts]
        assert all(len(share["label"]) == 8 // process_count for share in shares)
        for key in batch:
            np.testing.assert_array_equal(np.concatenate([share[key] for share in shares]), batch[key])


def test_flips_mirror_about_half_of_the_images_and_nothing_else():
    iterator, plain = (pipeline.train_iterator(numbered(), 10, 7, flip=flip) for flip in (True, False))
    flipped = []
    for _ in range(40):
        batch, expected = next(iterator), next(plain)
        np.testing.assert_array_equal(batch["label"], expected["label"])
        for image, original in zip(batch["image"], expected["image"], strict=True):
            flipped.append(image[0, 0] > image[0, 1])
            np.testing.assert_array_equal(image[:, ::-1] if flipped[-1] else image, original)
    assert 140 < sum(flipped) < 260  # 6 standard deviations of 400 coin tosses
    assert np.ptp(
        np.reshape(flipped, (40, 10)).astype(int), axis=0
    ).all()  # no row of the batch is always treated alike


@pytest.mark.parametrize(("batch_size", "process_count"), [(4, 1), (4, 2), (7, 1), (1, 1), (16, 4)])
def test_one_ordered_pass_covers_the_held_out_examples_in_equal_batches(batch_size, process_count):
    rows = np.split(np.arange(batch_size), process_count)
    shares = [list(pipeline.test_batches(numbered(), batch_size, own)) for own in rows]
    labels = np.concatenate([share["label"] for batch in zip(*shares, strict=True) for share in batch])
    weights = np.concatenate([batch["weight"] for batch in shares[-1]])
    assert {len(batch["label"]) for share in shares for batch in share} == {batch_size // process_count}
    assert weights.dtype == np.float32 and weights.tolist() == [1] * 7 + [0] * (len(weights) - 7)
    assert len(weights) == -(-7 // batch_size) * batch_size
    assert labels[:7].tolist() == list(range(10, 17)) and set(labels[7:]) <= {16}


def test_the_held_out_pass_can_be_repeated():
    batches = pipeline.test_batches(numbered(), 4)
    first, second = ([batch["label"].tolist() for batch in batches] for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(batch_size=11), "more than the 10 training examples"),
        (dict(batch_size=0), "must be at least 1"),
        (dict(batch_size=4, seed=-1), "seed=-1 is negative"),
    ],
    ids=str,
)
def test_impossible_batches_are_refused(options, says):
    with pytest.raises(UsageError, match=says):
        pipeline.train_iterator(numbered(), **{"seed": 0, **options})


def test_text_is_not_mirrored():
    text = TextArrays(np.zeros((9, 5), np.uint8))
    with pytest.raises(UsageError, match="flip=False"):
        pipeline.train_iterator(Dataset("text", (5,), train=text, test=text), 2, 0, flip=True)


def test_worker_processes_read_the_same_batches():
    iterator = pipeline.train_iterator(numbered(), 4, seed=5, num_workers=1)
    assert_same_batches(iterator, pipeline.train_iterator(numbered(), 4, seed=5), 3)
    state = json.loads(json.dumps(iterator.get_state()))
    iterator.set_state(state)
    expected = pipeline.train_iterator(numbered(), 4, seed=5)
    labels_of(expected, 3)
    assert_same_batches(iterator, expected, 3)
    iterator.close()
