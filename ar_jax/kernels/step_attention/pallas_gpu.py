"""Step attention on GPUs: a program for each block of queries, a loop over the blocks of keys it sees (arXiv:2205.14135).

The visited blocks are a list, made from the steps while the program runs.
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
from ar_jax.kernels.step_attention.gradient import differentiable
from ar_jax.kernels.step_attention.pallas_gpu_backward import backward
from ar_jax.kernels.step_attention.pallas_gpu_blocks import LOG2_E, Blocks, Logits, kinds, specs, visits
from ar_jax.kernels.step_attention.pallas_gpu_decode import decode, decodes
from ar_jax.kernels.step_attention.visibility import UNSEEN, Visibility

# By bytes of a number and padded head_dim: as large as the registers and the shared memory of an H100 hold.
BLOCKS = {
    2: {32: Blocks(128, 64, 4, 3), 64: Blocks(128, 64, 4, 3), 128: Blocks(128, 64, 8, 3), 256: Blocks(128, 64, 8, 2)},
    4: {32: Blocks(64, 32, 4, 2), 64: Blocks(64, 32, 4, 2), 128: Blocks(32, 32, 4, 2), 256: Blocks(16, 16, 8, 1)},
}


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
    if decodes(q, k, bias):
        return decode(q, k, v, visible, sinks, scale=scale, soft_cap=soft_cap)
    (batch, num_queries, heads, head_dim), num_keys = q.shape, k.shape[1]
    width = triton.padded(head_dim)
    blocks = BLOCKS[q.dtype.itemsize][max(width, 32)].within(num_queries, num_keys)
    order, counts = visits(kinds(visible, blocks))
    sink_logits = jnp.full(heads, UNSEEN) if sinks is None else sinks.astype(jnp.float32) * LOG2_E
    arrays = [q, k, v, visible.lower, visible.upper, visible.key, bias, order, counts, sink_logits]
    spec = specs(q, k, visible, bias, blocks)
    in_specs = [*[spec[name] for name in ("q", "k", "k", "bound", "bound", "key")]]
    in_specs += [spec["bias"], spec["order"], spec["counts"], spec["head"]]
    out, lse = pl.pallas_call(
        functools.partial(
            step_attention_forward,
            blocks=blocks,
            logits=Logits(scale, soft_cap, visible.has_lower, num_queries, num_keys, head_dim),
        ),
        name="step_attention_forward",
        grid=(order.shape[1], heads, batch),
        in_specs=in_specs,
        out_specs=[spec["q"], spec["statistic"]],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, v.dtype),
            jax.ShapeDtypeStruct((batch, heads, num_queries), jnp.float32),
        ],
        compiler_params=blocks.compiler_params(),
        interpret=interpreted(),
    )(*arrays)
    return out, jnp.swapaxes(lse, 1, 2)


def step_attention_forward(
    q: Any,
    k: Any,
    v: Any,
    lower: Any,
    upper: Any,
    key: Any,
    bias: Any,
    order: Any,
    counts: Any,
    sink: Any,
    out: Any,
    lse: Any,
    *,
    blocks: Blocks,
    logits: Logits,
) -> None:
    """One block of queries of one head."""
    # The last queries first: mostly they read the most, and programs that read less fill the gaps at the end.
    block = order.shape[0] - 1 - pl.program_id(0)
    start = block * blocks.queries
    queries = logits.queries(q, start, blocks.queries)
    bounds = logits.bounds(lower, upper, start, blocks.queries)

    def read(masked: bool, visit: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        sums, peak, total = carry
        first = order[block, visit] * blocks.keys
        keys = logits.keys(k, first, blocks.keys)
        own = logits.bias(bias, start, first, blocks)
        found, _ = logits.of(triton.product(queries, keys, (1, 1)), own)
        if masked:
            found = jnp.where(logits.seen(bounds, key, first, blocks.keys), found, UNSEEN)
        higher = jnp.maximum(peak, found.max(axis=1))
        weights = jnp.exp2(found - higher[:, None])
        fade = jnp.exp2(peak - higher)
        added = triton.product(weights.astype(v.dtype), logits.keys(v, first, blocks.keys))
        return sums * fade[:, None] + added, higher, total * fade + weights.sum(axis=1)

    # The sink is a first logit, without a value. What a query sums before it has seen a key does not count: the first
    # key's fade is zero, and `reads` is false where there never is one.
    peak = jnp.broadcast_to(sink[...], (blocks.queries,))
    carry = jnp.zeros(queries.shape, jnp.float32), peak, jnp.where(peak > UNSEEN / 2, 1.0, 0.0)
    full, some = counts[block, 0], counts[block, 1]
    carry = jax.lax.fori_loop(0, full, functools.partial(read, False), carry)
    sums, peak, total = jax.lax.fori_loop(full, some, functools.partial(read, True), carry)

    reads = peak > UNSEEN / 2
    total = jnp.where(reads, total, 1.0)
    share = jnp.where(reads, 1.0 / total, 0.0)
    shape = (logits.num_queries, logits.head_dim)
    triton.store(out, (pl.ds(start, blocks.queries), slice(None)), sums * share[:, None], shape)
    statistic = jnp.where(reads, (peak + jnp.log2(total)) / LOG2_E, UNSEEN)
    triton.store(lse, (pl.ds(start, blocks.queries),), statistic, shape[:1])


pallas_gpu = differentiable(forward, backward)
