"""What a data set is: two sources of examples and the few facts that the rest of the library asks for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal, Protocol

import numpy as np

Modality = Literal["image", "video", "text", "episodes"]
Example = Mapping[str, np.ndarray]
"""One example, or a batch of them with a leading axis.

Images: `image` float32 [H, W, C] in [-1, 1] and `label` int32 [] (0 where there are no classes).
Videos: `video` float32 [T, H, W, C], T frames, and `label`.
Text: `text` uint8 [length], and `label` where there are classes.
Episodes: `seed` int32 [], of an environment's chance.

Some data tell more: `prompt` (see `ar_jax.data.prompts`), `object` (see `ar_jax.data.objects`).
"""


class Source(Protocol):
    """Random access to examples: one by one, as grain reads, or many at once, as batches are made.

    One that draws a part of its examples has `take_drawn(indices, uniform)`, too: of numbers [B] drawn evenly from [0, 1).

    Both are pure functions of the index and safe to call from several threads.
    """

    def __len__(self) -> int:
        """The number of examples, at least 1."""

    def __getitem__(self, index: int) -> Example:
        """The example at `index`, without a batch axis."""

    def take(self, indices: np.ndarray) -> Example:
        """The examples at `indices` int [B], stacked along a new first axis."""


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a data set is, without its examples: all that building a system needs.

    Attributes:
      modality: "image", "video", "text" or "episodes".
      shape: (H, W, C) of an image, (T, H, W, C) of a video, (length,) of a text, or (numbers,) of an observation.
      levels: how many values a channel or a byte can take; an image's lie evenly from -1 to 1. Of no meaning for episodes.
      label_names: one name per class, empty where there are no classes.
    """

    modality: Modality
    shape: tuple[int, ...]
    levels: int = 256
    label_names: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """The number of classes, 0 where there are none."""
        return len(self.label_names)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset(Facts):
    """Examples to train on, examples held out, and what they are.

    Attributes:
      train: the examples to learn from.
      test: the examples held out, in a fixed order.
      told: bool of the examples' shape, the part that asks for the rest; None where examples are no questions. Evaluation
        gives it, and tells how often the rest is drawn as it is in the example.
      judge: metrics of samples [N, ...], by name, that only these data have a measure for; None where there is none.
    """

    train: Source
    test: Source
    told: np.ndarray | None = None
    judge: Callable[[np.ndarray], dict[str, float]] | None = None
