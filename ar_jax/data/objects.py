"""Which pixels belong to an object, beside each image: what selection labels are made of (SPA, S026)."""

from __future__ import annotations

import dataclasses

import numpy as np

from ar_jax.config import UsageError
from ar_jax.data.protocol import Dataset, Example, Source


@dataclasses.dataclass(frozen=True)
class WithObjects:
    """A source whose examples have an `object`, bool [H, W]: where any channel of the image is above a threshold.

    Attributes:
      source: the examples, with `image`.
      threshold: in [-1, 1].
    """

    source: Source
    threshold: float

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        """The example, without a batch axis."""
        return self._told(self.source[index])

    def take(self, indices: np.ndarray) -> Example:
        """The examples, stacked."""
        return self._told(self.source.take(indices))

    def _told(self, example: Example) -> Example:
        bright: np.ndarray = np.any(example["image"] > self.threshold, axis=-1)
        return {**example, "object": bright}


def with_objects(data: Dataset, threshold: float) -> Dataset:
    """The data set with objects.

    Raises:
      UsageError: it holds no images, or the threshold is none.
    """
    if "image" not in data.train[0]:
        raise UsageError("config.data.objects tells the objects of images, but the data set holds none; leave it out.")
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not -1 <= threshold < 1:
        raise UsageError(f"config.data.objects={threshold!r} must be a brightness in [-1, 1), such as 0.0.")
    train, test = (WithObjects(source, threshold) for source in (data.train, data.test))
    return dataclasses.replace(data, train=train, test=test)
