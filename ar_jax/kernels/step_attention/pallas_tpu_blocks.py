"""Which blocks the TPU kernels visit and in what order, and what a tile of logits is: shared by forward and backward."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ar_jax.kernels.step_attention.visibility import EMPTY, FULL, MIXED, UNSEEN, Visibility

LANES = 128
LARGEST_BLOCK = 1024  # queries, and keys, of a grid step: below, what a step costs by itself shows
LARGEST_TILE = 512  # queries, and keys, that are computed at once: two tiles of logits are under way
LOG2_E = 1.4426950408889634  # the hardware's exponential has base two, and so have logits within the kernels
VECTOR_MEMORY = 56 * 2**20  # bytes, of the 64 MiB that the smallest of the newer chips has
COMPUTED = (MIXED, FULL)  # kinds of blocks; benchmarks compile one kind at a time to read its cycles

# A visit is one int32: row << 18 | column << 4 | LAST | FIRST | kind. Rows are what is summed into.
FIRST, LAST = 4, 8


def block_size(length: int, largest: int | None = None) -> int:
    """A multiple of 128 such that few blocks cover the length and the last one is nearly full."""
    count = pl.cdiv(length, largest or LARGEST_BLOCK)
    return pl.cdiv(pl.cdiv(length, count), LANES) * LANES


def tiles(size: int) -> list[pl.Slice]:
    """Cuts a block into parts of nearly the same size, multiples of 128, two at least where there is room for two."""
    lanes = size // LANES
    count = max(pl.cdiv(size, LARGEST_TILE), min(lanes, 2))
    edges = [i * lanes // count * LANES for i in range(count + 1)]
    return [pl.Slice(start, stop - start) for start, stop in zip(edges[:-1], edges[1:], strict=True)]


def visits(kinds: Array) -> tuple[Array, Array]:
    """The blocks in which something is seen, row by row, and how many they are.

    A row without any still has one visit, of kind EMPTY, so that its zeros are written. After the last visit it is
    repeated without its flags: nothing is fetched, computed or written then.

    Args:
      kinds: [B, rows, columns] int32, from `Visibility.blocks`.

    Returns:
      [B, rows * columns] int32, and [B] int32.
    """
    batch, rows, columns = kinds.shape
    some = kinds != EMPTY
    column = jnp.arange(columns, dtype=jnp.int32)[None, None, :]
    kept = some | ((column == 0) & ~some.any(axis=2, keepdims=True))
    first = column == jnp.where(kept, column, columns).min(axis=2, keepdims=True)
    last = column == jnp.where(kept, column, -1).max(axis=2, keepdims=True)
    row = jnp.arange(rows, dtype=jnp.int32)[None, :, None]
    packed = (row << 18) + (column << 4) + jnp.where(last, LAST, 0) + jnp.where(first, FIRST, 0) + kinds
    packed, kept = packed.reshape(batch, -1), kept.reshape(batch, -1)
    # Each visit goes to its place by comparing all with all: few numbers, and neither a sort nor a scatter.
    count = kept.sum(axis=1, dtype=jnp.int32)
    here = jnp.arange(rows * columns, dtype=jnp.int32)
    before = (kept[:, :, None] & (here[:, None] < here[None, :])[None]).sum(axis=1, dtype=jnp.int32)
    place = jnp.where(kept, before, -1)
    ordered = jnp.where(place[:, :, None] == here[None, None], packed[:, :, None], 0).sum(axis=1, dtype=jnp.int32)
    final = jnp.where(kept, packed, 0).max(axis=1, keepdims=True) & ~15  # rows, then columns, are its highest bits
    return jnp.where(here[None] < count[:, None], ordered, final), count


def row(visit: Array) -> Array:
    """Which block is summed into."""
    return visit >> 18


def column(visit: Array) -> Array:
    """Which block is read."""
    return (visit >> 4) & 0x3FFF


def kind(visit: Array) -> Array:
    """EMPTY, MIXED or FULL."""
    return visit & 3


def sink_logits(sinks: Array | None, heads: int) -> Array:
    """A logit in base two for each head, UNSEEN where there is no sink."""
    return jnp.full(heads, UNSEEN, jnp.float32) if sinks is None else sinks.astype(jnp.float32) * LOG2_E


def spread(key_ref: Any, columns_ref: Any) -> None:
    """Writes the keys' coordinates [F, bk] as columns [F, bk, 128], each number all along its row."""
    for f in range(key_ref.shape[0]):
        columns_ref[f] = jnp.broadcast_to(key_ref[f : f + 1, :], (LANES, key_ref.shape[1])).T


