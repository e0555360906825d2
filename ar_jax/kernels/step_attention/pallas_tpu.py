"""Step attention on TPUs: only blocks in which something is seen are fetched and computed (arXiv:2205.14135).

The visited blocks are a list, made from the steps while the program runs and prefetched as scalars; the grid is as long
as the list. Logits are transposed, [keys, queries].
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ar_jax.kernels.dispatch import interpreted
from ar_jax.kernels.step_attention import pallas_tpu_blocks as blocks
from ar_jax.kernels.step_attention.gradient import differentiable
from ar_jax.kernels.step_attention.pallas_tpu_backward import backward
from ar_jax.kernels.step_attention.pallas_tpu_blocks import LOG2_E
from ar_jax.kernels.step_attention.pallas_tpu_decode import decode, decodes
from ar_jax.kernels.step_attention.visibility import FULL, MIXED, UNSEEN, Visibility

ONES = 16  # rows of ones under the transposed values: the product then sums the weights too
LARGEST_BLOCK_WITH_BIAS = 512  # a block of the bias is as large as one of logits, and two are in memory


def forward(
    q: Array,
    k: Array,
    v: Array,
    visible: Visibility,
    bias: Array | None,
    sinks: Array | None,
    *,
    scale: float,
    soft_cap: float | None,
) -> tuple[Array, Array]:
    """See `step_attention`. Cost: O(T S) FLOPs less the blocks in which nothing is seen, O(T + S) memory without a bias."""
    if decodes(q, bias):
        return decode(q, k, v, visible, sinks, scale=scale, soft_cap=soft_cap)
    (batch, num_queries, heads, head_dim), (num_keys, shared) = q.shape, k.shape[1:3]
    largest = None if bias is None else LARGEST_BLOCK_WITH_BIAS
    bq, bk = blocks.block_size(num_queries, largest), blocks.block_size(num_keys, largest)
    visible = blocks.padded(visible, bq, bk)
    more_queries, more_keys = visible.upper.shape[2], visible.key.shape[2]
    visits, count = blocks.visits(visible.blocks(bq, bk))
    each = visits.shape[1] if len(visits) > 1 else 0  # how far the list of the next example is

    def at(index: Any) -> Any:
        return lambda b, n, step, visits, *_: index(b, n, visits[b * each + step])

    def row(b: Any, n: Any, visit: Any) -> tuple[Any, ...]:
        return b, n, blocks.row(visit), 0

    def column(b: Any, n: Any, visit: Any) -> tuple[Any, ...]:
        return b, n // (heads // shared), blocks.column(visit), 0

    shown = (lambda b: b) if each else (lambda b: 0)
    arrays = [blocks.heads_in_front(q, more_queries), *(blocks.heads_in_front(a, more_keys) for a in (k, v))]
    width = arrays[0].shape[3]
    coordinates = len(visible.has_lower)
    specs = [
        pl.BlockSpec((None, None, bq, width), at(row)),
        pl.BlockSpec((None, None, bk, width), at(column)),
        pl.BlockSpec((None, None, bk, width), at(column)),
        pl.BlockSpec((None, coordinates, bq), at(lambda b, n, visit: (shown(b), 0, blocks.row(visit)))),
        pl.BlockSpec((None, coordinates, bq), at(lambda b, n, visit: (shown(b), 0, blocks.row(visit)))),
        pl.BlockSpec((None, coordinates, bk), at(lambda b, n, visit: (shown(b), 0, blocks.column(visit)))),
    ]
    arrays += [visible.lower, visible.upper, visible.key]
    if bias is not None:
        arrays.append(blocks.whole_blocks(bias, more_queries, more_keys))
        specs.append(
            pl.BlockSpec(
                (None, None, bq, bk),
                at(lambda b, n, visit: (b if len(bias) > 1 else 0, n, blocks.row(visit), blocks.column(visit))),
            )
        )
    out, lse = pl.pallas_call(
        functools.partial(
            _kernel,
            each=each,
            has_bias=bias is not None,
            has_lower=visible.has_lower,
            scale=scale,
            soft_cap=soft_cap,
        ),
        name="step_attention_forward",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, heads, count.max()),
            in_specs=specs,
            out_specs=[
                pl.BlockSpec((None, None, bq, width), at(row)),
                pl.BlockSpec((None, None, 1, bq), at(lambda b, n, visit: (b, n, 0, blocks.row(visit)))),
            ],
            scratch_shapes=[
                pltpu.VMEM((width + ONES, bq), jnp.float32),
                pltpu.VMEM((1, bq), jnp.float32),
                pltpu.VMEM((width + ONES, bk), v.dtype),
                pltpu.VMEM((coordinates, bk, blocks.LANES), jnp.int32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, more_queries, width), v.dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, more_queries), jnp.float32),
        ],
        compiler_params=blocks.compiler_params(),
        interpret=interpreted(),
    )(visits.reshape(-1), blocks.sink_logits(sinks, heads), *arrays)
    return jnp.swapaxes(out, 1, 2)[:, :num_queries, :, :head_dim], jnp.swapaxes(lse[:, :, 0], 1, 2)[:, :num_queries]


def _kernel(visits: Any, sinks: Any, *refs: Any, each: int, has_bias: bool, **options: Any) -> None:
    """One block of keys and one of queries of one head."""
    q, k, v, lower, upper, key, *rest = refs
    bias = rest.pop(0) if has_bias else None
    out, lse, total, peak, values, columns = rest
    b, n, step = (pl.program_id(axis) for axis in range(3))
    visit = visits[b * each + step]
    bounds = (columns, lower, upper)
    read = functools.partial(_read, q, k, v, bounds, bias, total, peak, values, **options)

    @pl.when(visit & blocks.FIRST != 0)
    def begin() -> None:
        sink = sinks[n]
        peak[...] = jnp.full(peak.shape, sink, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        # The sink is a first logit, without a value.
        total[-ONES:, :] = jnp.full((ONES, total.shape[1]), jnp.where(sink > UNSEEN / 2, 1.0, 0.0), jnp.float32)

    if FULL in blocks.COMPUTED:
        pl.when(blocks.kind(visit) == FULL)(functools.partial(read, masked=False))

    if MIXED in blocks.COMPUTED:

        @pl.when(blocks.kind(visit) == MIXED)
        def mixed() -> None:
            blocks.spread(key, columns)
            read(masked=True)

    @pl.when(visit & blocks.LAST != 0)
    def end() -> None:
        # A query that has seen nothing has summed what does not count.
        reads = peak[...] > UNSEEN / 2
        weight = jnp.where(reads, total[-ONES : 1 - ONES, :], 1.0)
        lse[...] = jnp.where(reads, (peak[...] + jnp.log2(weight)) / LOG2_E, UNSEEN)
        share = jnp.where(reads, 1.0 / weight, 0.0)
        out[...] = (total[:-ONES, :] * share).T.astype(out.dtype)


def _read(
    q: Any,
    k: Any,
    v: Any,
    bounds: tuple[Any, Any, Any],
    bias: Any,
    total: Any,
    peak: Any,
    values: Any,
    *,
    masked: bool,
    has_lower: tuple[bool, ...],
    scale: float,
    soft_cap: float | None,
) -> None:
    """Adds a block of keys to the weighted sums of values, which are relative to exp2(peak)."""
    values[:-ONES, :] = v[...].T
    values[-ONES:, :] = jnp.ones((ONES, values.shape[1]), values.dtype)

    def logits(job: tuple[pl.Slice, pl.Slice]) -> Array:
        queries, keys = job
        seen = blocks.tile_seen(bounds, keys, queries, has_lower) if masked else None
        tile = None if bias is None else bias[queries, keys]
        return blocks.tile_logits(q[queries, :], k[keys, :], tile, seen, scale, soft_cap)[0]

    def add(job: tuple[pl.Slice, pl.Slice], logits: Array) -> None:
        queries, keys = job
        before = peak[:, queries]
        higher = jnp.maximum(before, logits.max(axis=0, keepdims=True))
        weights = jnp.exp2(logits - higher).astype(values.dtype)
        peak[:, queries] = higher
        added = jax.lax.dot_general(
            values[:, keys], weights, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        total[:, queries] = total[:, queries] * jnp.exp2(before - higher) + added

    jobs = [(queries, keys) for queries in blocks.tiles(q.shape[0]) for keys in blocks.tiles(k.shape[0])]
    blocks.staggered(jobs, logits, add)


pallas_tpu = differentiable(forward, backward)
