"""A memory that goes from chunk to chunk and is rewritten by what is read of it, on GPUs.

    M_c = U_c + W_c S_c;   S_{c+1} = diag(fade_c) S_c + X_c^T M_c + G_c

What a chunk does to the memory follows from W, U, X and G, which all chunks know at once: only this is one after the other.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ar_jax.kernels import triton
from ar_jax.kernels.dispatch import interpreted

TILE = 32  # columns of the memory that a program carries; half of it for 32 bits


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def states(
    dtype: Any, w: Array, u: Array, x: Array, fade: Array, added: Array | None, state: Array
) -> tuple[Array, Array, Array]:
    """The memory before each chunk, what each chunk reads and writes, and the memory after the last chunk.

    Args:
      dtype: of the products' factors, and of what is kept for each chunk.
      w: [B, Z, N, C, H] float32, of Z chunks of C tokens.
      u: [B, Z, N, C, E] float32.
      x: [B, Z, N, C, H] float32.
      fade: [B, Z, N, H] float32, at most one.
      added: G, [B, Z, N, H, E] float32, or None.
      state: [B, N, H, E] float32, before the first chunk.

    Returns:
      S [B, Z, N, H, E] and M [B, Z, N, C, E] in that dtype, and [B, N, H, E] float32.
    """
    return _forward(dtype, w, u, x, fade, added, state)[0]


def _specs(w: Array, u: Array) -> tuple[dict[str, pl.BlockSpec], int, tuple[int, ...]]:
    """What a program of the grid (tile, head, example) is given of each array; the tile's columns; the grid."""
    batch, count, heads, size, head_dim = w.shape
    padded_dim, width = triton.padded(head_dim), triton.padded(u.shape[4])
    tile = triton.padded(u.shape[4], TILE * 2 // u.dtype.itemsize)
    whole = lambda *shape: pl.BlockSpec((None, count, None, *shape), lambda _, n, b: (b, 0, n, *[0] * len(shape)))  # noqa: E731
    specs = {
        "keys": whole(size, padded_dim),
        "values": whole(size, width),
        "fade": whole(padded_dim),
        "memories": whole(padded_dim, width),
        "memory": pl.BlockSpec((None, None, padded_dim, width), lambda _, n, b: (b, n, 0, 0)),
    }
    return specs, tile, (width // tile, heads, batch)


def _forward(
    dtype: Any, w: Array, u: Array, x: Array, fade: Array, added: Array | None, state: Array
) -> tuple[tuple[Array, Array, Array], Any]:
    w, u, x = (a.astype(dtype) for a in (w, u, x))
    added = None if added is None else added.astype(dtype)
    specs, tile, grid = _specs(w, u)
    count, heads, head_dim, width = w.shape[1], w.shape[2], w.shape[4], u.shape[4]
    before, moved, final = pl.pallas_call(
        functools.partial(delta_attention_states, tile=tile, head_dim=head_dim, width=width),
        name="delta_attention_states",
        grid=grid,
        in_specs=[
            *[specs[name] for name in ("keys", "values", "keys", "fade")],
            None if added is None else specs["memories"],
            specs["memory"],
        ],
        out_specs=[specs[name] for name in ("memories", "values", "memory")],
        out_shape=[
            jax.ShapeDtypeStruct((len(w), count, heads, head_dim, width), dtype),
            jax.ShapeDtypeStruct(u.shape, dtype),
            jax.ShapeDtypeStruct(state.shape, jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpreted(),
    )(w, u, x, fade, added, state)
    return (before, moved, final), (w, u, x, fade, added, before, moved)


def delta_attention_states(
    w: Any,
    u: Any,
    x: Any,
    fade: Any,
    added: Any,
    state: Any,
    before: Any,
    moved: Any,
    final: Any,
    *,
    tile: int,
    head_dim: int,
    width: int,
) -> None:
    """Some columns of the memory, from the first chunk to the last."""
    columns, every = pl.ds(pl.program_id(0) * tile, tile), slice(None)
    count, size = w.shape[:2]
    keys, values, memories = (count, size, head_dim), (count, size, width), (count, head_dim, width)

    def chunk(index: Any, memory: Array) -> Array:
        triton.store(before, (index, every, columns), memory, memories)
        reading, writing = (triton.load(ref, (index, every, every), keys) for ref in (w, x))
        found = triton.load(u, (index, every, columns), values).astype(jnp.float32)
        found = (found + triton.product(reading, memory.astype(reading.dtype))).astype(u.dtype)
        triton.store(moved, (index, every, columns), found, values)
        memory = triton.load(fade, (index, every), (count, head_dim))[:, None] * memory
        if added is not None:
            memory += triton.load(added, (index, every, columns), memories).astype(jnp.float32)
        return memory + triton.product(writing, found, (0, 0))

    memory = triton.load(state, (every, columns), (head_dim, width))
    memory = jax.lax.fori_loop(0, count, chunk, memory)
    triton.store(final, (every, columns), memory, (head_dim, width))


def _backward(dtype: Any, saved: Any, cotangents: tuple[Array, Array, Array]) -> tuple[Array | None, ...]:
    w, u, x, fade, added, before, moved = saved
    specs, tile, grid = _specs(w, u)
    head_dim, width = w.shape[4], u.shape[4]
    d_after, d_moved, d_state = pl.pallas_call(
        functools.partial(delta_attention_states_gradient, tile=tile, head_dim=head_dim, width=width),
        name="delta_attention_states_gradient",
        grid=grid,
        in_specs=[specs[name] for name in ("keys", "keys", "fade", "memories", "values", "memory")],
        out_specs=[specs[name] for name in ("memories", "values", "memory")],
        out_shape=[
            jax.ShapeDtypeStruct(before.shape, dtype),
            jax.ShapeDtypeStruct(u.shape, dtype),
            jax.ShapeDtypeStruct(cotangents[2].shape, jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpreted(),
    )(w, x, fade, *cotangents)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    dw = product("bznte,bznhe->bznth", d_moved, before)
    dx = product("bznte,bznhe->bznth", moved, d_after)
    d_fade = (before.astype(jnp.float32) * d_after.astype(jnp.float32)).sum(axis=-1)
    d_added = None if added is None else d_after.astype(jnp.float32)
    return dw, d_moved.astype(jnp.float32), dx, d_fade, d_added, d_state


def delta_attention_states_gradient(
    w: Any,
    x: Any,
    fade: Any,
    d_before: Any,
    d_moved: Any,
    d_final: Any,
    d_after: Any,
    d_total: Any,
    d_state: Any,
    *,
    tile: int,
    head_dim: int,
    width: int,
) -> None:
    """Some columns of the memory's gradient, from the last chunk to the first."""
    columns, every = pl.ds(pl.program_id(0) * tile, tile), slice(None)
    count, size = w.shape[:2]
    keys, values, memories = (count, size, head_dim), (count, size, width), (count, head_dim, width)

    def chunk(step: Any, d_memory: Array) -> Array:
        index = count - 1 - step
        triton.store(d_after, (index, every, columns), d_memory, memories)
        reading, writing = (triton.load(ref, (index, every, every), keys) for ref in (w, x))
        found = triton.load(d_moved, (index, every, columns), values).astype(jnp.float32)
        found = (found + triton.product(writing, d_memory.astype(writing.dtype))).astype(d_total.dtype)
        triton.store(d_total, (index, every, columns), found, values)
        d_memory = triton.load(fade, (index, every), (count, head_dim))[:, None] * d_memory
        d_memory += triton.load(d_before, (index, every, columns), memories).astype(jnp.float32)
        return d_memory + triton.product(reading, found, (0, 0))

    d_memory = triton.load(d_final, (every, columns), (head_dim, width))
    d_memory = jax.lax.fori_loop(0, count, chunk, d_memory)
    triton.store(d_state, (every, columns), d_memory, (head_dim, width))


states.defvjp(_forward, _backward)
