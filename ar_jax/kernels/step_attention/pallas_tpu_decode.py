"""A few queries against many keys on TPUs, where the time is that of reading the keys: each is read once, as it lies.

A cache [B, S, K, H] with H a multiple of 128 is read as rows [B, S K, H], which moves nothing in memory. A block of rows
meets the queries of all heads in one product; that a row belongs to another key head is one more reason not to see it.
With other widths the compiler lays a cache out with its keys innermost, and it is read as columns [B, K H, S]: there a
query's row is zero but for its own key head's part. So neither is the cache transposed, nor a key head read once for
each query head. In a cache of pages, the table says where a block lies.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ar_jax.kernels.dispatch import interpreted
from ar_jax.kernels.step_attention import pallas_tpu_blocks as blocks
from ar_jax.kernels.step_attention.pallas_tpu_blocks import LANES, LOG2_E
from ar_jax.kernels.step_attention.visibility import EMPTY, UNSEEN, Visibility

MOST_QUERIES, MOST_ROWS = 16, 256  # in one product with all heads' keys; with more, what is computed in vain would show
BLOCK_BYTES = 2**20  # of keys that are fetched at once: long enough a time to hide what a grid step costs
MOST_KEYS = 2048  # that are fetched at once
MOST_PAGES = 16  # that are fetched at once
ROWS = 16  # query rows are padded to tiles of so many sublanes


@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values as they lie, and how a visit finds its part of them.

    Attributes:
      k, v: [..., S K, H], or [..., K H, S] if in columns.
      in_columns: whether keys lie along lanes.
      heads: K.
      size: keys of a visit.
      slots: blocks that a visit fetches.
      block: from the slot, a function of (example, visit, table) that gives the block's index.
      table: [B pages] int32, prefetched.
    """

    k: Array
    v: Array
    in_columns: bool
    heads: int
    size: int
    slots: int
    block: Callable[[int], Callable[..., Any]]
    table: Array


def decodes(q: Array, bias: Array | None) -> bool:
    """Whether this form is the faster one."""
    return bias is None and q.shape[1] <= MOST_QUERIES and q.shape[1] * q.shape[2] <= MOST_ROWS


