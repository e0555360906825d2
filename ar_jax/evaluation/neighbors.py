"""Memorisation: the training image nearest to each sample, by the root mean square of the differences of their pixels."""

from __future__ import annotations

import dataclasses

import numpy as np

from ar_jax.data.protocol import Dataset, Source
from ar_jax.evaluation import pictures
from ar_jax.evaluation.manifolds import nearest
from ar_jax.evaluation.reference import images_of, to_values

QUANTILE = 0.05
PAIRS = 10  # in a row of the picture


@dataclasses.dataclass(frozen=True)
class Neighbors:
    """Samples and held-out images, and the training images nearest to them; pixels lie in [-1, 1].

    Attributes:
      samples: [N, H, W, C].
      found: [N, H, W, C], the training image nearest to each sample.
      rms: [N], the root mean square of the differences.
      held_out_rms: [M], of held-out images to the training images nearest to them.
    """

    samples: np.ndarray
    found: np.ndarray
    rms: np.ndarray
    held_out_rms: np.ndarray

    def metrics(self) -> dict[str, float]:
        """Means of both distances; and `near_train_fraction` of the samples.

        That is the part nearer to a training image than all but 5 % of the held-out images are: 0.05 if samples are as new as
        those, near 1 if training images are repeated. Samples that are blurred may be near for that reason alone.
        """
        limit = np.quantile(self.held_out_rms, QUANTILE)
        return {
            "nearest_train_rms": float(self.rms.mean()),
            "nearest_train_rms_of_held_out": float(self.held_out_rms.mean()),
            "near_train_fraction": float((self.rms < limit).mean()),
        }

    def picture(self) -> np.ndarray:
        """The samples nearest to training images above those, uint8 [H, W, 3]."""
        order, rows = np.argsort(self.rms, kind="stable")[: 3 * PAIRS], []
        for first in range(0, len(order), PAIRS):
            here = order[first : first + PAIRS]
            rows += [("sample", self.samples[here]), ("nearest", self.found[here])]
        return pictures.grid(rows, "samples nearest to training images")


def neighbors_of(samples: np.ndarray, data: Dataset, rounded: bool) -> Neighbors:
    """Looks through all training images.

    Args:
      samples: [N, H, W, C], values 0 to 255.
      data: its training images, and as many of its held-out images for comparison.
      rounded: whether values are whole ones.
    """
    count = min(len(samples), len(data.test))
    own = to_values(np.asarray(data.test.take(np.arange(count))["image"]), rounded)
    rows = np.concatenate([samples, own]) / np.float32(127.5) - 1
    indices = _nearest_in(rows, data.train)
    found = np.concatenate(
        [np.asarray(data.train.take(indices[i : i + 512])["image"]) for i in range(0, len(indices), 512)]
    )
    found = to_values(found, rounded) / np.float32(127.5) - 1
    rms = np.sqrt(np.square(rows.astype(np.float64) - found).mean(axis=(1, 2, 3)))
    n = len(samples)
    return Neighbors(rows[:n], found[:n], rms[:n], rms[n:])


def _nearest_in(rows: np.ndarray, source: Source) -> np.ndarray:
    """The number of the image of a source nearest to each row, [N]."""
    flat, first = rows.reshape(len(rows), -1), 0
    best, indices = np.full(len(rows), np.inf), np.zeros(len(rows), np.int64)
    for images in images_of(source):
        distances, here = nearest(flat, images.reshape(len(images), -1), 1)
        nearer = distances[:, 0] < best
        best, indices = np.where(nearer, distances[:, 0], best), np.where(nearer, first + here[:, 0], indices)
        first += len(images)
    return indices
