"""A few queries against many keys on GPUs, where the time is that of reading the keys: each is read once.

The queries of all heads that share a key head are the rows of one product. The blocks of keys that are seen are dealt out
in nearly equal numbers to programs that work at the same time, whatever the lengths; `merge` joins what they find.
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
from ar_jax.kernels.step_attention.merge import merge
from ar_jax.kernels.step_attention.pallas_gpu_blocks import LOG2_E, Blocks, Logits, kinds, visits
from ar_jax.kernels.step_attention.visibility import UNSEEN, Visibility

MOST_ROWS = 64  # queries times the heads that share a key head; with more, products take as long as reading
PROGRAMS = 264  # two for each of an H100's 132 processors
LARGEST_BLOCK = 128  # of keys; tests make it smaller


def decodes(q: Array, k: Array, bias: Array | None) -> bool:
    """Whether this form is the faster one."""
    return bias is None and q.shape[1] * (q.shape[2] // k.shape[2]) <= MOST_ROWS and q.shape[1] <= k.shape[1]


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
    (batch, num_queries, heads, head_dim), (num_keys, shared) = q.shape, k.shape[1:3]
    group, width = heads // shared, triton.padded(head_dim)
    rows = triton.padded(group * num_queries)
    size = triton.padded(num_keys, min(LARGEST_BLOCK, 2**14 * 2 // (width * q.dtype.itemsize)))
    blocks = Blocks(num_queries, size, 4, 3)
    order, counts = visits(kinds(visible, blocks))
    columns = order.shape[2]
    parts = max(1, min(columns, PROGRAMS // (batch * shared)))
    row = (lambda b: b) if len(visible.key) > 1 else (lambda b: 0)

    def by_key_head(a: Array) -> Array:
        """[B, T, N, H] -> [B, K, N / K T, H]."""
        a = a.reshape(batch, num_queries, shared, group, head_dim)
        return jnp.moveaxis(a, 1, 3).reshape(batch, shared, group * num_queries, head_dim)

    lower, upper = (jnp.tile(a, (1, 1, group)) for a in (visible.lower, visible.upper))
    coordinates = len(visible.has_lower)
    key_spec = pl.BlockSpec((None, columns * size, None, width), lambda p, n, b: (b, 0, n, 0))
    bound_spec = pl.BlockSpec((None, coordinates, rows), lambda p, n, b: (row(b), 0, 0))
    outs, lses = pl.pallas_call(
        functools.partial(
            step_attention_decode,
            size=size,
            parts=parts,
            logits=Logits(scale, soft_cap, visible.has_lower, group * num_queries, num_keys, head_dim),
        ),
        name="step_attention_decode",
        grid=(parts, shared, batch),
        in_specs=[
            pl.BlockSpec((None, None, rows, width), lambda p, n, b: (b, n, 0, 0)),
            key_spec,
            key_spec,
            bound_spec,
            bound_spec,
            pl.BlockSpec((None, coordinates, columns * size), lambda p, n, b: (row(b), 0, 0)),
            pl.BlockSpec((None, None, columns), lambda p, n, b: (row(b), 0, 0)),
            pl.BlockSpec((None, None, 2), lambda p, n, b: (row(b), 0, 0)),
        ],
        out_specs=[
            pl.BlockSpec((None, None, None, rows, width), lambda p, n, b: (p, b, n, 0, 0)),
            pl.BlockSpec((None, None, None, rows), lambda p, n, b: (p, b, n, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((parts, batch, shared, group * num_queries, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((parts, batch, shared, group * num_queries), jnp.float32),
        ],
        compiler_params=blocks.compiler_params(),
        interpret=interpreted(),
    )(by_key_head(q), k, v, lower, upper, visible.key, order, counts)
    out, lse = merge(outs, lses)
    lse = jnp.moveaxis(lse.reshape(batch, heads, num_queries), 2, 1)
    out = jnp.moveaxis(out.reshape(batch, heads, num_queries, head_dim), 2, 1)
    lse = jnp.where(lse > UNSEEN / 2, lse, UNSEEN)  # merge adds the logarithm of the number of parts
    if sinks is not None:
        own = jnp.broadcast_to(sinks.astype(jnp.float32)[None, None], lse.shape)
        out, lse = out * jax.nn.sigmoid(lse - own)[..., None], jnp.logaddexp(lse, own)
    return out.astype(v.dtype), lse


def step_attention_decode(
    q: Any,
    k: Any,
    v: Any,
    lower: Any,
    upper: Any,
    key: Any,
    order: Any,
    counts: Any,
    out: Any,
    lse: Any,
    *,
    size: int,
    parts: int,
    logits: Logits,
) -> None:
    """One part of the visited blocks of keys, and all queries of one key head."""
    rows = q.shape[0]
    queries = logits.queries(q, 0, rows)
    bounds = logits.bounds(lower, upper, 0, rows)

    def read(visit: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        sums, peak, total = carry
        first = order[visit] * size
        found, _ = logits.of(triton.product(queries, logits.keys(k, first, size), (1, 1)), None)
        found = jnp.where(logits.seen(bounds, key, first, size), found, UNSEEN)
        higher = jnp.maximum(peak, found.max(axis=1))
        weights = jnp.exp2(found - higher[:, None])
        fade = jnp.exp2(peak - higher)
        added = triton.product(weights.astype(v.dtype), logits.keys(v, first, size))
        return sums * fade[:, None] + added, higher, total * fade + weights.sum(axis=1)

    part, some = pl.program_id(0), counts[1]
    carry = jnp.zeros(queries.shape, jnp.float32), jnp.full(rows, UNSEEN), jnp.zeros(rows, jnp.float32)
    sums, peak, total = jax.lax.fori_loop(some * part // parts, some * (part + 1) // parts, read, carry)

    reads = peak > UNSEEN / 2
    total = jnp.where(reads, total, 1.0)
    share = jnp.where(reads, 1.0 / total, 0.0)
    shape = (logits.num_queries, logits.head_dim)
    triton.store(out, (slice(None), slice(None)), sums * share[:, None], shape)
    statistic = jnp.where(reads, (peak + jnp.log2(total)) / LOG2_E, UNSEEN)
    triton.store(lse, (slice(None),), statistic, shape[:1])
