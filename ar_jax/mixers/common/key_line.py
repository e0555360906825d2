"""Keys and values in a line: the remembered tokens in time order, without gaps, for mixers that read by index."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from ar_jax.mixers.protocol import Tokens, segment_starts, take, time_order

NO_BLOCK = 2**29  # where a block begins that there is not: behind all tokens


@struct.dataclass
class KeyLine:
    """Keys and values of the remembered tokens, the first at place 0.

    Attributes:
      k: [B, K, S, H], heads first: so a head's tokens lie behind one another, and blocks of them are read as they lie.
      v: [B, K, S, H].
      count: [B] int32, how many there are.
    """

    k: Array
    v: Array
    count: Array

    @property
    def size(self) -> int:
        """How many tokens there is room for."""
        return self.k.shape[2]

    @property
    def keys(self) -> Array:
        """[B, S, K, H], as attention takes them."""
        return jnp.swapaxes(self.k, 1, 2)

    @property
    def values(self) -> Array:
        """[B, S, K, H], as attention takes them."""
        return jnp.swapaxes(self.v, 1, 2)


@struct.dataclass
class Reach:
    """Between which places of the line each token reads.

    Attributes:
      first: [B, T] int32, where its segment begins.
      limit: [B, T] int32, behind the last token that it reads: itself, or, if it leaves no trace, the one before.
      place: [B, T] int32, where it stands; the size of the line where it leaves no trace.
    """

    first: Array
    limit: Array
    place: Array


def block_begins(reach: Reach, line: KeyLine, size: int) -> Array:
    """Where blocks of `size` tokens begin that are counted anew in each segment, [B, T], those there are in front.

    As many as there are tokens, at worst; behind the last one NO_BLOCK.
    """
    opens = (reach.place < line.size) & ((reach.place - reach.first) % size == 0)
    return jnp.sort(jnp.where(opens, reach.place, NO_BLOCK), axis=1)


def empty_line(batch_size: int, size: int, heads: int, head_dim: int, dtype: Any) -> KeyLine:
    """A line with room for `size` tokens."""
    zeros = jnp.zeros((batch_size, heads, size, head_dim), dtype)
    return KeyLine(zeros, jnp.zeros_like(zeros), jnp.zeros(batch_size, jnp.int32))


def in_time(arrays: Any, tokens: Tokens) -> tuple[Any, Array | None, Array | None, Any]:
    """Arrays [B, T, ...] in time order; which tokens leave a trace; which begin a segment; and the way back.

    See `in_time_order`: None stands for all, and for none.
    """
    segment = tokens.segment
    if tokens.num_remembered == tokens.step.shape[1] and not tokens.padded:
        return arrays, None, None if segment is None else segment_starts(segment), lambda a: a
    forward, backward, writes = time_order(tokens)
    starts = None if segment is None else segment_starts(take(segment, forward))
    return jax.tree.map(lambda a: take(a, forward), arrays), writes, starts, lambda a: take(a, backward)


def extended(line: KeyLine, k: Array, v: Array, writes: Array | None, starts: Array | None) -> tuple[KeyLine, Reach]:
    """The line with further tokens, [B, T, K, H] in time order, and what each of them reads of it."""
    (batch, length), size = k.shape[:2], line.size
    written = jnp.ones((batch, length), jnp.int32) if writes is None else writes.astype(jnp.int32)
    written = jnp.broadcast_to(written, (batch, length))
    own = line.count[:, None] + jnp.cumsum(written, axis=1) - written
    place = jnp.where(written > 0, own, size)
    first = jnp.zeros_like(own)
    if starts is not None:
        first = jax.lax.cummax(jnp.where(starts, own, 0), axis=1)
    write = jax.vmap(lambda a, i, new: a.at[:, i].set(jnp.swapaxes(new, 0, 1).astype(a.dtype), mode="drop"))
    count = line.count + written.sum(axis=1)
    return KeyLine(write(line.k, place, k), write(line.v, place, v), count), Reach(first, own + written, place)
