"""Convolution over the last few tokens, the same for all tokens or another for each: its state is a ring buffer."""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jax import Array

from ar_jax.mixers.common.line import present, stands_behind
from ar_jax.mixers.protocol import Tokens, take


@struct.dataclass
class Ring:
    """The last values that came, value number n at place n mod reach.

    Attributes:
      values: [B, reach, C]; a filter of some width reaches width - 1 tokens back, or so many times its dilation.
      count: int32 scalar, how many have come.
    """

    values: Array
    count: Array


def empty_ring(batch_size: int, width: int, channels: int, dtype: jnp.dtype, dilation: int = 1) -> Ring:
    """The state before the first token: zeros stand there."""
    return Ring(jnp.zeros((batch_size, (width - 1) * dilation, channels), dtype), jnp.zeros((), jnp.int32))


def short_convolution(
    values: Array, filters: Array, tokens: Tokens, before: Ring | None, dilation: int = 1
) -> tuple[Array, Ring | None]:
    """out_t = sum_{j < width} filters_j values_{t - j dilation}, a filter per group of neighbouring channels.

    Tokens of one step read each other in the order they are fed. A query (a token that is not remembered) stands behind
    the tokens that it may read.

    Args:
      values: [B, T, C], as fed.
      filters: [width, G], the present token's first, or [B or 1, T, width, G], those of each token; G divides C.
      tokens: when and where they are.
      before: the state before them; None for a whole sequence.
      dilation: the taps' distance from one another.

    Returns:
      [B, T, C], and the state after them, None without one before.
    """
    (width, groups), n = filters.shape[-2:], tokens.num_remembered
    channels, reach = values.shape[-1], (width - 1) * dilation
    filters = jnp.repeat(filters, channels // groups, axis=-1) if filters.ndim == 2 else filters
    values = present(values, tokens)
    line = _line(values[:, :n], reach, before)
    segment = None if tokens.segment is None else jnp.pad(tokens.segment[:, :n], ((0, 0), (reach, 0)), mode="edge")

    def weigh(j: int, piece: slice, past: Array) -> Array:
        """The part of the sum that tap j is, for a piece of the tokens."""
        if filters.ndim == 2:
            return filters[j][None, None].astype(past.dtype) * past
        return jnp.repeat(filters[:, piece, j], channels // groups, axis=-1).astype(past.dtype) * past

    def tap(ago: int) -> Array:
        """The remembered tokens' value of so many tokens ago, zero in another segment."""
        past = line[:, reach - ago : reach - ago + n]
        if segment is None:
            return past
        return jnp.where((segment[:, reach - ago : reach - ago + n] == segment[:, reach:])[..., None], past, 0)

    mixed = weigh(0, slice(n), values[:, :n])
    for j in range(1, width):
        mixed += weigh(j, slice(n), tap(j * dilation))
    if n < values.shape[1]:
        queries, earlier = slice(n, None), stands_behind(tokens)
        asked = weigh(0, queries, values[:, n:])
        for j in range(1, width):
            asked += weigh(j, queries, take(line, earlier + reach - j * dilation))
        mixed = jnp.concatenate([mixed, asked], axis=1)
    return mixed, None if before is None else _push(before, values[:, :n])


def centered_convolution(values: Array, filters: Array, lookahead: int, tokens: Tokens) -> Array:
    """out_t = sum_{j < width} filters_j values_{t + lookahead - j}: tokens read later ones, too.

    Args:
      values: [B, T, C], in the order of their places.
      filters: as in `short_convolution`, the latest token's first.
      lookahead: how many later tokens are read, less than the width.
      tokens: of these values, in the same order.

    Returns:
      [B, T, C].
    """
    (width, groups), length, channels = filters.shape[-2:], values.shape[1], values.shape[-1]
    sides = ((width - 1 - lookahead, lookahead), (0, 0))
    line = jnp.pad(present(values, tokens), ((0, 0), *sides))
    own = tokens.segment
    segment = None if own is None else jnp.pad(own, ((0, 0), sides[0]), mode="edge")
    mixed = jnp.zeros_like(values)
    for j in range(width):
        at = slice(width - 1 - j, width - 1 - j + length)
        weight = filters[j][None, None] if filters.ndim == 2 else filters[:, :, j]
        past = line[:, at]
        if segment is not None and own is not None:
            past = jnp.where(jnp.equal(segment[:, at], own)[..., None], past, 0)
        mixed += jnp.repeat(weight, channels // groups, axis=-1).astype(past.dtype) * past
    return mixed


def last_values(values: Array, width: int, tokens: Tokens, before: Ring | None) -> tuple[Array, Ring | None]:
    """The values of each token and of the `width - 1` in front of it.

    Args:
      values: [B, T, C], as fed.
      width: how many.
      tokens: when and where they are; those of other segments are not told apart.
      before: the state before them; None for a whole sequence.

    Returns:
      [B, T, width, C], the present token's first, zeros where there is none, and the state after them.
    """
    n, reach = tokens.num_remembered, width - 1
    values = present(values, tokens)
    line = _line(values[:, :n], reach, before)
    place = jnp.arange(n, dtype=jnp.int32)[None] + reach
    if n < values.shape[1]:
        behind = stands_behind(tokens) + reach
        place = jnp.concatenate([jnp.broadcast_to(place, (len(behind), n)), behind], axis=1)
    ago = (place[..., None] - jnp.arange(1, width, dtype=jnp.int32)[None, None]).reshape(len(place), -1)
    past = take(line, ago).reshape(*values.shape[:2], reach, -1)
    after = None if before is None else _push(before, values[:, :n])
    return jnp.concatenate([values[:, :, None], past], axis=2), after


def _line(values: Array, reach: int, before: Ring | None) -> Array:
    """What came before and remembered values [B, n, C], one behind the other: value i at place i + reach."""
    if before is None:
        return jnp.pad(values, ((0, 0), (reach, 0), (0, 0)))
    oldest_first = (before.count + jnp.arange(reach)) % reach
    return jnp.concatenate([before.values[:, oldest_first].astype(values.dtype), values], axis=1)


def _push(ring: Ring, values: Array) -> Ring:
    reach = ring.values.shape[1]
    last = min(reach, values.shape[1])
    place = (ring.count + values.shape[1] - last + jnp.arange(last)) % reach
    newest = values[:, values.shape[1] - last :].astype(ring.values.dtype)
    return Ring(ring.values.at[:, place].set(newest, unique_indices=True), ring.count + values.shape[1])
