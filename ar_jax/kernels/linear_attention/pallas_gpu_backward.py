"""The gradient of linear attention on GPUs: memories' gradients from the last chunk to the first, then all chunks at once.

With S the memory before a chunk, dS the gradient of the one after it, D and A = D * (q k^T) as in xla.py, and dA = do v^T,

    dq_t = D_t0 S do_t + sum_j D_tj dA_tj k_j;   dk_j = D_Cj dS v_j + sum_t D_tj dA_tj q_t;   dv = A^T do + (D_C k) dS

What a sum of log decays up to a token gets is q_t . dq_t where it reads and -k_j . dk_j where it writes.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from ar_jax.kernels import triton
from ar_jax.kernels.dispatch import interpreted
from ar_jax.kernels.linear_attention.pallas_gpu_channel import channel_gradients
from ar_jax.kernels.linear_attention.pallas_gpu_chunks import Chunks


def backward(
    chunks: Chunks,
    q: Array,
    k: Array,
    v: Array,
    decay: Array,
    bonus: Array | None,
    kept: Any,
    d_out: Array,
    d_final: Array,
    with_decay: bool,
) -> tuple[Any, ...]:
    """See `differentiable`."""
    before, scores = kept
    d_out = d_out.astype(v.dtype)
    d_after, d_state = _memories(chunks, q, decay, d_out, d_final)
    found = _gradients(chunks, q, k, v, decay, bonus, scores, before, d_out, d_after)
    dq, dk, d_own = found["dq"], found["dk"], found.get("d_own")
    if chunks.by_channel:
        dq, dk, *sums = channel_gradients(chunks, q, k, decay, found["d_scores"], dq, dk, found["d_total"])
        time_axis = 1
    else:
        sums, time_axis = [found["d_reading"], found["d_writing"]], 2
    d_bonus = None
    if bonus is not None and d_own is not None:
        own = jnp.swapaxes(d_own, 1, 2)[..., None]
        queries, keys = q.astype(jnp.float32), k.astype(jnp.float32)
        dq, dk = (x + own * bonus[None, None] * y for x, y in ((dq, keys), (dk, queries)))
        d_bonus = (own * queries * keys).sum(axis=(0, 1))
    d_decay = _of_decay(chunks, sums[0], sums[1], time_axis) if with_decay else None
    return dq.astype(q.dtype), dk.astype(k.dtype), found["dv"], d_decay, d_bonus, d_state


def _of_decay(chunks: Chunks, d_reading: Array, d_writing: Array, axis: int) -> Array:
    """From the gradients of sums that start with the chunk to those of their terms."""
    sums = d_reading + d_writing
    sums = jnp.pad(sums, [(0, -sums.shape[i] % chunks.size if i == axis else 0) for i in range(sums.ndim)])
    sums = sums.reshape(*sums.shape[:axis], -1, chunks.size, *sums.shape[axis + 1 :])
    terms = jax.lax.cumsum(sums, axis=axis + 1, reverse=True)
    terms = terms.reshape(*sums.shape[:axis], -1, *sums.shape[axis + 2 :])
    terms = jax.lax.slice_in_dim(terms, 0, chunks.length, axis=axis)
    return terms - d_reading if chunks.strict else terms


def _memories(chunks: Chunks, q: Array, decay: Array, d_out: Array, d_final: Array) -> tuple[Array, Array]:
    """The gradient of the memory after each chunk, [B, T / C, N, H, E], and of that before the first."""
    spec = chunks.specs()
    _, padded_dim, padded_width = chunks.padded
    rows = triton.padded(chunks.head_dim, 64)
    return pl.pallas_call(
        functools.partial(linear_attention_states_gradient, chunks=chunks, rows=rows),
        name="linear_attention_states_gradient",
        grid=(padded_dim // rows * (padded_width // chunks.tile), chunks.heads, chunks.batch),
        in_specs=[spec[name] for name in ("key", "decay", "value", "memory")],
        out_specs=[spec["memories"], spec["memory"]],
        out_shape=[
            jax.ShapeDtypeStruct((chunks.batch, chunks.count, chunks.heads, *chunks.memory), q.dtype),
            jax.ShapeDtypeStruct(d_final.shape, jnp.float32),
        ],
        compiler_params=chunks.compiler_params(8 if chunks.by_channel else 4, 3),
        interpret=interpreted(),
    )(q, decay, d_out, d_final)


def linear_attention_states_gradient(
    q: Any, decay: Any, d_out: Any, d_final: Any, d_after: Any, d_state: Any, *, chunks: Chunks, rows: int
) -> None:
    """A tile of the memory's gradient after each chunk, and before the first one."""
    part, parts = pl.program_id(0), chunks.padded[2] // chunks.tile
    own = pl.ds(part // parts * rows, rows), pl.ds(part % parts * chunks.tile, chunks.tile)

    def chunk(step: Any, d_memory: Array) -> Array:
        index = chunks.count - 1 - step
        triton.store(d_after, (index, *own), d_memory, (chunks.count, *chunks.memory))
        tokens = pl.ds(index * chunks.size, chunks.size)
        queries = triton.load(q, (tokens, own[0]), chunks.keys)
        fade = chunks.decay(decay, tokens, own[0])
        readers = (queries.astype(jnp.float32) * fade.from_start()).astype(queries.dtype)
        d_outs = triton.load(d_out, (tokens, own[1]), chunks.values)
        return fade.whole() * d_memory + triton.product(readers, d_outs, (0, 0))

    d_memory = triton.load(d_final, own, chunks.memory)
    triton.store(d_state, own, jax.lax.fori_loop(0, chunks.count, chunk, d_memory), chunks.memory)


def _gradients(
    chunks: Chunks,
    q: Array,
    k: Array,
    v: Array,
    decay: Array,
    bonus: Array | None,
    scores: Array | None,
    before: Array,
    d_out: Array,
    d_after: Array,
) -> dict[str, Array]:
    """dv, and of the rest what a chunk's program knows: without the scores of a decay per channel."""
    narrow = dataclasses.replace(chunks, tile=max(chunks.tile // 2, triton.SMALLEST))
    spec = chunks.specs()
    tokens = chunks.padded[0]
    numbers = jax.ShapeDtypeStruct((chunks.batch, chunks.heads, chunks.length), jnp.float32)
    exact = jnp.float32 if chunks.by_channel or bonus is not None else q.dtype  # more is added
    outs = {
        "dq": ("key", jax.ShapeDtypeStruct(q.shape, exact)),
        "dk": ("key", jax.ShapeDtypeStruct(k.shape, exact)),
        "dv": ("value", jax.ShapeDtypeStruct(v.shape, v.dtype)),
    }
    if bonus is not None:
        outs["d_own"] = "number", numbers
    if chunks.by_channel:
        scores_shape = (chunks.batch, chunks.heads, tokens, chunks.size)
        outs["d_scores"] = "scores", jax.ShapeDtypeStruct(scores_shape, q.dtype)
        total_shape = (chunks.batch, chunks.count, chunks.heads, chunks.head_dim)
        outs["d_total"] = "total", jax.ShapeDtypeStruct(total_shape, jnp.float32)
    else:
        outs["d_reading"] = outs["d_writing"] = "number", numbers
    results = pl.pallas_call(
        functools.partial(linear_attention_gradients, names=tuple(outs), chunks=narrow),
        name="linear_attention_gradients",
        grid=(chunks.count, chunks.heads, chunks.batch),
        in_specs=[
            *[spec[name] for name in ("key", "key", "value", "decay")],
            None if bonus is None else spec["bonus"],
            None if scores is None else spec["scores"],
            *[spec[name] for name in ("memories", "value", "memories")],
        ],
        out_specs=[spec[name] for name, _ in outs.values()],
        out_shape=[shape for _, shape in outs.values()],
        compiler_params=chunks.compiler_params(8, 1),
        interpret=interpreted(),
    )(q, k, v, decay, bonus, scores, before, d_out, d_after)
    return dict(zip(outs, results, strict=True))


def linear_attention_gradients(
    q: Any,
    k: Any,
    v: Any,
    decay: Any,
    bonus: Any,
    scores: Any,
    before: Any,
    d_out: Any,
    d_after: Any,
    *refs: Any,
    names: tuple[str, ...],
    chunks: Chunks,
) -> None:
    """One chunk; the columns of its memory tile by tile."""
    outs, index = dict(zip(names, refs, strict=True)), pl.program_id(0)
    tokens = pl.ds(index * chunks.size, chunks.size)
    queries, keys = (triton.load(ref, (tokens, slice(None)), chunks.keys) for ref in (q, k))
    fade, causal = chunks.decay(decay, tokens), chunks.causal()
    dtype, f32 = queries.dtype, jnp.float32
    if scores is None:
        between = fade.between(causal)
        weights = (triton.product(queries, keys, (1, 1)) * between).astype(dtype)
    else:
        weights = jnp.where(causal, scores[tokens, :], 0)
    written = (keys.astype(f32) * fade.to_end()).astype(dtype)
    own = None
    if bonus is not None:
        weighted = triton.load(bonus, (slice(None),), (chunks.head_dim,))[None] * queries.astype(f32)
        own = (weighted * keys.astype(f32)).sum(axis=1)[:, None]

    def tile(part: Any, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        d_weights, dq, dk, held, d_own = carry
        columns = pl.ds(part * chunks.tile, chunks.tile)
        values, d_outs = (triton.load(ref, (tokens, columns), chunks.values) for ref in (v, d_out))
        memory, d_memory = (
            triton.load(ref, (index, slice(None), columns), (chunks.count, *chunks.memory)) for ref in (before, d_after)
        )
        dv = triton.product(weights, d_outs, (0, 0)) + triton.product(written, d_memory)
        if own is not None:
            dv += own * d_outs.astype(f32)
            d_own += (values.astype(f32) * d_outs.astype(f32)).sum(axis=1)
        triton.store(outs["dv"], (tokens, columns), dv, chunks.values)
        return (
            d_weights + triton.product(d_outs, values, (1, 1)),
            dq + triton.product(d_outs, memory, (1, 1)),
            dk + triton.product(values, d_memory, (1, 1)),
            held + (memory.astype(f32) * d_memory.astype(f32)).sum(axis=1),
            d_own,
        )

    sizes = (chunks.size,) * 2, queries.shape, queries.shape, queries.shape[1:], queries.shape[:1]
    begin = tuple(jnp.zeros(size, f32) for size in sizes)
    d_weights, dq, dk, held, d_own = jax.lax.fori_loop(0, chunks.padded[2] // chunks.tile, tile, begin)
    fade = chunks.decay(decay, tokens)  # once more: so many numbers are not kept through the loop
    dq, dk = dq * fade.from_start(), dk * fade.to_end()
    whole = fade.whole()
    d_total = held * (whole if whole.ndim == 0 else whole[:, 0]) + (keys.astype(f32) * dk).sum(axis=0)
    if bonus is not None:
        triton.store(outs["d_own"], (tokens,), d_own, (chunks.length,))
    if scores is None:
        d_products = (d_weights * between).astype(dtype)
        dq += triton.product(d_products, keys)
        dk += triton.product(d_products, queries, (0, 0))
        d_reading, d_writing = (queries.astype(f32) * dq).sum(axis=1), -(keys.astype(f32) * dk).sum(axis=1)
        last = jax.lax.broadcasted_iota(jnp.int32, d_writing.shape, 0) == chunks.last(index)
        d_writing += jnp.where(last, d_total.sum(), 0.0)
        triton.store(outs["d_reading"], (tokens,), d_reading, (chunks.length,))
        triton.store(outs["d_writing"], (tokens,), d_writing, (chunks.length,))
    else:
        triton.store(outs["d_scores"], (tokens, slice(None)), d_weights, outs["d_scores"].shape)
        triton.store(outs["d_total"], (index, slice(None)), d_total, (chunks.count, chunks.head_dim))
    triton.store(outs["dq"], (tokens, slice(None)), dq, chunks.keys)
    triton.store(outs["dk"], (tokens, slice(None)), dk, chunks.keys)