def tile_seen(bounds: tuple[Any, Any, Any], keys: pl.Slice, queries: pl.Slice, has_lower: tuple[bool, ...]) -> Array:
    """Which keys are seen by which queries, [keys, queries] bool; bounds: the keys' columns, the queries' lower, upper."""
    columns, lower, upper = bounds

    def within(f: int) -> Array:
        key = jnp.tile(columns[f, keys, :], (1, queries.size // LANES))
        low = key <= upper[f : f + 1, queries]
        return low & (key >= lower[f : f + 1, queries]) if has_lower[f] else low

    return functools.reduce(operator.and_, map(within, range(len(has_lower))))


def scaled(products: Array, scale: float, soft_cap: float | None) -> tuple[Array, Array | None]:
    """Logits in base two, and the slope of the soft cap."""
    if soft_cap is None:
        return products * (scale * LOG2_E), None
    bent = jnp.tanh(products * (scale / soft_cap))
    return bent * (soft_cap * LOG2_E), 1.0 - bent * bent


def tile_logits(
    q: Array, k: Array, bias: Array | None, seen: Array | None, scale: float, soft_cap: float | None
) -> tuple[Array, Array | None]:
    """Logits in base two [keys, queries] float32, UNSEEN where not seen; and the slope of the soft cap.

    Keys lie along sublanes: maxima and sums over keys are then plain vector operations, and what there is of each query
    - maximum, sum, bounds - is a row.
    """
    logits = jax.lax.dot_general(k, q, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    logits, slope = scaled(logits, scale, soft_cap)
    if bias is not None:
        logits += bias.astype(jnp.float32).T * LOG2_E
    return logits if seen is None else jnp.where(seen, logits, UNSEEN), slope


def staggered(jobs: list[Any], start: Any, finish: Any) -> None:
    """finish(job, start(job)) for each job, the next job being started before one is finished.

    Matrix units and vector units then have work at the same time.
    """
    begun: Iterator[Any] = map(start, jobs)
    ready = next(begun)
    for job in jobs:
        current, ready = ready, next(begun, None)
        finish(job, current)


def heads_in_front(a: Array, length: int) -> Array:
    """[B, T, N, H] -> [B, N, length, H], zeros behind; H a multiple of 16, which is a tile of sublanes when transposed."""
    a = jnp.pad(a, ((0, 0), (0, length - a.shape[1]), (0, 0), (0, -a.shape[3] % 16)))
    return jnp.swapaxes(a, 1, 2)


def padded(visible: Visibility, block_queries: int, block_keys: int) -> Visibility:
    """To whole blocks."""
    lengths = visible.upper.shape[2], visible.key.shape[2]
    return visible.padded(*(pl.cdiv(n, b) * b for n, b in zip(lengths, (block_queries, block_keys), strict=True)))


def whole_blocks(bias: Array, num_queries: int, num_keys: int) -> Array:
    """[B or 1, N, T, S] with so many queries and keys."""
    return jnp.pad(bias, ((0, 0), (0, 0), (0, num_queries - bias.shape[2]), (0, num_keys - bias.shape[3])))


def compiler_params() -> pltpu.CompilerParams:
    """For a grid of examples, heads, and visits in their order."""
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VECTOR_MEMORY
    )
