"""What the TPU kernels of linear attention have in common: heads side by side in lanes, and products of matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
COMPILER = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=64 * 2**20)


def lane_size(size: int) -> int:
    """The next size that divides the lanes, or is a multiple of them."""
    return 1 << (size - 1).bit_length() if size < LANES else size + -size % LANES


def heads_together(heads: int, most: int, *sizes: int) -> int:
    """How many heads a program takes, at most so many of 128 channels. Lanes are cut in multiples of 128, or not at all."""
    most = max(1, most * LANES // max(LANES, *sizes))
    able = [n for n in range(1, heads + 1) if heads % n == 0 and all(n * size % LANES == 0 for size in sizes)]
    return max([n for n in able if n <= most], default=min(able, default=heads))


def tokens(chunk: int, lanes: int, place: Callable[[Any], Any]) -> pl.BlockSpec:
    """A chunk of an array [B, T, N H]; `place` says which is the t-th."""
    return pl.BlockSpec((1, chunk, lanes), lambda b, n, t: (b, place(t), n))


def memory(*shape: int) -> pl.BlockSpec:
    """The memories of a program's heads, of an array [B, N, H, E]."""
    return pl.BlockSpec((1, *shape), lambda b, n, t: (b, n, 0, 0))


def memories(*shape: int, place: Callable[[Any], Any]) -> pl.BlockSpec:
    """The memories before a chunk, of an array [B, T / C, N, H, E]."""
    return pl.BlockSpec((1, 1, *shape), lambda b, n, t: (b, place(t), n, 0, 0))


def slices(count: int, size: int) -> list[slice]:
    """The lanes of each head."""
    return [slice(n * size, (n + 1) * size) for n in range(count)]


def dot(x: Array, y: Array, dtype: Any, contract: tuple[int, int] = (1, 0)) -> Array:
    """A product of matrices in that precision, summed in float32."""
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(
        x.astype(dtype), y.astype(dtype), dims, precision=precision, preferred_element_type=jnp.float32
    )


def places(shape: tuple[int, int]) -> tuple[Array, Array]:
    """The row and the column of each element of a matrix."""
    row, column = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    return row, column


def own(query: Array, key: Array, bonus: Array | None) -> Array:
    """What each query reads of its own token's key, [C, 1]; bonus is [1, H]."""
    weighted = query.astype(jnp.float32) * key.astype(jnp.float32)
    return (weighted if bonus is None else weighted * bonus).sum(axis=1, keepdims=True)


def row_sums(x: Array, dtype: Any) -> Array:
    """[C, H] -> [1, C], by the matrix unit, which leaves the sums in a row."""
    return dot(jnp.ones((8, x.shape[1]), dtype), x, dtype, (1, 1))[:1]
