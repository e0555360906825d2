"""Another image of the same class beside each example, as a prompt (VF prompt, S014, arXiv:2502.16965)."""

from __future__ import annotations

import dataclasses

import numpy as np

from ar_jax.config import UsageError
from ar_jax.data.protocol import Dataset, Example, Source

_AT_ONCE = 4096  # examples that are read together, for their labels


@dataclasses.dataclass(frozen=True)
class Prompted:
    """A source whose examples have a `prompt`: what another example of their class is.

    Attributes:
      source: the examples, with `label` and `image` or `tokens`.
      by_class: int [N], the examples, class by class.
      place: int [N], where each example stands in it.
      start: int [N], where the class of each example begins in it.
      count: int [N], how many examples its class has.
    """

    source: Source
    by_class: np.ndarray
    place: np.ndarray
    start: np.ndarray
    count: np.ndarray

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        """The example, without a batch axis."""
        return {key: value[0] for key, value in self.take(np.asarray([index])).items()}

    def take(self, indices: np.ndarray) -> Example:
        """Examples with prompts that are always the same."""
        return self.take_drawn(indices, np.random.default_rng(0).random(len(self))[indices])

    def take_drawn(self, indices: np.ndarray, uniform: np.ndarray) -> Example:
        """Examples with prompts drawn evenly from the others of their class; the example itself where there is no other.

        Args:
          indices: int [B].
          uniform: [B], drawn evenly from [0, 1).
        """
        others = np.maximum(self.count[indices] - 1, 1)
        further = np.where(self.count[indices] > 1, 1 + np.floor(uniform * others).astype(int), 0)
        places = (self.place[indices] - self.start[indices] + further) % self.count[indices] + self.start[indices]
        batch = self.source.take(indices)
        prompts = self.source.take(self.by_class[places])
        return {**batch, "prompt": prompts["tokens" if "tokens" in prompts else "image"]}


def prompted(source: Source) -> Prompted:
    """The source with prompts. Reads all examples once for their labels, which takes long of images that lie on a disk."""
    starts = range(0, len(source), _AT_ONCE)
    label = np.concatenate(
        [source.take(np.arange(i, min(i + _AT_ONCE, len(source))))["label"] for i in starts], dtype=np.int64
    )
    by_class = np.argsort(label, kind="stable")
    place = np.empty_like(by_class)
    place[by_class] = np.arange(len(label))
    per_class = np.bincount(label)
    return Prompted(source, by_class, place, (np.cumsum(per_class) - per_class)[label], per_class[label])


def with_prompts(data: Dataset) -> Dataset:
    """The data set with prompts, which are of the same split as their examples.

    Raises:
      UsageError: it has no classes.
    """
    if not data.num_classes:
        raise UsageError(
            "config.data.prompts=True shows another example of the class, but the data set has no classes."
        )
    return dataclasses.replace(data, train=prompted(data.train), test=prompted(data.test))
