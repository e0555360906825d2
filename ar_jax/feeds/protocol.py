"""A feed is data: what the model is given, step by step, so that it fills that step's slots."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
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
      asked: [n] int32, which of the T fed tokens answer; one without a target pads the step to the length of its run. Or
        [n, R]: an answer is given by up to R fed tokens together, each by another of its R outputs; NOWHERE for none.
      answers: [n] int32, the ranks that are answered; NOWHERE where one only pads.
      members: [T, K] int32, ranks whose values' embeddings are merged where the source is a rank; None embeds the source.
      between: [T, R - 1] int32, the ranks of the tokens that the first outputs give, which the layers behind each of these
        outputs read; NOWHERE for none. None where nothing is read between layers.
      num_remembered: the first so many tokens enter the state; the others read it and are forgotten.
      num_known: all tokens behind the first so many are blank.
      num_readable: the state holds at most so many tokens after this chunk; None where that is not known.
      cell_side: positions count cells of so many places a side; one number serves all axes.
      num_outputs: a fed token has so many outputs, which give the answers in turn: answer i is of output i mod so many.
      segment: [T] int32, tokens of different segments do not read one another; None where there is one.
      part: which of several parts of a model gives all answers, such as a stage of its layers or one of two networks; None
        where there is one, or where answers are of all of them.
      near: tokens read one another where they are near: the sides of a patch, and how many patches away along each axis.
        The prefix is near to all. None where distance does not matter.
      at: [num_remembered] int32, where in the state each of them is put, over what nobody reads any more; None puts each
        behind the last.
    """

    source: np.ndarray | jax.Array
    place: np.ndarray | jax.Array
    target: np.ndarray | jax.Array
    step: np.ndarray | jax.Array
    asked: np.ndarray | jax.Array
    answers: np.ndarray | jax.Array
    num_remembered: int = struct.field(pytree_node=False)
    num_known: int = struct.field(pytree_node=False)
    num_readable: int | None = struct.field(pytree_node=False, default=None)
    members: np.ndarray | jax.Array | None = None
    between: np.ndarray | jax.Array | None = None
    cell_side: int | tuple[int, ...] = struct.field(pytree_node=False, default=1)
    num_outputs: int = struct.field(pytree_node=False, default=1)
    segment: np.ndarray | jax.Array | None = None
    part: int | None = struct.field(pytree_node=False, default=None)
    near: tuple[tuple[int, ...], tuple[int, ...]] | None = struct.field(pytree_node=False, default=None)
    at: np.ndarray | jax.Array | None = None

    def __len__(self) -> int:
        """The number of fed tokens, T."""
        return self.source.shape[-1]

    def stage(self, number: int) -> Chunk:
        """The chunk with the answers of one of its tokens' outputs alone, where nothing but that output is at hand."""
        if self.num_outputs == 1:
            return self
        mine = slice(number, None, self.num_outputs)
        own: dict[str, Any] = {"asked": self.asked[mine], "answers": self.answers[mine]}
        return dataclasses.replace(self, **own, num_outputs=1, part=number)

    def pick(self, hidden: jax.Array) -> jax.Array:
        """The hidden vectors of the answers, [B, n, D], from those of the fed tokens, [B, T, D].

        Where several tokens give an answer, D is R times the width of one output, and an answer is the outputs that give it,
        side by side, divided by how many they are: a linear head without a bias then averages its logits over them.
        """
        asked = jnp.asarray(self.asked)
        batch, length, _ = hidden.shape
        if asked.ndim == 1:
            outputs = hidden.reshape(batch, length * self.num_outputs, -1)
            return jnp.take(outputs, asked * self.num_outputs + np.arange(len(asked)) % self.num_outputs, axis=1)
        count = asked.shape[1]
        outputs = hidden.reshape(batch, length, count, -1)[:, jnp.maximum(asked, 0), jnp.arange(count)[None]]
        given = (asked >= 0).astype(hidden.dtype)
        return (outputs * (given / given.sum(axis=1, keepdims=True))[None, :, :, None]).reshape(batch, len(asked), -1)


