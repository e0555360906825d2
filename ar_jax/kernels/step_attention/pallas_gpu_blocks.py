"""Which blocks the GPU kernels visit and in what order, and what a block of logits is: shared by forward and backward."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ar_jax.kernels import triton
from ar_jax.kernels.step_attention.visibility import EMPTY, FULL, MIXED, UNBOUNDED, Visibility

LOG2_E = 1.4426950408889634  # the hardware's exponential has base two, and so have logits within the kernels
LARGEST_BLOCK = 128  # of queries, and of keys; tests make it smaller


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a kernel is cut.

    Attributes:
      queries: of a block.
      keys: of a block.
      warps: of 32 threads, that work on a block together.
      stages: how many blocks of the loop are under way: while one is computed the next are fetched.
    """

    queries: int
    keys: int
    warps: int
    stages: int

    def within(self, num_queries: int, num_keys: int) -> Blocks:
        """No larger than the arrays."""
        queries = triton.padded(num_queries, min(self.queries, LARGEST_BLOCK))
        return dataclasses.replace(self, queries=queries, keys=triton.padded(num_keys, min(self.keys, LARGEST_BLOCK)))

    def compiler_params(self) -> plgpu.CompilerParams:
        """For `pallas_call`."""
        return plgpu.CompilerParams(num_warps=self.warps, num_stages=self.stages)


def kinds(visible: Visibility, blocks: Blocks) -> Array:
    """As `Visibility.blocks`; a block of keys that reaches past their end is never FULL."""

    def pad(a: Array, size: int) -> Array:
        return jnp.pad(a, ((0, 0), (0, 0), (0, -a.shape[2] % size)), mode="edge")

    padded = Visibility(
        pad(visible.lower, blocks.queries),
        pad(visible.upper, blocks.queries),
        pad(visible.key, blocks.keys),
        visible.has_lower,
    )
    found = padded.blocks(blocks.queries, blocks.keys)
    whole = jnp.arange(found.shape[2]) < visible.key.shape[2] // blocks.keys
    return jnp.where(whole[None, None], found, jnp.minimum(found, MIXED))


def visits(kinds: Array) -> tuple[Array, Array]:
    """For each row of blocks the columns in the order of visits, and how many are FULL and how many not EMPTY.

    FULL blocks come first, then MIXED ones, which thus are two loops without a branch; EMPTY ones come last.

    Returns:
      [B, rows, columns] and [B, rows, 2] int32.
    """
    order = jnp.argsort(-kinds, axis=-1, stable=True).astype(jnp.int32)
    full, some = (kinds == FULL).sum(axis=-1, dtype=jnp.int32), (kinds != EMPTY).sum(axis=-1, dtype=jnp.int32)
    return order, jnp.stack([full, some], axis=-1)


