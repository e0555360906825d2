"""Tokens by their place on a grid: which of them stands where, for mixers that read a few places and not the others."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from ar_jax.mixers.protocol import NEVER, Tokens, take


@struct.dataclass
class Places:
    """Keys and values by place: the prefix's tokens, which have none, then the grid's in raster order.

    Attributes:
      k: [B, P + places, K, H].
      v: [B, P + places, K, H].
      step: [B, P + places] int32, NEVER where no token has come yet.
    """

    k: Array
    v: Array
    step: Array

    def put(self, slot: Array, k: Array, v: Array, step: Array) -> Places:
        """With tokens k, v [B, T, K, H] of these steps [B or 1, T] at slots [B or 1, T]; those behind the last are dropped."""
        step = jnp.broadcast_to(step, (len(self.step), step.shape[1]))

        def write(table: Array, new: Array) -> Array:
            new = new.astype(table.dtype)
            if len(slot) == 1:
                return table.at[:, slot[0]].set(new, mode="drop")
            return jax.vmap(lambda row, at, values: row.at[at].set(values, mode="drop"))(table, slot, new)

        return Places(write(self.k, k), write(self.v, v), write(self.step, step))


def empty_places(batch_size: int, count: int, heads: int, head_dim: int, dtype: jnp.dtype) -> Places:
    """The state before the first token, for so many places."""
    entries = jnp.zeros((batch_size, count, heads, head_dim), dtype)
    # Two arrays, not one twice: a sampler donates its state, and a buffer can be donated only once.
    return Places(entries, jnp.zeros_like(entries), jnp.full((batch_size, count), NEVER))


def raster(position: Array, grid: tuple[int, ...]) -> Array:
    """Coordinates [..., D] as a number in raster order; only of use where they lie on the grid."""
    strides = np.cumprod((1, *grid[:0:-1]))[::-1].astype(np.int32)
    return (position * jnp.asarray(strides.reshape((1,) * (position.ndim - 1) + (-1,)))).sum(axis=-1)


def slots(tokens: Tokens, grid: tuple[int, ...], num_prefix: int) -> Array:
    """Where tokens stand in a table of places, [B or 1, T]; behind its last where they have none, and padding."""
    position, outside = tokens.position, num_prefix + math.prod(grid)
    limits = jnp.asarray(grid, jnp.int32)[None, None]
    placed = ((position >= 0) & (position < limits)).all(axis=-1)
    slot = jnp.where(placed, num_prefix + raster(position, grid), outside)
    if num_prefix and tokens.row is not None:
        slot = jnp.where((position < 0).any(axis=-1) & (tokens.row < num_prefix), tokens.row, slot)
    return jnp.where(tokens.step < NEVER, slot, outside)


def find(wanted: Array, known: Array, count: int) -> tuple[Array, Array]:
    """Which of the known tokens stands where.

    Args:
      wanted: [B or 1, T, W] slots.
      known: [B or 1, S] slots of tokens, each of another one.
      count: slots are below it, and what is not is nowhere.

    Returns:
      [B or 1, T, W] indices into the known tokens, and whether there is one.
    """
    empty = known.shape[1]
    index = jnp.arange(empty, dtype=jnp.int32)
    where = jax.vmap(lambda slot: jnp.full(count, empty, jnp.int32).at[slot].set(index, mode="drop"))(known)
    at = gather(where, wanted)
    return jnp.minimum(at, empty - 1), at < empty


def find_in_segment(
    wanted: Array, wanted_segment: Array, known: Array, known_segment: Array, count: int
) -> tuple[Array, Array]:
    """`find` for several sequences packed behind one another, by the segments [B or 1, T] and [B or 1, S] of tokens."""
    batch = max(len(wanted), len(wanted_segment), len(known), len(known_segment))
    code = jnp.where(known < count, known_segment * count + known, jnp.iinfo(jnp.int32).max)
    sought = wanted_segment[..., None] * count + wanted
    order = jnp.argsort(code, axis=1)
    ordered = jnp.take_along_axis(code, order, axis=1)
    ordered, order, sought = (jnp.broadcast_to(a, (batch, *a.shape[1:])) for a in (ordered, order, sought))
    at = jax.vmap(jnp.searchsorted)(ordered, sought.reshape(batch, -1))
    at = jnp.minimum(at, ordered.shape[1] - 1)
    found = jnp.take_along_axis(ordered, at, axis=1).reshape(sought.shape) == sought
    return jnp.take_along_axis(order, at, axis=1).reshape(sought.shape), found


def gather(a: Array, index: Array) -> Array:
    """Entries of a [B or 1, S, ...] at indices [B or 1, T, W], as [B or 1, T, W, ...]."""
    if len(a) < len(index):
        a = jnp.broadcast_to(a, (len(index), *a.shape[1:]))
    flat = take(a, index.reshape(len(index), -1))
    return flat.reshape(len(a), *index.shape[1:], *a.shape[2:])


def read(
    window: Array,
    k: Array,
    v: Array,
    tokens: Tokens,
    grid: tuple[int, ...],
    num_prefix: int,
    state: Places | None,
) -> tuple[Array, Array, Array, Places | None]:
    """What tokens find at the places that they look at.

    Args:
      window: [B or 1, T, W] slots that each token looks at.
      k: [B, T, K, H] keys of the tokens; those that are remembered are put where they belong first.
      v: [B, T, K, E] values.
      tokens: when and where they are.
      grid: the length of each axis.
      num_prefix: slots before the grid's.
      state: the places so far; None for a whole sequence.

    Returns:
      Keys and values [B, T, W, K, .], the steps [B or 1, T, W] of the tokens found, NEVER where there is none, and the
      places after these tokens.
    """
    if state is not None and tokens.segment is not None:
        raise ValueError("packed segments are fed whole, without a state")
    n, at, count = tokens.num_remembered, slots(tokens, grid, num_prefix), num_prefix + math.prod(grid)
    if state is not None:
        state = state.put(at[:, :n], k[:, :n], v[:, :n], tokens.step[:, :n])
        return gather(state.k, window), gather(state.v, window), gather(state.step, window), state
    if tokens.segment is None:
        index, found = find(window, at[:, :n], count)
    else:
        index, found = find_in_segment(window, tokens.segment, at[:, :n], tokens.segment[:, :n], count)
    step = jnp.where(found, gather(tokens.step[:, :n], index), NEVER)
    return gather(k[:, :n], index), gather(v[:, :n], index), step, None
