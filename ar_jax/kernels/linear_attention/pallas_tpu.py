"""Linear attention on TPUs: a program keeps the memories of a few heads and walks through their chunks.

The equations are those of xla.py. Heads lie side by side in lanes, so no large array is transposed.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from ar_jax.kernels.dispatch import interpreted
from ar_jax.kernels.linear_attention import pallas_tpu_channel
from ar_jax.kernels.linear_attention.gradient import differentiable
from ar_jax.kernels.linear_attention.pallas_tpu_backward import backward
from ar_jax.kernels.linear_attention.pallas_tpu_blocks import (
    COMPILER,
    dot,
    heads_together,
    lane_size,
    memories,
    memory,
    own,
    slices,
    tokens,
)
from ar_jax.kernels.linear_attention.pallas_tpu_decay import Sizes, decays, specs, sums_and_decays

CHUNK = 128
# Heads of 128 channels in bfloat16 that a program takes: the matrix units wait unless several products are under way.
HEADS, CHANNEL_HEADS = 8, 8


def pallas_tpu(
    q: Array,
    k: Array,
    v: Array,
    *,
    log_decay: Array | None,
    bonus: Array | None,
    initial_state: Array,
    chunk_size: int | None = None,
) -> tuple[Array, Array]:
    """See `linear_attention`. Channels are padded to what lanes are cut by."""
    batch, length, heads, _ = q.shape
    width = v.shape[3]
    dim, padded_width = lane_size(q.shape[3]), lane_size(width)
    chunk = chunk_size or min(CHUNK, max(16, 1 << (length - 1).bit_length()))
    if log_decay is not None and log_decay.ndim == 4:
        chunk = max(chunk, pallas_tpu_channel.SUBLANES)
    pad = -length % chunk
    decay = jnp.zeros(heads, jnp.float32) if log_decay is None else log_decay
    dtype = jnp.result_type(q, k, v)
    most = (CHANNEL_HEADS if decay.ndim == 4 else HEADS) * 2 // dtype.itemsize
    group = heads_together(heads, most, dim, padded_width)
    sizes = Sizes(group, chunk, dim, padded_width, strict=bonus is not None, constant=decay.ndim == 1)

    def flat(x: Array, size: int, dtype: Any = dtype) -> Array:
        x = jnp.pad(x.astype(dtype), [(0, 0), (0, pad), (0, 0), (0, size - x.shape[3])])
        return x.reshape(batch, length + pad, heads * size)

    rows, columns = dim - q.shape[3], padded_width - width
    state = jnp.pad(initial_state, [(0, 0), (0, 0), (0, rows), (0, columns)])
    bonus = None if bonus is None else jnp.pad(bonus, [(0, 0), (0, rows)]).reshape(1, -1)
    inputs = flat(q, dim), flat(k, dim), flat(v, padded_width)
    if decay.ndim == 4:
        turned = jnp.swapaxes(state, 2, 3)
        out, state = _attend_by_channel(sizes, *inputs, flat(decay, dim, jnp.float32), bonus, turned)
        state = jnp.swapaxes(state, 2, 3)
    else:
        out, state = _attend(sizes, *inputs, sums_and_decays(decay, sizes, pad), bonus, state)
    out = out.reshape(batch, length + pad, heads, padded_width)[:, :length, :, :width]
    return out.astype(v.dtype), state[:, :, : q.shape[3], :width]


def forward(
    sizes: Sizes,
    q: Array,
    k: Array,
    v: Array,
    decay: tuple[Array, ...],
    bonus: Array | None,
    state: Array,
    *,
    keep: bool,
) -> tuple[Array, Array, Array | None]:
    """See `differentiable`: q, k, v [B, T, N H], decay as `sums_and_decays` says, bonus [1, N H], state [B, N, H, E]."""
    batch, length, _ = q.shape
    group, chunk, dim, width, *_ = sizes
    chunks, heads = length // chunk, state.shape[1]
    same = lambda t: t  # noqa: E731
    keys, values = tokens(chunk, group * dim, same), tokens(chunk, group * width, same)
    states = memory(group, dim, width)
    kept = memories(group, dim, width, place=same), jax.ShapeDtypeStruct((batch, chunks, heads, dim, width), q.dtype)
    bonuses = [] if bonus is None else [bonus]
    out, final, *before = pl.pallas_call(
        functools.partial(_kernel, sizes=sizes),
        grid=(batch, heads // group, chunks),
        in_specs=[keys, keys, values, states]
        + [pl.BlockSpec((1, group * dim), lambda b, n, t: (0, n)) for _ in bonuses]
        + specs(decay, sizes, chunks, same),
        out_specs=[values, states] + [kept[0]] * keep,
        out_shape=[jax.ShapeDtypeStruct(v.shape, v.dtype), jax.ShapeDtypeStruct(state.shape, jnp.float32)]
        + [kept[1]] * keep,
        compiler_params=COMPILER,
        interpret=interpreted(),
        name="linear_attention_forward",
    )(q, k, v, state, *bonuses, *decay)
    return out, final, before[0] if keep else None


def _kernel(q, k, v, start, *rest, sizes):
    """A chunk of a few heads. `rest`: the bonus if there is one, decays, and outputs; the memory is carried in `after`.

    All heads take each step together. Products over tokens read k as it came in, turned by the matrix unit on its way: what
    was computed would have to be turned first.
    """
    bonus, rest = (rest[0], rest[1:]) if sizes.strict else (None, rest)
    num_decays = 4 if sizes.constant else 1
    decay_blocks, (out, after, *before) = rest[:num_decays], rest[num_decays:]

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        after[...] = start[...]

    f32, dtype, heads = jnp.float32, q.dtype, range(sizes.group)
    of_key, of_value = (slices(sizes.group, size) for size in (sizes.dim, sizes.width))
    query, key, value = ([x[0, :, of] for of in each] for x, each in ((q, of_key), (k, of_key), (v, of_value)))
    state, decay = [after[0, n] for n in heads], decays(decay_blocks, sizes)

    scores = [decay[n].between * dot(query[n], key[n], dtype, (1, 1)) for n in heads]
    kept_values = [decay[n].to_end * value[n].astype(f32) for n in heads]
    added = [dot(key[n], kept_values[n], dtype, (0, 0)) for n in heads]
    from_memory = [decay[n].from_start * dot(query[n], state[n], dtype) for n in heads]
    read = [dot(scores[n], value[n], dtype) + from_memory[n] for n in heads]
    if bonus is not None:
        read = [read[n] + own(query[n], key[n], bonus[:, of_key[n]]) * value[n].astype(f32) for n in heads]
    for n in heads:
        out[0, :, of_value[n]] = read[n].astype(dtype)
        after[0, n] = decay[n].whole * state[n] + added[n]
        for ref in before:
            ref[0, 0, n] = state[n].astype(dtype)


_attend = differentiable(forward, backward)
_attend_by_channel = differentiable(pallas_tpu_channel.forward, pallas_tpu_channel.backward)
