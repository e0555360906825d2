"""Products of queries and earlier keys of a chunk under a decay per channel, on GPUs, and their gradient.

    A_tj = sum_h q_th k_jh exp(sum of log decays of channel h from after j to where t reads)

A program has a block of 16 tokens. Where it reads an earlier block the decay is split at the border between them: into
what decays after the writer and what decays before the reader, both at most one, and the rest is a product of matrices.
Inside of the block it is taken pair by pair: sums grow by one token at a time, and no exponent is a difference.
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
from ar_jax.kernels.linear_attention.pallas_gpu_chunks import SUB_BLOCK, Chunks


def channel_scores(chunks: Chunks, q: Array, k: Array, decay: Array) -> Array:
    """[B, N, T, C]: of each query with the keys of its chunk; what comes later is left as it is."""
    spec, tokens = chunks.specs(), chunks.padded[0]
    return pl.pallas_call(
        functools.partial(linear_attention_scores, chunks=chunks),
        name="linear_attention_scores",
        grid=(tokens // SUB_BLOCK, chunks.heads, chunks.batch),
        in_specs=[spec["key"], spec["key"], spec["decay"]],
        out_specs=spec["scores"],
        out_shape=jax.ShapeDtypeStruct((chunks.batch, chunks.heads, tokens, chunks.size), q.dtype),
        compiler_params=chunks.compiler_params(4, 2),
        interpret=interpreted(),
    )(q, k, decay)


def channel_gradients(
    chunks: Chunks, q: Array, k: Array, decay: Array, d_scores: Array, dq: Array, dk: Array, d_total: Array
) -> tuple[Array, Array, Array, Array]:
    """Adds what comes through the scores to dq and dk, [B, T, N, H] float32.

    Returns:
      dq, dk, and the gradients of the sums of log decays at which each token reads and writes, all float32.
    """
    spec = chunks.specs()
    return pl.pallas_call(
        functools.partial(linear_attention_scores_gradient, chunks=chunks),
        name="linear_attention_scores_gradient",
        grid=(chunks.padded[0] // SUB_BLOCK, chunks.heads, chunks.batch),
        in_specs=[*[spec[name] for name in ("key", "key", "decay", "scores", "key", "key", "total")]],
        out_specs=[spec["key"]] * 4,
        out_shape=[jax.ShapeDtypeStruct(q.shape, jnp.float32)] * 4,
        compiler_params=chunks.compiler_params(8, 2),
        interpret=interpreted(),
    )(q, k, decay, d_scores, dq, dk, d_total)


def _block(chunks: Chunks, start: Any, *refs: Any) -> list[Array]:
    """Rows of arrays [T, H], float32."""
    at = (pl.ds(start, SUB_BLOCK), slice(None))
    return [triton.load(ref, at, chunks.keys).astype(jnp.float32) for ref in refs]


def _row(chunks: Chunks, index: Any, *refs: Any) -> list[Array]:
    """A row of arrays [T, H], float32 [1, H]."""
    return [triton.load(ref, (pl.ds(index, 1), slice(None)), chunks.keys).astype(jnp.float32) for ref in refs]


def linear_attention_scores(q: Any, k: Any, decay: Any, scores: Any, *, chunks: Chunks) -> None:
    """The scores of a block of queries."""
    start = pl.program_id(0) * SUB_BLOCK
    first = start // chunks.size * chunks.size
    own, shape = pl.ds(start, SUB_BLOCK), scores.shape
    (queries,) = _block(chunks, start, q)
    readers = (queries * chunks.decay(decay, own).from_start()).astype(q.dtype)

    def earlier(distance: Any, passed: Array) -> Array:
        block = start - (distance + 1) * SUB_BLOCK
        writers, total = _writers(chunks, k, decay, block, passed)
        tile = triton.product(readers, writers.astype(q.dtype), (1, 1))
        triton.store(scores, (own, pl.ds(block - first, SUB_BLOCK)), tile, shape)
        return passed + total

    jax.lax.fori_loop(0, (start - first) // SUB_BLOCK, earlier, jnp.zeros(queries.shape[1]))
    columns = jax.lax.broadcasted_iota(jnp.int32, (SUB_BLOCK, SUB_BLOCK), 1)

    def key(step: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        tile, exponent = carry
        place = SUB_BLOCK - 1 - step
        keys, log_decay = _row(chunks, start + place, k, decay)
        column = (queries * keys * jnp.exp(exponent)).sum(axis=1)[:, None]
        return jnp.where(columns == place, column, tile), _grown(exponent, log_decay, place, chunks.strict)

    begin = jnp.zeros((SUB_BLOCK, SUB_BLOCK), jnp.float32), jnp.zeros(queries.shape, jnp.float32)
    tile, _ = jax.lax.fori_loop(0, SUB_BLOCK, key, begin)
    triton.store(scores, (own, pl.ds(start - first, SUB_BLOCK)), tile, shape)


def _writers(chunks: Chunks, k: Any, decay: Any, block: Any, passed: Array) -> tuple[Array, Array]:
    """Keys of a block as they are at a border that lies `passed` behind its end, and the sum of its log decays."""
    (keys,) = _block(chunks, block, k)
    fade = chunks.decay(decay, pl.ds(block, SUB_BLOCK))
    return keys * fade.to_end() * jnp.exp(passed)[None], fade.total[0] + fade.total[1]


def _grown(exponent: Array, log_decay: Array, place: Any, strict: bool) -> Array:
    """From the sums since after the token at that place, to where each token reads, to those since before it."""
    rows = jax.lax.broadcasted_iota(jnp.int32, exponent.shape, 0)
    added = jnp.broadcast_to(log_decay, exponent.shape)
    return exponent + jnp.where(rows > place if strict else rows >= place, added, 0.0)


def linear_attention_scores_gradient(
    q: Any,
    k: Any,
    decay: Any,
    d_scores: Any,
    dq_carried: Any,
    dk_carried: Any,
    d_total: Any,
    dq: Any,
    dk: Any,
    d_reading: Any,
    d_writing: Any,
    *,
    chunks: Chunks,
) -> None:
    """What a block of tokens gets as readers and as writers."""
    start = pl.program_id(0) * SUB_BLOCK
    first = start // chunks.size * chunks.size
    own, here = pl.ds(start, SUB_BLOCK), start - first
    queries, keys, d_queries, d_keys = _block(chunks, start, q, k, dq_carried, dk_carried)
    fade = chunks.decay(decay, own)
    nothing = jnp.zeros(queries.shape, jnp.float32)

    def earlier(distance: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        sums, passed = carry
        block = start - (distance + 1) * SUB_BLOCK
        writers, total = _writers(chunks, k, decay, block, passed)
        tile = d_scores[own, pl.ds(block - first, SUB_BLOCK)]
        return sums + triton.product(tile, writers.astype(tile.dtype)), passed + total

    def later(distance: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        sums, passed = carry
        block = start + (distance + 1) * SUB_BLOCK
        (readers,) = _block(chunks, block, q)
        other = chunks.decay(decay, pl.ds(block, SUB_BLOCK))
        readers *= other.from_start() * jnp.exp(passed)[None]
        tile = d_scores[pl.ds(block, SUB_BLOCK), pl.ds(here, SUB_BLOCK)]
        added = triton.product(tile, readers.astype(tile.dtype), (0, 0))
        return sums + added, passed + other.total[0] + other.total[1]

    before = here // SUB_BLOCK
    begin = nothing, jnp.zeros(queries.shape[1])
    read, _ = jax.lax.fori_loop(0, before, earlier, begin)
    written, _ = jax.lax.fori_loop(0, chunks.size // SUB_BLOCK - 1 - before, later, begin)
    d_queries += read * fade.from_start() + _diagonal_readers(k, decay, d_scores, start, here, nothing, chunks)
    d_keys += written * fade.to_end() + _diagonal_writers(q, decay, d_scores, start, here, nothing, chunks)

    total = triton.load(d_total, (start // chunks.size, slice(None)), (chunks.count, chunks.head_dim))[None]
    rows = here + jax.lax.broadcasted_iota(jnp.int32, queries.shape, 0)
    at_end = jnp.where(rows == chunks.last(start // chunks.size), jnp.broadcast_to(total, queries.shape), 0.0)
    results = d_queries, d_keys, queries * d_queries, at_end - keys * d_keys
    for ref, result in zip((dq, dk, d_reading, d_writing), results, strict=True):
        triton.store(ref, (own, slice(None)), result, chunks.keys)


def _diagonal_readers(
    k: Any, decay: Any, d_scores: Any, start: Any, here: Any, nothing: Array, chunks: Chunks
) -> Array:
    """The gradient of queries through the scores inside of their block."""
    rows = jax.lax.broadcasted_iota(jnp.int32, (SUB_BLOCK, 1), 0)

    def key(step: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        sums, exponent = carry
        place = SUB_BLOCK - 1 - step
        keys, log_decay = _row(chunks, start + place, k, decay)
        column = d_scores[pl.ds(start, SUB_BLOCK), pl.ds(here + place, 1)].astype(jnp.float32)
        column = jnp.where(rows > place if chunks.strict else rows >= place, column, 0.0)
        return sums + column * (keys * jnp.exp(exponent)), _grown(exponent, log_decay, place, chunks.strict)

    return jax.lax.fori_loop(0, SUB_BLOCK, key, (nothing, nothing))[0]


def _diagonal_writers(
    q: Any, decay: Any, d_scores: Any, start: Any, here: Any, nothing: Array, chunks: Chunks
) -> Array:
    """The gradient of keys through the scores inside of their block."""
    rows = jax.lax.broadcasted_iota(jnp.int32, (SUB_BLOCK, 1), 0)

    def query(place: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        sums, exponent = carry
        queries, log_decay = _row(chunks, start + place, q, decay)
        after = exponent + jnp.where(rows < place, 1.0, 0.0) * log_decay
        column = d_scores[pl.ds(start + place, 1), pl.ds(here, SUB_BLOCK)].astype(jnp.float32).T
        column = jnp.where(rows < place if chunks.strict else rows <= place, column, 0.0)
        return sums + column * (queries * jnp.exp(exponent if chunks.strict else after)), after

    return jax.lax.fori_loop(0, SUB_BLOCK, query, (nothing, nothing))[0]
