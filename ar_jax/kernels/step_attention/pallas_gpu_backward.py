"""The gradient of step attention on GPUs, in two kernels without atomic sums (arXiv:2307.08691).

    dv_j = sum_i p_ij dout_i;   dk_j = scale sum_i ds_ij q_i;   dq_i = scale sum_j ds_ij k_j
    ds_ij = p_ij (dout_i . v_j - delta_i)

A program of the first has a block of queries and reads the keys it sees; one of the second has a block of keys and reads
the queries that see it. Each works the weights out anew.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from ar_jax.kernels import triton
from ar_jax.kernels.dispatch import interpreted
from ar_jax.kernels.step_attention.pallas_gpu_blocks import LOG2_E, Blocks, Logits, kinds, specs, visits
from ar_jax.kernels.step_attention.visibility import Visibility

# By bytes of a number and padded head_dim.
QUERY_BLOCKS = {
    2: {32: Blocks(128, 64, 8, 3), 64: Blocks(128, 64, 8, 3), 128: Blocks(128, 64, 8, 2), 256: Blocks(64, 32, 8, 2)},
    4: {32: Blocks(64, 32, 4, 2), 64: Blocks(64, 32, 8, 2), 128: Blocks(32, 16, 4, 1), 256: Blocks(16, 16, 8, 1)},
}
KEY_BLOCKS = {
    2: {32: Blocks(64, 128, 8, 3), 64: Blocks(64, 128, 8, 3), 128: Blocks(64, 128, 8, 2), 256: Blocks(32, 64, 8, 2)},
    4: {32: Blocks(32, 64, 4, 2), 64: Blocks(32, 64, 8, 2), 128: Blocks(16, 16, 4, 1), 256: Blocks(16, 16, 8, 1)},
}


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
    """See `differentiable`. Cost: 7 products of each visited block; without a bias, O(T + S) memory."""
    logits = Logits(scale, soft_cap, visible.has_lower, q.shape[1], k.shape[1], q.shape[3])
    lse, delta = (jnp.swapaxes(a, 1, 2) for a in (lse, delta))  # [B, N, T]: a program reads neighbouring numbers
    arrays = [q, k, v, visible.lower, visible.upper, visible.key, bias, lse, d_out.astype(v.dtype), delta]
    dq, d_bias = _of_queries(arrays, visible, logits)
    dk, dv = _of_keys(arrays, visible, logits)
    if d_bias is not None and bias is not None:
        d_bias = d_bias.sum(axis=0, keepdims=True) if len(bias) < len(d_bias) else d_bias
        d_bias = d_bias.astype(bias.dtype)
    return dq, dk, dv, d_bias


def _blocks(table: dict[int, dict[int, Blocks]], q: Array, k: Array) -> Blocks:
    width = max(triton.padded(q.shape[3]), 32)
    return table[q.dtype.itemsize][width].within(q.shape[1], k.shape[1])


def _inputs(spec: dict[str, pl.BlockSpec | None]) -> list[pl.BlockSpec | None]:
    names = "q", "k", "k", "bound", "bound", "key", "bias", "statistic", "q", "statistic", "order", "counts"
    return [spec[name] for name in names]


def _of_queries(arrays: list[Any], visible: Visibility, logits: Logits) -> tuple[Array, Array | None]:
    """dq, and the bias's gradient of each example."""
    q, k, *_, bias, _, _, _ = arrays
    blocks = _blocks(QUERY_BLOCKS, q, k)
    order, counts = visits(kinds(visible, blocks))
    spec = specs(q, k, visible, bias, blocks)
    d_bias = None
    if bias is not None:
        dtype = bias.dtype if len(bias) == len(q) else jnp.float32
        d_bias = jax.ShapeDtypeStruct((len(q), *bias.shape[1:]), dtype)
    dq, *more = pl.pallas_call(
        functools.partial(step_attention_dq, blocks=blocks, logits=logits),
        name="step_attention_dq",
        grid=(order.shape[1], q.shape[2], len(q)),
        in_specs=_inputs(spec),
        out_specs=[spec["q"], *([] if d_bias is None else [spec["d_bias"]])],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), *([] if d_bias is None else [d_bias])],
        compiler_params=blocks.compiler_params(),
        interpret=interpreted(),
    )(*arrays, order, counts)
    return dq, more[0] if more else None


