"""The gradient of step attention on TPUs in one pass over the visited blocks, key block by key block (arXiv:2205.14135).

    dv_j = sum_i p_ij dout_i;   dk_j = scale sum_i ds_ij q_i;   dq_i = scale sum_j ds_ij k_j;
    ds_ij = p_ij (dout_i . v_j - delta_i)

Sums over queries are complete after a row of visits; those over keys grow in on-chip memory, so a head's queries are
taken in parts that fit there.
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
from ar_jax.kernels.step_attention.pallas_tpu_blocks import LOG2_E
from ar_jax.kernels.step_attention.visibility import EMPTY, FULL, MIXED, Visibility

QUERY_BYTES = 8 * 2**20  # of dq that stay on chip, twice: one head is written out while the next begins
LARGEST_BLOCK_WITH_BIAS = 256


def backward(
    q: Array,
    k: Array,
    v: Array,
    visible: Visibility,
    bias: Array | None,
    lse: Array,
    d_out: Array,
    delta: Array,
    *,
    scale: float,
    soft_cap: float | None,
) -> tuple[Array, Array, Array, Array | None]:
    """See `differentiable`. Cost: 5 products of each visited block; without a bias, O(T + S) memory."""
    num_queries = q.shape[1]
    size = QUERY_BYTES // (4 * (q.shape[3] + -q.shape[3] % blocks.LANES))
    parts = []
    for start in range(0, num_queries, size):
        cut = functools.partial(jax.lax.slice_in_dim, start_index=start, limit_index=min(start + size, num_queries))
        lower, upper = (cut(a, axis=2) for a in (visible.lower, visible.upper))
        own = Visibility(lower, upper, visible.key, visible.has_lower)
        rows = [cut(a, axis=1) for a in (q, lse, d_out, delta)]
        part_bias = None if bias is None else cut(bias, axis=2)
        parts.append(_part(rows[0], k, v, own, part_bias, *rows[1:], scale=scale, soft_cap=soft_cap))
    dq, dk, dv, d_bias = zip(*parts, strict=True)
    return (
        jnp.concatenate(dq, axis=1),
        functools.reduce(jnp.add, dk).astype(k.dtype),
        functools.reduce(jnp.add, dv).astype(v.dtype),
        None if bias is None else jnp.concatenate(d_bias, axis=2),
    )


def _part(
    q: Array,
    k: Array,
    v: Array,
    visible: Visibility,
    bias: Array | None,
    lse: Array,
    d_out: Array,
    delta: Array,
    *,
    scale: float,
    soft_cap: float | None,
) -> tuple[Array, Array, Array, Array | None]:
    """What so many queries add to dk and dv, in float32; their dq and dbias."""
    (batch, num_queries, heads, head_dim), (num_keys, shared) = q.shape, k.shape[1:3]
    largest = None if bias is None else LARGEST_BLOCK_WITH_BIAS
    bq, bk = blocks.block_size(num_queries, largest), blocks.block_size(num_keys, largest)
    visible = blocks.padded(visible, bq, bk)
    more_queries, more_keys = visible.upper.shape[2], visible.key.shape[2]
    kinds = visible.blocks(bq, bk)
    visits, count = blocks.visits(jnp.swapaxes(kinds, 1, 2))
    each = visits.shape[1] if len(visits) > 1 else 0

    def at(index: Any) -> Any:
        return lambda b, n, step, visits: index(b, n, visits[b * each + step])

    shown = (lambda b: b) if each else (lambda b: 0)
    row, column = blocks.row, blocks.column  # of keys, of queries
    q, d_out = (blocks.heads_in_front(a, more_queries) for a in (q, d_out))
    k, v = (blocks.heads_in_front(a, more_keys) for a in (k, v))
    lse, delta = (
        jnp.pad(jnp.swapaxes(a, 1, 2), ((0, 0), (0, 0), (0, more_queries - num_queries)))[:, :, None]
        for a in (lse, delta)
    )
    width, coordinates = q.shape[3], len(visible.has_lower)
    group = heads // shared
    query_spec = pl.BlockSpec((None, None, bq, width), at(lambda b, n, visit: (b, n, column(visit), 0)))
    key_spec = pl.BlockSpec((None, None, bk, width), at(lambda b, n, visit: (b, n // group, row(visit), 0)))
    statistic_spec = pl.BlockSpec((None, None, 1, bq), at(lambda b, n, visit: (b, n, 0, column(visit))))
    bound_spec = pl.BlockSpec((None, coordinates, bq), at(lambda b, n, visit: (shown(b), 0, column(visit))))
    coordinate_spec = pl.BlockSpec((None, coordinates, bk), at(lambda b, n, visit: (shown(b), 0, row(visit))))
    grad_spec = pl.BlockSpec((None, None, bk, width), at(lambda b, n, visit: (b, n, row(visit), 0)))

    arrays = [q, k, v, lse, d_out, delta, visible.lower, visible.upper, visible.key]
    in_specs = [query_spec, key_spec, key_spec, statistic_spec, query_spec, statistic_spec, bound_spec, bound_spec]
    in_specs.append(coordinate_spec)
    out_specs = [pl.BlockSpec((None, None, more_queries // bq, width, bq), at(lambda b, n, visit: (b, n, 0, 0, 0)))]
    out_specs += [grad_spec, grad_spec]
    out_shape = [jax.ShapeDtypeStruct((batch, heads, more_queries // bq, width, bq), jnp.float32)]
    out_shape += [jax.ShapeDtypeStruct((batch, heads, more_keys, width), jnp.float32)] * 2
    if bias is not None:
        arrays.append(blocks.whole_blocks(bias, more_queries, more_keys))
        bias_at = at(lambda b, n, visit: (b if len(bias) > 1 else 0, n, column(visit), row(visit)))
        in_specs.append(pl.BlockSpec((None, None, bq, bk), bias_at))
        out_specs.append(pl.BlockSpec((None, None, bq, bk), at(lambda b, n, visit: (b, n, column(visit), row(visit)))))
        out_shape.append(jax.ShapeDtypeStruct((batch, heads, more_queries, more_keys), bias.dtype))
    dq, dk, dv, *d_bias = pl.pallas_call(
        functools.partial(
            _kernel, each=each, has_bias=bias is not None, has_lower=visible.has_lower, scale=scale, soft_cap=soft_cap
        ),
        name="step_attention_backward",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads, count.max()),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[
                pltpu.VMEM((width, bk), k.dtype),
                pltpu.VMEM((coordinates, bk, blocks.LANES), jnp.int32),
            ],
        ),
        out_shape=out_shape,
        compiler_params=blocks.compiler_params(),
        interpret=interpreted(),
    )(visits.reshape(-1), *arrays)
    dq = dq.transpose(0, 2, 4, 1, 3).reshape(batch, more_queries, heads, width)
    dq = dq[:, :num_queries, :, :head_dim].astype(q.dtype)

    def whole(a: Array) -> Array:
        """[B, N, S, H] -> [B, S, K, H], the heads that share a key head summed."""
        a = a.reshape(batch, shared, group, more_keys, width).sum(axis=2)
        return jnp.swapaxes(a, 1, 2)[:, :num_keys, :, :head_dim]

    return dq, whole(dk), whole(dv), _whole_bias(d_bias[0], bias, kinds, bq, bk) if bias is not None else None


def _whole_bias(d_bias: Array, bias: Array, kinds: Array, bq: int, bk: int) -> Array:
    """Zeros where no block was visited, for nothing was written there."""
    visited = jnp.repeat(jnp.repeat(kinds != EMPTY, bq, axis=1), bk, axis=2)[:, None]
    d_bias = jnp.where(visited, d_bias, jnp.zeros((), d_bias.dtype))[:, :, : bias.shape[2], : bias.shape[3]]
    return d_bias if len(bias) > 1 else d_bias.astype(jnp.float32).sum(axis=0, keepdims=True).astype(bias.dtype)


def _kernel(visits: Any, *refs: Any, each: int, has_bias: bool, **options: Any) -> None:
    """One block of keys and one of queries of one head."""
    q, k, v, lse, d_out, delta, lower, upper, key, *rest = refs
    bias = rest.pop(0) if has_bias else None
    dq, dk, dv, *rest = rest
    d_bias = rest.pop(0) if has_bias else None
    turned, columns = rest
    step = pl.program_id(2)
    visit = visits[pl.program_id(0) * each + step]
    block = blocks.column(visit)
    inputs, bounds = (q, k, v, lse, d_out, delta, bias), (columns, lower, upper)
    read = functools.partial(_read, inputs, bounds, turned, dq.at[block], dk, dv, d_bias, **options)

    @pl.when(step == 0)
    def begin_head() -> None:
        dq[...] = jnp.zeros(dq.shape, jnp.float32)

    @pl.when(visit & blocks.FIRST != 0)
    def begin() -> None:
        dk[...] = jnp.zeros(dk.shape, jnp.float32)
        dv[...] = jnp.zeros(dv.shape, jnp.float32)
        turned[...] = k[...].T

    if FULL in blocks.COMPUTED:
        pl.when(blocks.kind(visit) == FULL)(functools.partial(read, masked=False))

    if MIXED in blocks.COMPUTED:

        @pl.when(blocks.kind(visit) == MIXED)
        def mixed() -> None:
            blocks.spread(key, columns)
            read(masked=True)


def _read(
    inputs: tuple[Any, ...],
    bounds: tuple[Any, Any, Any],
    turned: Any,
    dq: Any,
    dk: Any,
    dv: Any,
    d_bias: Any,
    *,
    masked: bool,
    has_lower: tuple[bool, ...],
    scale: float,
    soft_cap: float | None,
) -> None:
    """Adds what a block of queries and one of keys give."""
    q, k, v, lse, d_out, delta, bias = inputs
    product = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
    along_rows, plain = (((1,), (1,)), ((), ())), (((1,), (0,)), ((), ()))

    def start(job: tuple[pl.Slice, pl.Slice]) -> tuple[Any, ...]:
        queries, keys = job
        seen = blocks.tile_seen(bounds, keys, queries, has_lower) if masked else None
        tile = None if bias is None else bias[queries, keys]
        logits, slope = blocks.tile_logits(q[queries, :], k[keys, :], tile, None, scale, soft_cap)
        return logits, slope, seen, product(v[keys, :], d_out[queries, :], along_rows)

    def finish(job: tuple[pl.Slice, pl.Slice], started: tuple[Any, ...]) -> None:
        queries, keys = job
        logits, slope, seen, d_weights = started
        weights = jnp.exp2(logits - lse[:, queries] * LOG2_E)
        if seen is not None:
            weights = jnp.where(seen, weights, 0.0)
        d_logits = weights * (d_weights - delta[:, queries])
        if d_bias is not None:
            d_bias[queries, keys] = d_logits.T.astype(d_bias.dtype)
        if slope is not None:
            d_logits *= slope
        d_logits = (d_logits * scale).astype(q.dtype)
        dv[keys, :] += product(weights.astype(v.dtype), d_out[queries, :], plain)
        dk[keys, :] += product(d_logits, q[queries, :], plain)
        dq[:, queries] += product(turned[:, keys], d_logits, plain)

    jobs = [(queries, keys) for keys in blocks.tiles(k.shape[0]) for queries in blocks.tiles(q.shape[0])]
    blocks.staggered(jobs, start, finish)
