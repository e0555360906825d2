"""A feed is data: what the model is given, step by step, so that it fills that step's slots."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from flax import struct

from ar_jax.config import UsageError

BLANK = -1  # the source of a token that carries no value: a query, or a mask
NOWHERE = -1  # the place of a token without a position, the target of a token that is asked for nothing


def prefix_source(index: int) -> int:
    """The source code of prefix token `index` (class, text or start embeddings stand in front of all tokens)."""
    return -2 - index


@struct.dataclass
class Chunk:
    """Tokens that are fed together. Tokens of the sequence are named by their rank in the order of generation.

    Attributes:
      source: [T] int32, the rank whose value is embedded, BLANK, or a prefix code.
      place: [T] int32, the rank whose position the fed token has, or NOWHERE.
      target: [T] int32, the rank that this token's output predicts, or NOWHERE.
      step: [T] int32: a token reads all remembered tokens of the same or an earlier step.
      num_remembered: the first so many tokens enter the state; the others read it and are forgotten.
    """

    source: np.ndarray | jax.Array
    place: np.ndarray | jax.Array
    target: np.ndarray | jax.Array
    step: np.ndarray | jax.Array
    num_remembered: int = struct.field(pytree_node=False)

    def __len__(self) -> int:
        """The number of fed tokens, T."""
        return len(self.source)


@dataclasses.dataclass(frozen=True)
class Feed:
    """What is fed in every step.

    Attributes:
      chunks: one per step.
      remembers: False if each step starts from an empty state, as with masked models; then no parallel form exists.
    """

    chunks: tuple[Chunk, ...]
    remembers: bool = True

    def parallel(self) -> Chunk:
        """All steps at once, for teacher forcing: what is remembered first, then what only reads."""
        if not self.remembers:
            raise UsageError(
                "feed 'mask' keeps nothing between steps, so it has no parallel form; train it with objective 'masked'."
            )
        arrays = {
            k: np.concatenate([getattr(c, k) for c in self.chunks]) for k in ("source", "place", "target", "step")
        }
        forgotten = np.concatenate([np.arange(len(c)) >= c.num_remembered for c in self.chunks])
        first = np.argsort(forgotten, kind="stable")
        return Chunk(**{k: v[first] for k, v in arrays.items()}, num_remembered=int((~forgotten).sum()))

    @property
    def max_len(self) -> int:
        """How many tokens the state must hold after the last step."""
        return sum(c.num_remembered for c in self.chunks) if self.remembers else 0

    @property
    def max_step_len(self) -> int:
        """The most tokens that one step adds to the state."""
        return max(c.num_remembered for c in self.chunks) if self.remembers else 0

    def runs(self) -> Iterator[tuple[int, Chunk]]:
        """Consecutive steps of one shape, which one scan can walk.

        Yields:
          The number of the run's first step, and a chunk whose arrays are [steps, T]; its targets stand at the same
          places in every step.
        """
        first = 0
        for i in range(1, len(self.chunks) + 1):
            if i == len(self.chunks) or _shape(self.chunks[i]) != _shape(self.chunks[first]):
                yield first, jax.tree.map(lambda *a: np.stack(a), *self.chunks[first:i])
                first = i


def _shape(chunk: Chunk) -> tuple[object, ...]:
    return chunk.num_remembered, tuple((np.asarray(chunk.target) >= 0).tolist())


Ints = Sequence[int] | np.ndarray


def chunk(source: Ints, place: Ints, target: Ints, step: Ints, num_remembered: int | None = None) -> Chunk:
    """A chunk from plain sequences; everything is remembered unless told otherwise."""
    arrays = {"source": source, "place": place, "target": target, "step": step}
    remembered = len(source) if num_remembered is None else num_remembered
    return Chunk(**{k: np.asarray(v, np.int32) for k, v in arrays.items()}, num_remembered=remembered)


def groups(sizes: Sequence[int]) -> list[np.ndarray]:
    """The ranks of each step."""
    return np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])


def opening(num_prefix: int, size: int) -> Chunk:
    """Step 0 where outputs stand on fed tokens: the prefix, its last token once for each of the step's targets."""
    lead = [prefix_source(p) for p in range(num_prefix - 1)]
    ranks = list(range(size))
    return chunk(
        source=lead + [prefix_source(num_prefix - 1)] * size,
        place=[NOWHERE] * len(lead) + (ranks if size > 1 else [NOWHERE]),
        target=[NOWHERE] * len(lead) + ranks,
        step=[0] * (len(lead) + size),
    )
