"""Linear attention on GPUs: memories before each chunk first, one after the other, then all chunks' outputs at once.

The equations are those of xla.py. Of a decay per channel the scores inside a chunk have a kernel of their own.
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
from ar_jax.kernels.linear_attention.gradient import differentiable
from ar_jax.kernels.linear_attention.pallas_gpu_backward import backward
from ar_jax.kernels.linear_attention.pallas_gpu_channel import channel_scores
from ar_jax.kernels.linear_attention.pallas_gpu_chunks import Chunks

CHUNK, TILE = 64, 64  # tokens, and columns of the memory; half of it for 32 bits
CHANNELS = 16  # of the keys, that are read at once where numbers have 32 bits: more would not fit into registers


def pallas_gpu(
    q: Array,
    k: Array,
    v: Array,
    *,
    log_decay: Array | None,
    bonus: Array | None,
    initial_state: Array,
    chunk_size: int | None = None,
) -> tuple[Array, Array]:
    """See `linear_attention`. The backward pass keeps the memory before each chunk and works the rest out anew."""
    batch, length, heads, head_dim = q.shape
    decay = jnp.zeros(heads, jnp.float32) if log_decay is None else log_decay
    decay = jnp.broadcast_to(decay[None, None], (batch, length, heads)) if decay.ndim == 1 else decay
    half = q.dtype.itemsize // 2
    largest = CHUNK // half if chunk_size is None else min(chunk_size, CHUNK // half)
    chunks = Chunks(
        batch,
        length,
        heads,
        head_dim,
        v.shape[3],
        size=triton.padded(length, max(largest, triton.SMALLEST)),
        tile=triton.padded(v.shape[3], TILE // half),
        by_channel=decay.ndim == 4,
        strict=bonus is not None,
    )
    decay = decay if chunks.by_channel else jnp.swapaxes(decay, 1, 2)
    return _attend(chunks, q, k.astype(q.dtype), v.astype(q.dtype), decay, bonus, initial_state)


def forward(
    chunks: Chunks,
    q: Array,
    k: Array,
    v: Array,
    decay: Array,
    bonus: Array | None,
    state: Array,
    keep: bool,
) -> tuple[Array, Array, Any]:
    """See `differentiable`; kept are the memories before each chunk, and the scores where there are any."""
    del keep  # outputs are made from the memories in any case
    spec = chunks.specs()
    tokens, padded_dim, padded_width = chunks.padded
    rows = triton.padded(chunks.head_dim, 64)
    tiles = padded_dim // rows, padded_width // chunks.tile
    before, final = pl.pallas_call(
        functools.partial(linear_attention_states, chunks=chunks, rows=rows),
        name="linear_attention_states",
        grid=(tiles[0] * tiles[1], chunks.heads, chunks.batch),
        in_specs=[spec[name] for name in ("key", "value", "decay", "memory")],
        out_specs=[spec["memories"], spec["memory"]],
        out_shape=[
            jax.ShapeDtypeStruct((chunks.batch, chunks.count, chunks.heads, *chunks.memory), q.dtype),
            jax.ShapeDtypeStruct(state.shape, jnp.float32),
        ],
        compiler_params=chunks.compiler_params(8 if chunks.by_channel else 4, 3),
        interpret=interpreted(),
    )(k, v, decay, state)
    scores = channel_scores(chunks, q, k, decay) if chunks.by_channel else None
    out = pl.pallas_call(
        functools.partial(linear_attention_outs, chunks=chunks),
        name="linear_attention_outs",
        grid=(chunks.count * tiles[1], chunks.heads, chunks.batch),
        in_specs=[
            *[spec[name] for name in ("key", "key", "value", "decay")],
            None if bonus is None else spec["bonus"],
            spec["memories"],
            None if scores is None else spec["scores"],
        ],
        out_specs=spec["value"],
        out_shape=jax.ShapeDtypeStruct(v.shape, v.dtype),
        compiler_params=chunks.compiler_params(8, 2),
        interpret=interpreted(),
    )(q, k, v, decay, bonus, before, scores)
    return out, final, (before, scores)


def linear_attention_states(
    k: Any, v: Any, decay: Any, state: Any, before: Any, final: Any, *, chunks: Chunks, rows: int
) -> None:
    """A tile of the memory before each chunk, and after the last one."""
    part, parts = pl.program_id(0), chunks.padded[2] // chunks.tile
    own = pl.ds(part // parts * rows, rows), pl.ds(part % parts * chunks.tile, chunks.tile)

    def chunk(index: Any, memory: Array) -> Array:
        triton.store(before, (index, *own), memory, (chunks.count, *chunks.memory))
        tokens = pl.ds(index * chunks.size, chunks.size)
        keys = triton.load(k, (tokens, own[0]), chunks.keys)
        values = triton.load(v, (tokens, own[1]), chunks.values)
        fade = chunks.decay(decay, tokens, own[0])
        written = (keys.astype(jnp.float32) * fade.to_end()).astype(keys.dtype)
        return fade.whole() * memory + triton.product(written, values, (0, 0))

    memory = triton.load(state, own, chunks.memory)
    triton.store(final, own, jax.lax.fori_loop(0, chunks.count, chunk, memory), chunks.memory)


def linear_attention_outs(
    q: Any, k: Any, v: Any, decay: Any, bonus: Any, before: Any, scores: Any, out: Any, *, chunks: Chunks
) -> None:
    """Some columns of a chunk's outputs."""
    part, parts = pl.program_id(0), chunks.padded[2] // chunks.tile
    index, columns = part // parts, pl.ds(part % parts * chunks.tile, chunks.tile)
    tokens = pl.ds(index * chunks.size, chunks.size)
    values, causal = triton.load(v, (tokens, columns), chunks.values), chunks.causal()

    def channels(number: Any, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        """Adds what some channels of the keys say."""
        result, weights, own = sums
        rows = pl.ds(number * size, size)
        queries, keys = (triton.load(ref, (tokens, rows), chunks.keys) for ref in (q, k))
        memory = triton.load(before, (index, rows, columns), (chunks.count, *chunks.memory))
        from_start = chunks.decay(decay, tokens, rows).from_start()
        result += triton.product((queries.astype(jnp.float32) * from_start).astype(queries.dtype), memory)
        if scores is None:
            weights += triton.product(queries, keys, (1, 1))
        if bonus is not None:
            weighted = triton.load(bonus, (rows,), (chunks.head_dim,))[None] * queries.astype(jnp.float32)
            own += (weighted * keys.astype(jnp.float32)).sum(axis=1)
        return result, weights, own

    width = chunks.padded[1]
    size = width if values.dtype.itemsize == 2 else min(width, CHANNELS)
    sums: Any = tuple(jnp.zeros(s, jnp.float32) for s in (values.shape, causal.shape, causal.shape[:1]))
    sums = channels(0, sums) if size == width else jax.lax.fori_loop(0, width // size, channels, sums)
    result, weights, own = sums
    if scores is None:
        weights *= chunks.decay(decay, tokens).between(causal)
    else:
        weights = jnp.where(causal, scores[tokens, :].astype(jnp.float32), 0.0)
    result += triton.product(weights.astype(values.dtype), values)
    if bonus is not None:
        result += own[:, None] * values.astype(jnp.float32)
    triton.store(out, (tokens, columns), result, chunks.values)


_attend = differentiable(forward, backward)