def decode(
    q: Array,
    k: Array,
    v: Array,
    visible: Visibility,
    sinks: Array | None,
    *,
    scale: float,
    soft_cap: float | None,
) -> tuple[Array, Array]:
    """See `step_attention`. Blocks of keys that no query of an example sees, as the empty end of a cache, are not read."""
    batch, length, heads, head_dim = k.shape
    in_columns = head_dim % LANES > 0
    if in_columns:
        k, v = (a.transpose(0, 2, 3, 1).reshape(batch, heads * head_dim, length) for a in (k, v))
    else:
        k, v = (a.reshape(batch, length * heads, head_dim) for a in (k, v))
    most = _most_keys(heads * head_dim * k.dtype.itemsize, length)
    size = next((size for size in range(most, most // 2, -LANES) if length % size == 0), most)

    def block(slot: int) -> Callable[..., Any]:
        if in_columns:
            return lambda b, visit, table: (b, 0, blocks.column(visit))
        return lambda b, visit, table: (b, blocks.column(visit), 0)

    cache = Cache(k, v, in_columns, heads, size, 1, block, jnp.zeros(1, jnp.int32))
    return _attend(q, cache, visible, sinks, scale=scale, soft_cap=soft_cap)


def decode_pages(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    page_table: Array,
    visible: Visibility,
    *,
    scale: float,
    soft_cap: float | None,
) -> tuple[Array, Array]:
    """See `paged_attention`; visible is that of keys in their order, [B, F, max_pages page]."""
    num_pages, page, heads, head_dim = k_pages.shape
    k, v = (a.reshape(num_pages, page * heads, head_dim) for a in (k_pages, v_pages))
    fewest = LANES // math.gcd(page, LANES)  # coordinates of keys lie along lanes
    most = _most_keys(heads * head_dim * k.dtype.itemsize, page * page_table.shape[1])
    slots = max(1, min(most // page, MOST_PAGES) // fewest) * fewest
    pages = pl.cdiv(page_table.shape[1], slots) * slots
    visible = blocks.padded(visible, 1, pages * page)
    table = jnp.pad(page_table, ((0, 0), (0, pages - page_table.shape[1])))
    visited = visible.blocks(visible.upper.shape[2], page)[:, 0] != EMPTY
    table = jnp.clip(fetched(table, visited, slots), 0, num_pages - 1).reshape(-1)

    def block(slot: int) -> Callable[..., Any]:
        return lambda b, visit, table: (table[b * pages + blocks.column(visit) * slots + slot], 0, 0)

    cache = Cache(k, v, False, heads, page * slots, slots, block, table)
    return _attend(q, cache, visible, None, scale=scale, soft_cap=soft_cap)


def _most_keys(bytes_each: int, length: int) -> int:
    """How many keys are fetched at once, a multiple of 128.

    An eighth of the cache at most: what is read beyond a sequence's end is half a block on average.
    """
    return max(LANES, min(BLOCK_BYTES // bytes_each, MOST_KEYS, length // 8) // LANES * LANES)


def fetched(table: Array, visited: Array, slots: int) -> Array:
    """The table where a page that is not read is replaced by the one that its slot read before, which is not fetched again."""
    number = jnp.arange(table.shape[1], dtype=jnp.int32)[None]
    some = visited.any(axis=1, keepdims=True)
    first = jnp.where(some, jnp.where(visited, number, table.shape[1]).min(axis=1, keepdims=True), 0)
    last = jnp.where(some, jnp.where(visited, number, -1).max(axis=1, keepdims=True), 0)
    late = -(-jnp.maximum(number - last, 0) // slots) * slots
    early = -(-jnp.maximum(first - number, 0) // slots) * slots
    return jnp.take_along_axis(table, jnp.clip(number - late + early, first, last), axis=1)


def _attend(
    q: Array, cache: Cache, visible: Visibility, sinks: Array | None, *, scale: float, soft_cap: float | None
) -> tuple[Array, Array]:
    """Attention of all heads' queries, as rows, over the blocks of a cache that any of them sees."""
    (batch, num_queries, heads, head_dim), num_keys = q.shape, visible.key.shape[2]
    visible = blocks.padded(visible, num_queries, cache.size)
    visits, count = blocks.visits(visible.blocks(num_queries, cache.size))
    each = visits.shape[1] if len(visits) > 1 else 0
    rows, num_rows = heads * num_queries, cache.heads * cache.size
    more = rows + -rows % ROWS
    key_head = jnp.repeat(jnp.arange(heads, dtype=jnp.int32) // (heads // cache.heads), num_queries)
    own = jax.nn.one_hot(key_head, cache.heads, dtype=jnp.float32)[None, :, :, None]  # [1, N T, K, 1]
    queries = jnp.swapaxes(q, 1, 2).reshape(batch, rows, head_dim)
    if cache.in_columns:
        queries = (queries[:, :, None] * own.astype(q.dtype)).reshape(batch, rows, -1)
    bounds = jnp.concatenate([jnp.tile(a, (1, 1, heads)) for a in (visible.lower, visible.upper)], axis=1)
    start = jnp.repeat(blocks.sink_logits(sinks, heads), num_queries)

    def at(index: Any) -> Any:
        return lambda b, step, visits, table: index(b, visits[b * each + step], table)

    def of(b: Any) -> Any:
        return b if len(visible.key) > 1 else 0

    def once(*shape: int) -> Any:
        return pl.BlockSpec(shape, at(lambda b, visit, table: (0,) * len(shape)))

    width, coordinates, part = queries.shape[2], len(visible.has_lower), cache.size // cache.slots
    row_spec = pl.BlockSpec((None, more, width), at(lambda b, visit, table: (b, 0, 0)))
    part_shape = (None, width, part) if cache.in_columns else (None, part * cache.heads, width)
    part_specs = [pl.BlockSpec(part_shape, at(cache.block(slot))) for slot in range(cache.slots)]
    out, lse = pl.pallas_call(
        functools.partial(
            _kernel,
            each=each,
            in_columns=cache.in_columns,
            # The last block may reach beyond the cache, where anything may lie.
            num_keys=num_keys if num_keys % cache.size else None,
            has_lower=visible.has_lower,
            scale=scale,
            soft_cap=soft_cap,
        ),
        name="step_attention_decode",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, count.max()),
            in_specs=[
                row_spec,
                pl.BlockSpec((None, 2 * coordinates, more, 1), at(lambda b, visit, table: (of(b), 0, 0, 0))),
                once(more, 1),
                once(more, 1),
                once(1, num_rows),
                pl.BlockSpec(
                    (None, coordinates, cache.size), at(lambda b, visit, table: (of(b), 0, blocks.column(visit)))
                ),
                *part_specs,
                *part_specs,
            ],
            out_specs=[row_spec, pl.BlockSpec((None, more, 1), at(lambda b, visit, table: (b, 0, 0)))],
            scratch_shapes=[pltpu.VMEM((more, n), jnp.float32) for n in (width, 1, 1)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, more, width), cache.v.dtype),
            jax.ShapeDtypeStruct((batch, more, 1), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=blocks.VECTOR_MEMORY
        ),
        interpret=interpreted(),
    )(
        visits.reshape(-1),
        cache.table,
        jnp.pad(queries, ((0, 0), (0, more - rows), (0, 0))),
        jnp.pad(bounds, ((0, 0), (0, 0), (0, more - rows)))[..., None],
        jnp.pad(start, (0, more - rows), constant_values=UNSEEN)[:, None],
        jnp.pad(key_head, (0, more - rows))[:, None],
        jnp.tile(jnp.arange(cache.heads, dtype=jnp.int32), cache.size)[None],
        visible.key,
        *[_left_in_place(cache.k)] * cache.slots,
        *[_left_in_place(cache.v)] * cache.slots,
    )
    out = out[:, :rows]
    if cache.in_columns:  # each row's own key head's part
        out = jnp.where(own > 0, out.reshape(batch, rows, cache.heads, head_dim), 0).sum(axis=2, dtype=out.dtype)
    out = out.reshape(batch, heads, num_queries, head_dim)
    return jnp.swapaxes(out, 1, 2), jnp.swapaxes(lse[:, :rows, 0].reshape(batch, heads, num_queries), 1, 2)


def _left_in_place(array: Array) -> Array:
    """Keeps the compiler from bringing all of it on chip beforehand, where it fits: only what is visited is read."""
    return array if interpreted() else pltpu.with_memory_space_constraint(array, pltpu.HBM)


def _kernel(
    visits: Any,
    table: Any,
    q: Any,
    bounds: Any,
    start: Any,
    query_head: Any,
    key_head: Any,
    key: Any,
    *refs: Any,
    each: int,
    in_columns: bool,
    num_keys: int | None,
    has_lower: tuple[bool, ...],
    scale: float,
    soft_cap: float | None,
) -> None:
    """Query rows along sublanes, keys along lanes."""
    parts, (out, lse, total, weight, peak) = refs[:-5], refs[-5:]
    visit = visits[pl.program_id(0) * each + pl.program_id(1)]

    @pl.when(visit & blocks.FIRST != 0)
    def begin() -> None:
        peak[...] = start[...]
        weight[...] = jnp.where(start[...] > UNSEEN / 2, 1.0, 0.0)
        total[...] = jnp.zeros(total.shape, jnp.float32)

    @pl.when(blocks.kind(visit) != EMPTY)
    def read() -> None:
        along, across = (1, 0) if in_columns else (0, 1)  # the axes of keys and of their width
        half = len(parts) // 2
        k, v = (jnp.concatenate([ref[...] for ref in part], axis=along) for part in (parts[:half], parts[half:]))
        shared = 1 if in_columns else len(k) // key.shape[1]
        if num_keys is not None:
            place = blocks.column(visit) * v.shape[along] + jax.lax.broadcasted_iota(jnp.int32, v.shape, along)
            v = jnp.where(place < num_keys * shared, v, jnp.zeros((), v.dtype))
        seen = _seen(key, bounds, has_lower)
        if shared > 1:
            seen = _repeated(seen, shared) & (key_head[...] == query_head[...])
        product = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
        logits = blocks.scaled(product(q[...], k, (((1,), (across,)), ((), ()))), scale, soft_cap)[0]
        logits = jnp.where(seen, logits, UNSEEN)
        before = peak[...]
        higher = jnp.maximum(before, logits.max(axis=1, keepdims=True))
        weights, fade = jnp.exp2(logits - higher), jnp.exp2(before - higher)
        peak[...] = higher
        weight[...] = weight[...] * fade + weights.sum(axis=1, keepdims=True)
        total[...] = total[...] * fade + product(weights.astype(v.dtype), v, (((1,), (along,)), ((), ())))

    @pl.when(visit & blocks.LAST != 0)
    def end() -> None:
        reads = peak[...] > UNSEEN / 2
        sums = jnp.where(reads, weight[...], 1.0)
        lse[...] = jnp.where(reads, (peak[...] + jnp.log2(sums)) / LOG2_E, UNSEEN)
        out[...] = jnp.where(reads, total[...] / sums, 0.0).astype(out.dtype)


def _seen(key: Any, bounds: Any, has_lower: tuple[bool, ...]) -> Array:
    """Which keys are seen by which query rows, bool."""

    def within(f: int) -> Array:
        low = key[f : f + 1, :] <= bounds[len(has_lower) + f]
        return low & (key[f : f + 1, :] >= bounds[f]) if has_lower[f] else low

    return functools.reduce(operator.and_, map(within, range(len(has_lower))))


def _repeated(seen: Array, times: int) -> Array:
    """Each key so many times along lanes: times a matrix of ones where lane // times is the key, for lack of a cheaper way."""
    first = jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES * times), 0) * times
    lane = jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES * times), 1)
    ones = ((lane >= first) & (lane < first + times)).astype(jnp.float32).astype(jnp.bfloat16)
    seen = seen.astype(jnp.float32).astype(jnp.bfloat16)
    cuts = [seen[:, start : start + LANES] for start in range(0, seen.shape[1], LANES)]
    return jnp.concatenate([jnp.dot(cut, ones, preferred_element_type=jnp.float32) for cut in cuts], axis=1) > 0.5