@dataclasses.dataclass(frozen=True)
class Feed:
    """What is fed in every step.

    Attributes:
      chunks: one per step.
      remembers: False if each step starts from an empty state, as with masked models; then no parallel form exists, unless
        the steps stand apart.
      apart: each step reads what it is fed and nothing else: at once they are segments, packed behind one another.
      resampled: what is fed for a rank is not its own token, but what the tokenizer makes of all that is known at its
        place before its step (VAR).
      place_axes: the first so many axes of a position tell where a fed token is; None takes all.
      num_transition: learned tokens that are fed between others; their sources are the prefix codes behind the prefix.
      num_held: the state holds so many tokens at a time, and what is put where tells `Chunk.at`; None holds all.
      beside_given: of a step and the ranks that are given [B, L] bool: the step that is fed these values, too, whose source and
        target are [B, T]. None where given tokens are fed in their own steps alone.
    """

    chunks: tuple[Chunk, ...]
    remembers: bool = True
    resampled: bool = False
    place_axes: int | None = None
    num_transition: int = 0
    apart: bool = False
    num_held: int | None = None
    beside_given: Callable[[Chunk, jax.Array], Chunk] | None = None

    @property
    def has_parallel(self) -> bool:
        """Whether all steps can be fed at once."""
        return self.remembers or self.apart

    def parallel(self) -> Chunk:
        """All steps at once, for teacher forcing: what is remembered first, then what only reads."""
        if not self.has_parallel:
            raise UsageError(
                "feed 'mask' keeps nothing between steps, so it has no parallel form; train it with objective 'masked'."
            )
        forgotten = np.concatenate([np.arange(len(c)) >= c.num_remembered for c in self.chunks])
        first = np.argsort(forgotten, kind="stable")
        one = self.chunks[0]
        more = [k for k in ("members", "between") if getattr(one, k) is not None]
        arrays: dict[str, Any] = {
            k: np.concatenate([getattr(c, k) for c in self.chunks])[first] for k in (*_PER_TOKEN, *more)
        }
        moved, starts = np.argsort(first), np.cumsum([0, *(len(c) for c in self.chunks)])
        asked = [
            np.where(c.asked < 0, NOWHERE, moved[c.asked + start])
            for c, start in zip(self.chunks, starts, strict=False)
        ]
        answers = np.concatenate([c.answers for c in self.chunks])
        segment = np.repeat(np.arange(len(self.chunks), dtype=np.int32), [len(c) for c in self.chunks])[first]
        ranks: dict[str, Any] = {k: arrays.pop(k) for k in more}
        remembered = int((~forgotten).sum())
        whole = chunk(**arrays, num_remembered=remembered, asked=np.concatenate(asked), answers=answers)
        ranks |= {"segment": segment} if self.apart else {}
        if one.at is not None:
            ranks["at"] = _last_writes(np.concatenate([np.asarray(c.at) for c in self.chunks]))
        return dataclasses.replace(whole, **ranks, cell_side=one.cell_side, num_outputs=one.num_outputs, near=one.near)

    @property
    def num_outputs(self) -> int:
        """How many outputs of each fed token the answers are taken from."""
        asked = self.chunks[0].asked
        return self.chunks[0].num_outputs if asked.ndim == 1 else asked.shape[1]

    @property
    def max_len(self) -> int:
        """How many tokens the state must hold after the last step."""
        fed = sum(c.num_remembered for c in self.chunks) if self.remembers else 0
        return fed if self.num_held is None else self.num_held

    @property
    def max_step_len(self) -> int:
        """The most tokens that one step adds to the state."""
        return max(c.num_remembered for c in self.chunks) if self.remembers else 0

    def runs(self) -> Iterator[tuple[int, Chunk]]:
        """Consecutive steps of one shape, which one scan can walk.

        Yields:
          The number of the run's first step, and a chunk whose arrays are [steps, ...].
        """
        first, filled = 0, np.cumsum([c.num_remembered for c in self.chunks])
        for i in range(1, len(self.chunks) + 1):
            # The tokenizer has to know which ranks it resamples while the program is built: such steps are runs of one.
            if i == len(self.chunks) or self.resampled or _shape(self.chunks[i]) != _shape(self.chunks[first]):
                run = jax.tree.map(lambda *a: np.stack(a), *self.chunks[first:i])
                readable = min(int(filled[i - 1]), self.max_len) if self.remembers else None
                yield first, dataclasses.replace(run, num_readable=readable)
                first = i


NO_PLACE = np.iinfo(np.int32).max  # where in a state a token is put that is written over in the same piece


def _last_writes(at: np.ndarray) -> np.ndarray:
    """[n] int32, places in the state that tokens are put at one after the other, but NO_PLACE for all that do not stay."""
    places, last = np.unique(at[::-1], return_index=True)
    kept = np.full(len(at), NO_PLACE, np.int32)
    kept[len(at) - 1 - last] = places
    return kept


_PER_TOKEN = ("source", "place", "target", "step")


def _shape(chunk: Chunk) -> tuple[int, ...]:
    return len(chunk), *chunk.asked.shape, chunk.num_remembered, chunk.num_known


Ints = Sequence[int] | np.ndarray


def chunk(
    source: Ints,
    place: Ints,
    target: Ints,
    step: Ints,
    num_remembered: int | None = None,
    asked: Ints | None = None,
    num_known: int | None = None,
    answers: Ints | None = None,
) -> Chunk:
    """A chunk from plain sequences: unless told otherwise all is remembered, and every token with a target answers for it."""
    given = {"source": source, "place": place, "target": target, "step": step}
    arrays: dict[str, Any] = {k: np.asarray(v, np.int32) for k, v in given.items()}
    answering = np.asarray(np.flatnonzero(np.asarray(target) >= 0) if asked is None else asked, np.int32)
    return Chunk(
        **arrays,
        asked=answering,
        answers=np.asarray(arrays["target"][answering] if answers is None else answers, np.int32),
        num_remembered=len(source) if num_remembered is None else num_remembered,
        num_known=len(source) if num_known is None else num_known,
    )


def groups(sizes: Sequence[int]) -> list[np.ndarray]:
    """The ranks of each step."""
    return np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])


def prefix_steps(num_prefix: int) -> np.ndarray:
    """The steps of the prefix, which is read from its first token to its last: the last is of step 0, as the first answers."""
    return np.arange(1 - num_prefix, 1)


def opening(num_prefix: int, size: int, placed: bool) -> Chunk:
    """Step 0 where outputs stand on fed tokens: the last prefix tokens answer, one of them several times if they are few.

    Args:
      num_prefix: prefix tokens, P.
      size: tokens of the first step.
      placed: the answering tokens have the positions that they answer for; without it only where there are several.
    """
    num_lead = max(num_prefix - size, 0) if num_prefix >= size else num_prefix - 1
    answering = np.minimum(num_lead + np.arange(size), num_prefix - 1)
    ranks = np.arange(size)
    nowhere = np.full(num_lead, NOWHERE)
    return chunk(
        source=[prefix_source(int(p)) for p in (*range(num_lead), *answering)],
        place=np.concatenate([nowhere, ranks if placed or size > 1 else [NOWHERE]]),
        target=np.concatenate([nowhere, ranks]),
        step=np.concatenate([np.arange(-num_lead, 0), np.zeros(size)]),
    )
