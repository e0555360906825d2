"""ListOps (arXiv:1804.06028) at the lengths of the Long Range Arena (arXiv:2011.04006): made, not read."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from ar_jax.config import UsageError
from ar_jax.data.protocol import Dataset, Example

OPERATIONS: dict[str, Callable[[Sequence[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: int(np.median(values)),
    "[SM": lambda values: sum(values) % 10,
}
WORDS = ("", *map(str, range(10)), *OPERATIONS, "]")  # a text's characters; the first fills up
_DEEPER = 0.25  # how often an argument is a list


@dataclasses.dataclass(frozen=True)
class ListOps:
    """A source of nested lists; example i is made when it is asked for, from the seed and i alone.

    Attributes:
      count: how many there are.
      seed: of all of them.
      min_length: no text has fewer words.
      max_length: no text has more.
      max_depth: of nested lists.
      max_arguments: of a list.
    """

    count: int
    seed: tuple[int, int]
    min_length: int
    max_length: int
    max_depth: int
    max_arguments: int

    def __len__(self) -> int:
        """How many there are."""
        return self.count

    def __getitem__(self, index: int) -> Example:
        """`text` uint8 [length] and `label` int32 []."""
        draw = np.random.default_rng((*self.seed, int(index)))
        while True:
            words: list[int] = []
            value = self._argument(draw, 1, words)
            if self.min_length <= len(words) <= self.max_length:
                text = np.zeros(self.max_length, np.uint8)
                text[: len(words)] = words
                return {"text": text, "label": np.asarray(value, np.int32)}

    def take(self, indices: np.ndarray) -> Example:
        """`text` uint8 [B, length] and `label` int32 [B]."""
        examples = [self[i] for i in indices]
        return {key: np.stack([example[key] for example in examples]) for key in ("text", "label")}

    def _argument(self, draw: np.random.Generator, depth: int, words: list[int]) -> int:
        """Appends a number or a list to the words, and returns its value; stops early where the text is too long."""
        if depth > 1 and (depth >= self.max_depth or draw.random() > _DEEPER):
            value = int(draw.integers(10))
            words.append(1 + value)
            return value
        name = list(OPERATIONS)[draw.integers(len(OPERATIONS))]
        words.append(WORDS.index(name))
        values = []
        for _ in range(draw.integers(2, self.max_arguments, endpoint=True)):
            values.append(self._argument(draw, depth + 1, words))
            if len(words) > self.max_length:
                return 0
        words.append(len(WORDS) - 1)
        return OPERATIONS[name](values)


def load_listops(
    min_length: int = 500,
    max_length: int = 2000,
    max_depth: int = 10,
    max_arguments: int = 10,
    num_train: int = 96_000,
    num_test: int = 2_000,
    seed: int = 0,
) -> Dataset:
    """Texts such as [MAX 4 [SM 3 9 ] 0 ], whose value is the class; see `ListOps`.

    `text` holds numbers of WORDS, 0 behind the end; `label` is the value, one of ten. One argument in four is a list, as in
    the Long Range Arena, whose parentheses around all of them say nothing and are left out.

    Args:
      min_length: in words.
      max_length: in words, and the length of all texts.
      max_depth: of nested lists, the numbers included.
      max_arguments: of a list; the least is 2.
      num_train: texts to learn from.
      num_test: texts held out; they are made from other seeds.
      seed: of the texts.

    Raises:
      UsageError: an option that no text fits.
    """
    longest = functools.reduce(lambda inside, _: 2 + max_arguments * inside, range(max_depth - 1), 1)
    fits = 4 <= min_length <= max_length and max_depth >= 2 and max_arguments >= 2 and min_length <= longest
    if not fits or num_train < 1 or num_test < 1:
        raise UsageError(
            f"config.data: no list of depth {max_depth} and {max_arguments} arguments has {min_length} to {max_length} words, "
            f"or num_train={num_train} or num_test={num_test} is below 1; use a min_length of 4 to {longest}."
        )
    options = (min_length, max_length, max_depth, max_arguments)
    train, test = (ListOps(count, (seed, split), *options) for split, count in enumerate((num_train, num_test)))
    names = tuple(map(str, range(10)))
    return Dataset("text", (max_length,), len(WORDS), names, train=train, test=test)
