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
from jax.experimental.pallas import tpu as pltpu

from ar_jax.kernels.dispatch import interpreted
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
    tokens,
)
from ar_jax.kernels.linear_attention.pallas_tpu_decay import Sizes, cache, decays, sums_of, sums_spec

CHUNK = 128
HEADS = 4  # of 128 channels that a program takes


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
    pad = -length % chunk
    decay = jnp.zeros(heads, jnp.float32) if log_decay is None else log_decay
    group = heads_together(heads, HEADS, dim, padded_width)
    sizes = Sizes(group, chunk, dim, padded_width, strict=bonus is not None, constant=decay.ndim == 1)
    dtype = jnp.result_type(q, k, v)

    def flat(x: Array, size: int, dtype: Any) -> Array:
        x = jnp.pad(x.astype(dtype), [(0, 0), (0, pad), (0, 0), (0, size - x.shape[3])])
        return x.reshape(batch, length + pad, heads * size)

    rows, columns = dim - q.shape[3], padded_width - width
    state = jnp.pad(initial_state, [(0, 0), (0, 0), (0, rows), (0, columns)])
    bonus = None if bonus is None else jnp.pad(bonus, [(0, 0), (0, rows)]).reshape(1, -1)
    inputs = flat(q, dim, dtype), flat(k, dim, dtype), flat(v, padded_width, dtype)
    out, state = _attend(sizes, *inputs, sums_of(decay, sizes, pad), bonus, state)
    out = out.reshape(batch, length + pad, heads, padded_width)[:, :length, :, :width]
    return out.astype(v.dtype), state[:, :, : q.shape[3], :width]


def forward(
    sizes: Sizes, q: Array, k: Array, v: Array, sums: Array, bonus: Array | None, state: Array, *, keep: bool
) -> tuple[Array, Array, Array | None]:
    """See `differentiable`: q, k, v [B, T, N H], sums as `sums_of` says, bonus [1, N H], state [B, N, H, E]."""
    batch, length, _ = q.shape
    group, chunk, dim, width, *_ = sizes
    chunks, heads = length // chunk, state.shape[1]
    same = lambda t: t  # noqa: E731
    keys, values = tokens(chunk, group * dim, same), tokens(chunk, group * width, same)
    states = memory(group, dim, width)
    outs = [
        (values, jax.ShapeDtypeStruct(v.shape, v.dtype)),
        (states, jax.ShapeDtypeStruct(state.shape, jnp.float32)),
        (
            memories(group, dim, width, place=same),
            jax.ShapeDtypeStruct((batch, chunks, heads, dim, width), q.dtype),
        ),
    ][: 3 if keep else 2]
    bonuses = [] if bonus is None else [bonus]
    found = pl.pallas_call(
        functools.partial(_kernel, sizes=sizes, keep=keep),
        grid=(batch, heads // group, chunks),
        in_specs=[keys, keys, values, sums_spec(sums, sizes, chunks, same), states]
        + [pl.BlockSpec((1, group * dim), lambda b, n, t: (0, n)) for _ in bonuses],
        out_specs=[spec for spec, _ in outs],
        out_shape=[shape for _, shape in outs],
        scratch_shapes=[pltpu.VMEM((group, dim, width), jnp.float32), *cache(sizes)],
        compiler_params=COMPILER,
        interpret=interpreted(),
        name="linear_attention_forward",
    )(q, k, v, sums, state, *bonuses)
    return found[0], found[1], found[2] if keep else None


def _kernel(q, k, v, sums, start, *rest, sizes: Sizes, keep: bool):
    """A chunk of a few heads. `rest`: the bonus if there is one, outputs, and scratch."""
    bonus, rest = (rest[0], rest[1:]) if sizes.strict else (None, rest)
    (out, final), before, (carried, *cached) = rest[:2], rest[2] if keep else None, rest[2 + keep :]

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        carried[...] = start[0]

    decay = decays(sums, cached, sizes, pl.num_programs(2) - 1)
    dtype = q.dtype
    for head in range(sizes.group):
        of_key = slice(head * sizes.dim, (head + 1) * sizes.dim)
        of_value = slice(head * sizes.width, (head + 1) * sizes.width)
        query, key, value, state = q[0, :, of_key], k[0, :, of_key], v[0, :, of_value], carried[head]
        between, from_start, to_end, whole = decay(head)
        if keep:
            before[0, 0, head] = state.astype(dtype)
        scores = between * dot(query, key, dtype, (1, 1))
        read = dot(scores, value, dtype) + from_start * dot(query, state, dtype)
        if bonus is not None:
            read += own(query, key, bonus[:, of_key]) * value.astype(jnp.float32)
        out[0, :, of_value] = read.astype(dtype)
        carried[head] = whole * state + dot(to_end * key.astype(jnp.float32), value, dtype, (0, 0))

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _() -> None:
        final[0] = carried[...]


_attend = differentiable(forward, backward)
