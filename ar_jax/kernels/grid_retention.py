"""Retention on a grid whose places come row by row: what fades with the rows and columns in between (cf. arXiv:2310.19731)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array


@struct.dataclass
class Columns:
    """What was written so far.

    Attributes:
      memory: [B, N, W, H, E] float32, a matrix for each column, faded to `row`.
      row: [B] int32, the row of the last token.
    """

    memory: Array
    row: Array


def empty_columns(batch_size: int, heads: int, width: int, key_dim: int, value_dim: int) -> Columns:
    """Before the first token."""
    memory = jnp.zeros((batch_size, heads, width, key_dim, value_dim), jnp.float32)
    return Columns(memory, jnp.zeros(batch_size, jnp.int32))


def grid_retention(
    q: Array,
    k: Array,
    v: Array,
    index: Array,
    log_decay: Array,
    *,
    width: int,
    run: Array | None = None,
    columns: Columns | None = None,
    chunk_size: int | None = None,
) -> tuple[Array, Columns]:
    """o_xy = sum_{x'<=x, y'<=y} a^(x-x') b^(y-y') (q_xy . k_x'y') v_x'y', in rows x and columns y.

    The sum over a quadrant is the recurrence S_xy = a S_{x-1,y} + b S_{x,y-1} - a b S_{x-1,y-1} + k_xy v_xy^T,
    o_xy = S_xy^T q_xy. Rows of tokens are worked out among themselves, all before them through a memory for each column:
    chunk_size = 1 is the recurrent form, chunk_size = T the parallel one.

    Args:
      q: [B, T, N, H], with its scale applied.
      k: [B, T, N, H]; zeros where a token writes nothing.
      v: [B, T, N, E].
      index: [B, T] int32, places in raster order; they do not fall inside a run.
      log_decay: [2, N] float32, log a and log b, in nats, <= 0.
      width: W, places of a row.
      run: [B, T] int32, which of several grids, one behind the other, a token belongs to; None where there is one.
      columns: what was written before; None is nothing.
      chunk_size: tokens worked out pair by pair; None takes a row.

    Returns:
      o [B, T, N, E] in v's dtype, and the memory after the last token.

    Cost: O(B T N H (E + W)) FLOPs; the memory does not grow with the rows.
    """
    batch, length, heads, key_dim = q.shape
    chunk = min(chunk_size or width, length)
    before = empty_columns(batch, heads, width, key_dim, v.shape[-1]) if columns is None else columns
    run = jnp.zeros((batch, length), jnp.int32) if run is None else run

    def split(a: Array, mode: str = "constant") -> Array:
        a = jnp.pad(a, [(0, 0), (0, -length % chunk)] + [(0, 0)] * (a.ndim - 2), mode)
        return jnp.moveaxis(a.reshape(batch, -1, chunk, *a.shape[2:]), 1, 0)

    arrays = (split(q.astype(jnp.float32)), split(k.astype(jnp.float32)), split(v.astype(jnp.float32)))
    step = functools.partial(_one_chunk, log_decay.astype(jnp.float32), width)
    inputs = (*arrays, split(index, "edge"), split(run, "edge"))
    (after, _), out = jax.lax.scan(step, (before, jnp.zeros(batch, jnp.int32)), inputs)
    return jnp.moveaxis(out, 0, 1).reshape(batch, -1, heads, v.shape[-1])[:, :length].astype(v.dtype), after


def _one_chunk(
    log_decay: Array, width: int, carry: tuple[Columns, Array], inputs: tuple[Array, ...]
) -> tuple[tuple[Columns, Array], Array]:
    columns, run_before = carry
    q, k, v, index, run = inputs  # [B, C, N, .] and [B, C]
    row, column = index // width, index % width
    last_row, last_run = row[:, -1], run[:, -1]

    def fade(away: Array, kept: Array, axis: int = 0) -> Array:
        """decay^away for each head, [..., N]; zero where nothing is kept."""
        exponent = jnp.where(kept, away, 0).astype(jnp.float32)[..., None] * log_decay[axis].reshape(
            (1,) * away.ndim + (-1,)
        )
        return jnp.where(kept[..., None], jnp.exp(exponent), 0)

    def pairs(a: Array) -> tuple[Array, Array]:
        return a[:, :, None], a[:, None, :]

    rows, across, runs = (a - b for a, b in map(pairs, (row, column, run)))  # [B, t, s]
    read = jnp.tril(jnp.ones((q.shape[1],) * 2, bool))[None] & (across >= 0) & (runs == 0)
    weights = fade(rows, read) * fade(across, read, axis=1)
    out = jnp.einsum("btnh,bsnh,btsn,bsne->btne", q, k, weights, v, optimize=[(0, 1), (0, 2), (0, 1)])
    left = jnp.broadcast_to(jnp.exp(log_decay[1])[None, :, None, None, None], columns.memory.shape[:3] + (1, 1))
    _, before = jax.lax.associative_scan(
        lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1]), (left, columns.memory), axis=2
    )  # [B, N, W, H, E]: of each column, and those left of it
    here = jax.vmap(lambda memory, at: memory[:, at])(before, column)  # [B, N, C, H, E]
    carried = fade(row - columns.row[:, None], run == run_before[:, None])
    out += carried[..., None] * jnp.einsum("btnh,bnthe->btne", q, here)
    written = k * fade(last_row[:, None] - row, run == last_run[:, None])[..., None]
    new = jnp.einsum("bsnh,bsne->bnshe", written, v)
    kept = fade(last_row - columns.row, last_run == run_before)[:, :, None, None, None] * columns.memory
    memory = jax.vmap(lambda memory, at, added: memory.at[:, at].add(added))(kept, column, new)
    return (Columns(memory, last_row), last_run), out