def step_attention_dq(
    q: Any,
    k: Any,
    v: Any,
    lower: Any,
    upper: Any,
    key: Any,
    bias: Any,
    lse: Any,
    d_out: Any,
    delta: Any,
    order: Any,
    counts: Any,
    dq: Any,
    d_bias: Any = None,
    *,
    blocks: Blocks,
    logits: Logits,
) -> None:
    """One block of queries of one head."""
    block = order.shape[0] - 1 - pl.program_id(0)
    start = block * blocks.queries
    rows = pl.ds(start, blocks.queries)
    queries, d_outs = (logits.queries(ref, start, blocks.queries) for ref in (q, d_out))
    bounds = logits.bounds(lower, upper, start, blocks.queries)
    log_sum, correction = (triton.load(ref, (rows,), (logits.num_queries,)) for ref in (lse, delta))

    def write(first: Any, value: Array) -> None:
        if d_bias is not None:
            at = (rows, pl.ds(first, blocks.keys))
            triton.store(d_bias, at, value, (logits.num_queries, logits.num_keys))

    def read(masked: bool, visit: Any, sums: Array) -> Array:
        first = order[block, visit] * blocks.keys
        keys = logits.keys(k, first, blocks.keys)
        own = logits.bias(bias, start, first, blocks)
        found, slope = logits.of(triton.product(queries, keys, (1, 1)), own)
        weights = jnp.exp2(found - (log_sum * LOG2_E)[:, None])
        if masked:
            weights = jnp.where(logits.seen(bounds, key, first, blocks.keys), weights, 0.0)
        d_weights = triton.product(d_outs, logits.keys(v, first, blocks.keys), (1, 1))
        d_logits = weights * (d_weights - correction[:, None])
        write(first, d_logits)
        d_logits = d_logits if slope is None else d_logits * slope
        return sums + triton.product(d_logits.astype(k.dtype), keys)

    full, some = counts[block, 0], counts[block, 1]
    sums = jnp.zeros(queries.shape, jnp.float32)
    sums = jax.lax.fori_loop(0, full, functools.partial(read, False), sums)
    sums = jax.lax.fori_loop(full, some, functools.partial(read, True), sums)
    triton.store(dq, (rows, slice(None)), sums * logits.scale, (logits.num_queries, logits.head_dim))
    if d_bias is not None:  # what is not visited has no gradient

        def clear(visit: Any, nothing: Any) -> Any:
            write(order[block, visit] * blocks.keys, jnp.zeros((blocks.queries, blocks.keys), jnp.float32))
            return nothing

        jax.lax.fori_loop(some, order.shape[1], clear, jnp.int32(0))


def _of_keys(arrays: list[Any], visible: Visibility, logits: Logits) -> tuple[Array, Array]:
    """dk and dv."""
    q, k, v, *_, bias, _, _, _ = arrays
    blocks = _blocks(KEY_BLOCKS, q, k)
    order, counts = visits(jnp.swapaxes(kinds(visible, blocks), 1, 2))
    spec = specs(q, k, visible, bias, blocks, by_key_head=True)
    return pl.pallas_call(
        functools.partial(step_attention_dkdv, blocks=blocks, logits=logits),
        name="step_attention_dkdv",
        grid=(order.shape[1], k.shape[2], len(q)),
        in_specs=_inputs(spec),
        out_specs=[spec["k"], spec["k"]],
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        compiler_params=blocks.compiler_params(),
        interpret=interpreted(),
    )(*arrays, order, counts)


def step_attention_dkdv(
    q: Any,
    k: Any,
    v: Any,
    lower: Any,
    upper: Any,
    key: Any,
    bias: Any,
    lse: Any,
    d_out: Any,
    delta: Any,
    order: Any,
    counts: Any,
    dk: Any,
    dv: Any,
    *,
    blocks: Blocks,
    logits: Logits,
) -> None:
    """One block of keys of one key head, and all the heads that share it; logits are transposed, [keys, queries]."""
    block = pl.program_id(0)
    first = block * blocks.keys
    rows = pl.ds(first, blocks.keys)
    keys, values = (logits.keys(ref, first, blocks.keys) for ref in (k, v))
    num_queries, head_dim = logits.num_queries, logits.head_dim
    group = lse.shape[0]

    def read(head: Any, masked: bool, visit: Any, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        d_keys, d_values = sums
        start = order[block, visit] * blocks.queries
        own = pl.ds(start, blocks.queries)
        shape = (num_queries, group, head_dim)
        queries, d_outs = (triton.load(ref, (own, head, slice(None)), shape) for ref in (q, d_out))
        log_sum, correction = (triton.load(ref, (head, own), (group, num_queries)) for ref in (lse, delta))
        added = None
        if bias is not None:
            at = (head, own, pl.ds(first, blocks.keys))
            added = triton.load(bias, at, (group, num_queries, logits.num_keys)).T
        found, slope = logits.of(triton.product(keys, queries, (1, 1)), added)
        weights = jnp.exp2(found - (log_sum * LOG2_E)[None])
        if masked:
            bounds = logits.bounds(lower, upper, start, blocks.queries)
            seen = logits.seen(bounds, key, first, blocks.keys, queries_axis=1)
            weights = jnp.where(seen, weights, 0.0)
        d_values += triton.product(weights.astype(v.dtype), d_outs)
        d_weights = triton.product(values, d_outs, (1, 1))
        d_logits = weights * (d_weights - correction[None])
        d_logits = d_logits if slope is None else d_logits * slope
        return d_keys + triton.product(d_logits.astype(q.dtype), queries), d_values

    full, some = counts[block, 0], counts[block, 1]

    def of_head(head: Any, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        sums = jax.lax.fori_loop(0, full, functools.partial(read, head, False), sums)
        return jax.lax.fori_loop(full, some, functools.partial(read, head, True), sums)

    sums = jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32)
    d_keys, d_values = of_head(0, sums) if group == 1 else jax.lax.fori_loop(0, group, of_head, sums)
    triton.store(dk, (rows, slice(None)), d_keys * logits.scale, (logits.num_keys, head_dim))
    triton.store(dv, (rows, slice(None)), d_values, (logits.num_keys, head_dim))
