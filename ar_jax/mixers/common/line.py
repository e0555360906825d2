"""A line of tokens: what is remembered, in the order it is fed, and behind which of it the queries stand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from ar_jax.mixers.protocol import NEVER, Tokens, segment_starts, take


@struct.dataclass
class Line:
    """All that came, as a state: number n at place n.

    Attributes:
      values: [B, max_len, C], zeros behind them.
      count: int32 scalar, how many have come.
    """

    values: Array
    count: Array

    def append(self, values: Array) -> Line:
        """With more behind them, [B, T, C]."""
        values = values.astype(self.values.dtype)
        longer = jax.lax.dynamic_update_slice_in_dim(self.values, values, self.count, axis=1)
        return Line(longer, self.count + values.shape[1])


def empty_line(batch_size: int, max_len: int, channels: int, dtype: jnp.dtype) -> Line:
    """The state before the first token."""
    return Line(jnp.zeros((batch_size, max(max_len, 1), channels), dtype), jnp.zeros((), jnp.int32))


def present(values: Array, tokens: Tokens) -> Array:
    """Values [B, T, C] with zeros in place of padding."""
    return jnp.where(jnp.expand_dims(tokens.step < NEVER, -1), values, 0) if tokens.padded else values


def stands_behind(tokens: Tokens) -> Array:
    """Behind how many of the remembered tokens each query stands, [B or 1, queries] int32: behind all that it may read."""
    n = tokens.num_remembered
    readable = jnp.less_equal(tokens.step[:, None, :n], tokens.step[:, n:, None])
    if tokens.segment is not None:
        readable &= tokens.segment[:, None, :n] == tokens.segment[:, n:, None]
    return jnp.where(readable, 1 + jnp.arange(n)[None, None], 0).max(axis=-1, initial=0)


def line_index(tokens: Tokens, count: Array | int = 0) -> Array:
    """How many remembered tokens of its own segment stand in front of each token, [B or 1, T] int32; padding counts.

    Args:
      tokens: as fed.
      count: how many came before them.
    """
    n, length = tokens.num_remembered, tokens.step.shape[1]
    index = jnp.arange(n, dtype=jnp.int32)[None]
    start = jnp.zeros_like(index)
    if tokens.segment is not None:
        start = jax.lax.cummax(jnp.where(segment_starts(tokens.segment[:, :n]), index, 0), axis=1)
    own = index - start
    if n < length:
        behind = stands_behind(tokens)
        first = jnp.zeros_like(behind)
        if tokens.segment is not None:
            at = jnp.maximum(behind - 1, 0)
            first = jnp.where(behind > 0, jnp.take_along_axis(jnp.broadcast_to(start, (len(at), n)), at, axis=1), 0)
        batch = max(len(own), len(behind))
        parts = (own, behind - first)
        own = jnp.concatenate([jnp.broadcast_to(a, (batch, a.shape[1])) for a in parts], axis=1)
    return own + count


def running_sum(values: Array, tokens: Tokens, before: Array | None) -> tuple[Array, Array | None]:
    """The sum of each token's value and of all that its segment remembers in front of it.

    Args:
      values: [B, T, C] as fed, zeros in place of padding.
      tokens: when they are.
      before: [B, C], the sum of what came before; None for a whole sequence.

    Returns:
      [B, T, C], and the sum of all that is remembered, None without one before.
    """
    n = tokens.num_remembered
    first = jnp.zeros_like(values[:, 0]) if before is None else before.astype(values.dtype)
    line = values[:, :n]
    if tokens.segment is None:
        sums = jnp.cumsum(line, axis=1) + first[:, None]
    else:
        starts = jnp.broadcast_to(segment_starts(tokens.segment[:, :n])[..., None], line.shape)
        sums = jax.lax.associative_scan(_add_from_start, (line, starts), axis=1)[0]
    out = sums
    if n < values.shape[1]:
        read = take(jnp.concatenate([first[:, None], sums], axis=1), stands_behind(tokens))
        out = jnp.concatenate([sums, read + values[:, n:]], axis=1)
    return out, None if before is None else (sums[:, -1] if n else first)


def _add_from_start(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
    return jnp.where(right[1], right[0], left[0] + right[0]), left[1] | right[1]