@dataclasses.dataclass(frozen=True)
class Logits:
    """What a block of logits is.

    Attributes:
      scale: of products.
      soft_cap: see `step_attention`.
      has_lower: see `Visibility`.
      num_queries: T.
      num_keys: S.
      head_dim: H.
    """

    scale: float
    soft_cap: float | None
    has_lower: tuple[bool, ...]
    num_queries: int
    num_keys: int
    head_dim: int

    def queries(self, ref: Any, start: Any, size: int) -> Array:
        """Rows of an array [T, H]."""
        return triton.load(ref, (pl.ds(start, size), slice(None)), (self.num_queries, self.head_dim))

    def keys(self, ref: Any, start: Any, size: int) -> Array:
        """Rows of an array [S, H]."""
        return triton.load(ref, (pl.ds(start, size), slice(None)), (self.num_keys, self.head_dim))

    def bias(self, ref: Any, query: Any, key: Any, blocks: Blocks) -> Array | None:
        """A block of an array [T, S], or None if there is none."""
        if ref is None:
            return None
        at = (pl.ds(query, blocks.queries), pl.ds(key, blocks.keys))
        return triton.load(ref, at, (self.num_queries, self.num_keys))

    def of(self, products: Array, bias: Array | None) -> tuple[Array, Array | None]:
        """Logits in base two, and the slope of the soft cap."""
        slope = None
        if self.soft_cap is None:
            logits = products * (self.scale * LOG2_E)
        else:
            bent = jnp.tanh(products * (self.scale / self.soft_cap))
            logits, slope = bent * (self.soft_cap * LOG2_E), 1.0 - bent * bent
        return logits if bias is None else logits + bias.astype(jnp.float32) * LOG2_E, slope

    def bounds(self, lower: Any, upper: Any, start: Any, size: int) -> list[tuple[Array, Array]]:
        """Those of a block of queries for each coordinate; a query past the end sees nothing."""
        shape = (len(self.has_lower), self.num_queries)
        return [
            (
                triton.load(lower, (f, pl.ds(start, size)), shape, UNBOUNDED.max),
                triton.load(upper, (f, pl.ds(start, size)), shape, UNBOUNDED.min),
            )
            for f in range(len(self.has_lower))
        ]

    def seen(
        self, bounds: Sequence[tuple[Array, Array]], key: Any, start: Any, size: int, queries_axis: int = 0
    ) -> Array:
        """Which keys of a block are seen by which queries, [queries, keys] bool, or the other way round."""
        of_queries: Callable[[Array], Array] = lambda a: jnp.expand_dims(a, 1 - queries_axis)  # noqa: E731
        of_keys: Callable[[Array], Array] = lambda a: jnp.expand_dims(a, queries_axis)  # noqa: E731
        queries = bounds[0][0].shape[0]
        shape = (queries, size) if queries_axis == 0 else (size, queries)
        inside = jax.lax.broadcasted_iota(jnp.int32, shape, 1 - queries_axis) < self.num_keys - start
        seen = inside if self.num_keys % size else None
        for f, (lower, upper) in enumerate(bounds):
            values = triton.load(key, (f, pl.ds(start, size)), (len(bounds), self.num_keys))
            values = jnp.broadcast_to(of_keys(values), shape)
            within = values <= jnp.broadcast_to(of_queries(upper), shape)
            if self.has_lower[f]:
                within &= values >= jnp.broadcast_to(of_queries(lower), shape)
            seen = within if seen is None else seen & within
        assert seen is not None
        return seen


def specs(
    q: Array, k: Array, visible: Visibility, bias: Array | None, blocks: Blocks, by_key_head: bool = False
) -> dict[str, pl.BlockSpec | None]:
    """What a program of the grid (block, head, example) is given of each array: all of the head's rows.

    Args:
      q: [B, T, N, H].
      k: [B, S, K, H].
      visible: of all.
      bias: [B or 1, N, T, S] or None.
      blocks: to whole numbers of which all are padded.
      by_key_head: a program has all queries of a key head, [T, N / K, H], and not those of one head, [T, H].
    """
    (num_queries, heads, head_dim), (num_keys, shared) = q.shape[1:], k.shape[1:3]
    rows, columns = pl.cdiv(num_queries, blocks.queries), pl.cdiv(num_keys, blocks.keys)
    num_queries, num_keys = rows * blocks.queries, columns * blocks.keys
    width, coordinates = triton.padded(head_dim), len(visible.has_lower)
    group = heads // shared
    of_queries = group if by_key_head else None
    key_head = (lambda n: n) if by_key_head else (lambda n: n // group)
    row = (lambda b: b) if len(visible.key) > 1 else (lambda b: 0)
    shown = (lambda b: b) if bias is not None and len(bias) > 1 else (lambda b: 0)
    lists = (columns, rows) if by_key_head else (rows, columns)
    return {
        "q": pl.BlockSpec((None, num_queries, of_queries, width), lambda _, n, b: (b, 0, n, 0)),
        "k": pl.BlockSpec((None, num_keys, None, width), lambda _, n, b: (b, 0, key_head(n), 0)),
        "statistic": pl.BlockSpec((None, of_queries, num_queries), lambda _, n, b: (b, n, 0)),
        "bound": pl.BlockSpec((None, coordinates, num_queries), lambda _, n, b: (row(b), 0, 0)),
        "key": pl.BlockSpec((None, coordinates, num_keys), lambda _, n, b: (row(b), 0, 0)),
        "order": pl.BlockSpec((None, *lists), lambda _, n, b: (row(b), 0, 0)),
        "counts": pl.BlockSpec((None, lists[0], 2), lambda _, n, b: (row(b), 0, 0)),
        "bias": None
        if bias is None
        else pl.BlockSpec((None, of_queries, num_queries, num_keys), lambda _, n, b: (shown(b), n, 0, 0)),
        "d_bias": pl.BlockSpec((None, of_queries, num_queries, num_keys), lambda _, n, b: (b, n, 0, 0)),
        "head": pl.BlockSpec((None,), lambda _, n, b: (n,)),
    }
