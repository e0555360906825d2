"""Depthwise causal convolution over the last few tokens: its state is a ring buffer."""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jax import Array

from ar_jax.mixers.protocol import NEVER, Tokens, take


@struct.dataclass
class Ring:
    """The last values that came, value number n at place n mod (width - 1).

    Attributes:
      values: [B, width - 1, C].
      count: int32 scalar, how many have come.
    """

    values: Array
    count: Array


def empty_ring(batch_size: int, width: int, channels: int, dtype: jnp.dtype) -> Ring:
    """The state before the first token: zeros stand there."""
    return Ring(jnp.zeros((batch_size, width - 1, channels), dtype), jnp.zeros((), jnp.int32))


def short_convolution(values: Array, filters: Array, tokens: Tokens, before: Ring | None) -> tuple[Array, Ring | None]:
    """out_t = sum_{j < width} filters_j values_{t-j}, one filter per channel.

    Tokens of one step read each other in the order they are fed. A query (a token that is not remembered) stands behind
    the tokens that it may read.

    Args:
      values: [B, T, C], as fed.
      filters: [width, C], the present token's first.
      tokens: when and where they are.
      before: the state before them; None for a whole sequence.

    Returns:
      [B, T, C], and the state after them, None without one before.
    """
    (width, channels), n = filters.shape, tokens.num_remembered
    reach = width - 1
    filters = filters.astype(values.dtype)[:, None, None]
    if tokens.padded:
        values = jnp.where((tokens.step < NEVER)[..., None], values, 0)
    ring = empty_ring(len(values), width, channels, values.dtype) if before is None else before
    oldest_first = (ring.count + jnp.arange(reach)) % reach
    line = jnp.concatenate([ring.values[:, oldest_first], values[:, :n]], axis=1)  # remembered token i at i + reach
    segment = None if tokens.segment is None else jnp.pad(tokens.segment[:, :n], ((0, 0), (reach, 0)), mode="edge")

    def tap(j: int) -> Array:
        """The remembered tokens' value of j tokens ago, zero in another segment."""
        past = line[:, reach - j : reach - j + n]
        if segment is None:
            return past
        return jnp.where((segment[:, reach - j : reach - j + n] == segment[:, reach:])[..., None], past, 0)

    mixed = filters[0] * values[:, :n]
    for j in range(1, width):
        mixed += filters[j] * tap(j)
    if n < values.shape[1]:
        earlier = (tokens.step[:, None, :n] <= tokens.step[:, n:, None]).sum(axis=-1)  # [B or 1, queries]
        asked = filters[0] * values[:, n:] + sum(filters[j] * take(line, earlier + reach - j) for j in range(1, width))
        mixed = jnp.concatenate([mixed, asked], axis=1)
    return mixed, None if before is None else _push(before, values[:, :n])


def _push(ring: Ring, values: Array) -> Ring:
    reach = ring.values.shape[1]
    last = min(reach, values.shape[1])
    place = (ring.count + values.shape[1] - last + jnp.arange(last)) % reach
    newest = values[:, values.shape[1] - last :].astype(ring.values.dtype)
    return Ring(ring.values.at[:, place].set(newest, unique_indices=True), ring.count + values.shape[1])
