"""The diagonal-plus-low-rank rule on TPUs: like the delta rule, with a decay of each channel and a second pair of keys."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ar_jax.kernels.delta_attention.pallas_tpu import COMPILER, heads_together, inverse, join, places, specs, split
from ar_jax.kernels.delta_attention.pallas_tpu import dot as product
from ar_jax.kernels.dispatch import interpreted

CHUNK = 64  # two readers and two writers of a chunk fill the 128 x 128 matrix unit


def dplr(
    q: Array,
    k: Array,
    v: Array,
    a: Array,
    b: Array,
    *,
    log_decay: Array,
    initial_state: Array,
    chunk_size: int | None = None,
) -> tuple[Array, Array]:
    """See `dplr_attention`."""
    batch, length, heads, _ = q.shape
    chunk = chunk_size or min(CHUNK, max(16, 1 << (length - 1).bit_length()))

    def flat(x: Array, dtype: Any) -> Array:
        """[B, T, N, H] -> [B, T, N H]; padding neither writes nor decays."""
        return jnp.pad(x.reshape(batch, length, -1), [(0, 0), (0, -length % chunk), (0, 0)]).astype(dtype)

    arrays = [flat(x, q.dtype) for x in (q, k, v, a, b)]
    out, state = _dplr(chunk, *arrays, flat(log_decay, jnp.float32), initial_state)
    return out[:, :length].reshape(batch, length, heads, -1).astype(v.dtype), state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dplr(chunk: int, *inputs: Array) -> tuple[Array, Array]:
    """q, k, v, a, b, log_decay [B, T, N H], state [B, N, H, E]."""
    return _forward(chunk, *inputs, keep=False)


def _dplr_forward(chunk: int, *inputs: Array) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    out, final, before = _forward(chunk, *inputs, keep=True)
    return (out, final), (*inputs[:6], before)


def _dplr_backward(chunk: int, residuals: tuple[Array, ...], cotangents: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(_backward(chunk, *residuals, *cotangents))


_dplr.defvjp(_dplr_forward, _dplr_backward)

TOKENS = ("keys", "keys", "values", "keys", "keys", "keys")  # q, k, v, a, b, log_decay


def _forward(chunk: int, *inputs: Array, keep: bool) -> Any:
    batch, heads, dim, width = inputs[6].shape
    q, v = inputs[0], inputs[2]
    chunks = q.shape[1] // chunk
    group = heads_together(heads, q.dtype, dim, width)
    spec = specs(group, chunk, dim, width, lambda t: t)
    shapes = {
        "values": jax.ShapeDtypeStruct(v.shape, v.dtype),
        "memory": jax.ShapeDtypeStruct((batch, heads, dim, width), jnp.float32),
        "memories": jax.ShapeDtypeStruct((batch, heads, chunks, dim, width), q.dtype),
    }
    outs = list(shapes)[: 3 if keep else 2]
    return pl.pallas_call(
        functools.partial(_forward_kernel, dim=dim, width=width),
        grid=(batch, heads // group, chunks),
        in_specs=[spec[kind] for kind in (*TOKENS, "memory")],
        out_specs=[spec[kind] for kind in outs],
        out_shape=[shapes[kind] for kind in outs],
        scratch_shapes=[pltpu.VMEM((group, dim, width), jnp.float32)],
        compiler_params=COMPILER,
        interpret=interpreted(),
        name="dplr_attention_forward",
    )(*inputs)


def _forward_kernel(q, k, v, a, b, log_decay, start, out, final, *rest, dim, width):
    *kept, carried = rest

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        carried[...] = start[0]

    state = carried[...]
    for ref in kept:
        ref[0, :, 0] = state.astype(ref.dtype)
    keys = [split(ref, dim) for ref in (q, k, a, b, log_decay)]
    carried[...], read = _chunk(state, split(v, width), *keys)
    join(out, read)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _() -> None:
        final[0] = carried[...]


def _backward(chunk: int, *inputs: Array) -> Any:
    *tokens, before, dout, dfinal = inputs
    batch, heads, chunks, dim, width = before.shape
    group = heads_together(heads, dout.dtype, dim, width)
    spec = specs(group, chunk, dim, width, lambda t: chunks - 1 - t)
    return pl.pallas_call(
        functools.partial(_backward_kernel, dim=dim, width=width),
        grid=(batch, heads // group, chunks),
        in_specs=[spec[kind] for kind in (*TOKENS, "memories", "values", "memory")],
        out_specs=[spec[kind] for kind in (*TOKENS, "memory")],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*tokens, dfinal)],
        scratch_shapes=[pltpu.VMEM((group, dim, width), jnp.float32)],
        compiler_params=COMPILER,
        interpret=interpreted(),
        name="dplr_attention_backward",
    )(*inputs)


def _backward_kernel(
    q, k, v, a, b, log_decay, before, dout, dfinal, dq, dk, dv, da, db, dlog_decay, dstart, carried, *, dim, width
):
    """The chunks from the last to the first; `carried` is the gradient of the memory after the chunk."""

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        carried[...] = dfinal[0]

    keys = [split(ref, dim) for ref in (q, k, a, b, log_decay)]
    state = before[0, :, 0].astype(jnp.float32)
    pull = jax.vjp(_chunk, state, split(v, width), *keys)[1]
    carried[...], dvalues, *dkeys = pull((carried[...], split(dout, width).astype(jnp.float32)))
    for ref, gradient in zip((dv, dq, dk, da, db, dlog_decay), (dvalues, *dkeys), strict=True):
        join(ref, gradient)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _() -> None:
        dstart[0] = carried[...]


def _chunk(state: Array, v: Array, q: Array, k: Array, a: Array, b: Array, log_decay: Array) -> tuple[Array, Array]:
    """The memory after a chunk, and what its queries read; all [G, C, ...]. Differentiated as it stands by backward.

    Readers: a before the token's own decay, q after it. Writers: b writes U = (I - M_ab)^-1 (A S + M_ak V), and k writes V.
    """
    dtype, size = q.dtype, q.shape[1]
    f32 = [x.astype(jnp.float32) for x in (q, k, a, b)]
    own = [(f32[0] * writer).sum(2, keepdims=True) for writer in (f32[3], f32[1])]
    readers = jnp.concatenate([f32[2], f32[0] * jnp.exp(log_decay)], axis=1)
    writers = jnp.concatenate([f32[3], f32[1]], axis=1)
    pairs, before, after, total = _decayed_products(readers, writers, log_decay, dtype)

    twice = lambda x: jnp.concatenate([x, x], axis=1)  # noqa: E731
    read = dot(readers * twice(jnp.exp(before)), state, dtype, (2, 1))
    moved = read[:, :size] + dot(pairs[:, :size, size:], v, dtype, (2, 1))
    moved = dot(solve(-pairs[:, :size, :size], dtype), moved, dtype, (2, 1))
    written = jnp.concatenate([moved, v.astype(jnp.float32)], axis=1)
    out = read[:, size:] + dot(pairs[:, size:], written, dtype, (2, 1)) + own[0] * moved + own[1] * written[:, size:]
    added = dot(writers * twice(jnp.exp(after)), written, dtype, (1, 1))
    return jnp.exp(jnp.swapaxes(total[:, :1], 1, 2)) * state + added, out


def _decayed_products(readers: Array, writers: Array, log_decay: Array, dtype: Any) -> tuple[Array, ...]:
    """Products of 2C readers and 2C writers, [G, 2C, 2C], where the reader comes after the writer, with their decay.

    Blocks of 1, 2, 4, ... tokens are joined in pairs: where the later block reads the earlier one, the decay is split at
    the border of the two, so that both factors are at most one.

    Returns:
      The products; the sums of log decays from the chunk's start up to before each token, from after each token to the
      chunk's end, and of the whole chunk, [G, C, H] each.
    """
    size = log_decay.shape[1]
    row, col = (place % size for place in places((readers.shape[0], 2 * size, 2 * size)))
    token = jax.lax.broadcasted_iota(jnp.int32, log_decay.shape, 1)
    twice = lambda x: jnp.concatenate([x, x], axis=1)  # noqa: E731
    before = after = jnp.zeros_like(log_decay)  # within the block
    total = log_decay  # of the block
    products = jnp.zeros(row.shape, jnp.float32)
    block = 1
    while block < size:
        across = dot(readers * twice(jnp.exp(before)), writers * twice(jnp.exp(after)), dtype, (2, 2))
        products += jnp.where(((row ^ col) // block == 1) & (row > col), across, 0.0)
        late = token & block != 0
        neighbour = jnp.where(late, jnp.roll(total, block, axis=1), jnp.roll(total, -block, axis=1))
        before += jnp.where(late, neighbour, 0.0)
        after += jnp.where(late, 0.0, neighbour)
        total += neighbour
        block *= 2
    return products, before, after, total


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def dot(x: Array, y: Array, dtype: Any, contract: tuple[int, int]) -> Array:
    """`product` whose gradients are products in the same precision."""
    return product(x, y, dtype, contract)


def _dot_forward(x: Array, y: Array, dtype: Any, contract: tuple[int, int]) -> tuple[Array, tuple[Array, Array]]:
    return product(x, y, dtype, contract), (x, y)


def _dot_backward(
    dtype: Any, contract: tuple[int, int], factors: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    """Of x' y' with x' and y' as they lie or transposed: dx' = g y'^T, dy' = x'^T g."""
    x, y = factors
    (i, j), (free_x, free_y) = contract, (3 - contract[0], 3 - contract[1])
    dx = product(gradient, y, dtype, (2, free_y)) if i == 2 else product(y, gradient, dtype, (free_y, 2))
    dy = product(x, gradient, dtype, (free_x, 1)) if j == 1 else product(gradient, x, dtype, (1, free_x))
    return dx.astype(x.dtype), dy.astype(y.dtype)


dot.defvjp(_dot_forward, _dot_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def solve(lower: Array, dtype: Any) -> Array:
    """`inverse` with the gradient of inverses."""
    return inverse(lower, dtype)


def _solve_forward(lower: Array, dtype: Any) -> tuple[Array, Array]:
    found = inverse(lower, dtype)
    return found, found


def _solve_backward(dtype: Any, found: Array, gradient: Array) -> tuple[Array]:
    row, col = places(found.shape)
    inner = product(found, product(gradient, found, dtype, (2, 2)), dtype, (1, 1))
    return (jnp.where(row > col, -inner, 0.0),)


solve.defvjp(_solve_forward, _solve_backward)
