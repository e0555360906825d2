"""scikit-learn's embedded handwritten digits: 1,797 images of 8x8, 17 grey levels, 10 classes; no file to fetch."""

from __future__ import annotations

import numpy as np

from ar_jax.data.arrays import image_dataset
from ar_jax.data.protocol import Dataset

NUM_TEST = 360


def load_digits() -> Dataset:
    """The 8x8 digits; the last 360 of the 1,797 are held out."""
    from sklearn import datasets  # here, because it takes a second to import

    digits = datasets.load_digits()
    images, labels = digits.images.astype(np.uint8), digits.target
    train = images[:-NUM_TEST], labels[:-NUM_TEST]
    return image_dataset(train, (images[-NUM_TEST:], labels[-NUM_TEST:]), "scikit-learn's digits", levels=17)
