"""Full attention from few reads: tokens one by one nearby, and abstractions of all others (Combiner, arXiv:2107.05768)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ar_jax.kernels.selected_attention.xla import in_query_chunks, masked_softmax

LARGEST_GATHER = 1 << 18  # keys and abstractions at a time, for each example and head


@dataclasses.dataclass(frozen=True)
class Group:
    """Abstractions of regions of one shape.

    Attributes:
      tokens: [E, W] the tokens of each region, -1 where it has fewer.
      read: which of them the token of an index n [...] reads, [..., J], -1 for none.
      holds: the regions that the token of an index is part of, of which one changes as it comes.
    """

    tokens: np.ndarray
    read: Callable[[Array], Array]
    holds: Callable[[Array], Array]


@dataclasses.dataclass(frozen=True)
class Factorization:
    """How token n reads tokens 0 ... n: one by one from begin(n) on, `direct` of them at most, and the others by groups."""

    begin: Callable[[Array], Array]
    direct: int
    groups: tuple[Group, ...]


def fixed(length: int, width: int) -> Factorization:
    """Its own block of `width` tokens one by one, and an abstraction of each block before."""
    count = -(-length // width)
    blocks = np.arange(count * width).reshape(count, width)
    number = jnp.arange(count, dtype=jnp.int32)

    def read(n: Array) -> Array:
        every = number.reshape((1,) * n.ndim + (-1,))
        return jnp.where(every < n[..., None] // width, every, -1)

    return Factorization(lambda n: n // width * width, width, (Group(blocks, read, lambda n: n // width),))


def logsparse(length: int, width: int) -> Factorization:
    """Itself, and the past in blocks of powers of two: one for each bit of n. `width` has no meaning."""

    def level(bit: int) -> Group:
        size = 1 << bit
        count = max(length // size, 1)
        return Group(
            np.arange(count * size).reshape(count, size),
            lambda n: jnp.where((n >= 0) & (n >> bit & 1 == 1), n >> bit + 1 << 1, -1)[..., None],
            lambda n: n >> bit,
        )

    levels = max(math.ceil(math.log2(max(length, 2))), 1)
    return Factorization(lambda n: n, 1, tuple(level(bit) for bit in range(levels)))


def axial(length: int, width: int) -> Factorization:
    """Rows of `width` tokens: its own row one by one, and for each column an abstraction of what stands in the rows above."""
    rows = -(-length // width)
    row, column = np.divmod(np.arange(rows * width), width)
    above = np.arange(rows)[None]
    tokens = np.where(above < row[:, None], above * width + column[:, None], -1)
    every = jnp.arange(width, dtype=jnp.int32)

    def read(n: Array) -> Array:
        return jnp.where(
            n[..., None] >= width, n[..., None] // width * width + every.reshape((1,) * n.ndim + (-1,)), -1
        )

    return Factorization(lambda n: n // width * width, width, (Group(tokens, read, lambda n: n + width),))


FACTORIZATIONS = {"fixed": fixed, "logsparse": logsparse, "axial": axial}
Table = tuple[Array, Array]  # keys and values of abstractions, [B, E, N, H]


def abstraction(q: Array, k: Array, v: Array, there: Array) -> Table:
    """What stands for a region: k' = max_j k_j and v' = sum_j softmax_j(q' . k_j / sqrt(H)) v_j with q' = max_j q_j.

    Args:
      q: [..., W, N, H], of the region's tokens.
      k: likewise.
      v: likewise.
      there: [..., W] bool; a region without tokens gets zeros.

    Returns:
      k' and v' [..., N, H].
    """
    seen = there[..., None, None]
    some = there.any(axis=-1)[..., None, None]
    asking, key = (jnp.where(some, jnp.where(seen, a, -jnp.inf).max(axis=-3), 0) for a in (q, k))
    logits = jnp.einsum("...nh,...wnh->...nw", asking, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    weights, _ = masked_softmax(logits, jnp.broadcast_to(there[..., None, :], logits.shape))
    return key, jnp.einsum("...nw,...wnh->...nh", weights.astype(v.dtype), v)


def table_of(q: Array, k: Array, v: Array, group: Group) -> Table:
    """The abstractions of a group, from a line of tokens [B, S, N, H]; what reaches beyond its end is of no use yet."""
    there = jnp.asarray((group.tokens >= 0) & (group.tokens < k.shape[1]))
    index = jnp.asarray(np.clip(group.tokens, 0, k.shape[1] - 1))
    q, k, v = (a[:, index] for a in (q, k, v))
    return abstraction(q, k, v, jnp.broadcast_to(there[None], (len(k), *there.shape)))


def updated(table: Table, q: Array, k: Array, v: Array, group: Group, place: Array) -> Table:
    """The table after the token at `place` [B] has come: one region is made anew. A place behind the line's end changes none."""
    size = k.shape[1]
    entry = jnp.where(place < size, group.holds(place), len(group.tokens))
    tokens = jnp.asarray(group.tokens)[jnp.minimum(entry, len(group.tokens) - 1)]  # [B, W]
    there = (tokens >= 0) & (tokens < size)
    rows = jax.vmap(lambda a, i: a[i])
    q, k, v = (rows(a, jnp.clip(tokens, 0, size - 1)) for a in (q, k, v))
    new = abstraction(q, k, v, there)
    write = jax.vmap(lambda a, i, x: a.at[i].set(x.astype(a.dtype), mode="drop"))
    return write(table[0], entry, new[0]), write(table[1], entry, new[1])


def combined(
    q: Array, k: Array, v: Array, tables: Sequence[Table], how: Factorization, first: Array, limit: Array
) -> Array:
    """One softmax over the tokens that are read one by one and the abstractions of all others.

    Args:
      q: [B, T, N, H].
      k: [B, S, N, H], a line of tokens.
      v: [B, S, N, H].
      tables: of each group of `how`.
      how: which token reads what.
      first: [B, T] int32, where a query's sequence begins in the line.
      limit: [B, T] int32, behind the last token that it may read, from which it reads.

    Returns:
      [B, T, N, H], zeros where a query reads nothing.

    Cost: O(T (direct + abstractions) H) FLOPs for each example and head.
    """
    size = k.shape[1]

    def read(q: Array, first: Array, limit: Array) -> Array:
        n = limit - 1 - first
        index = (first + how.begin(n))[..., None] + jnp.arange(how.direct, dtype=jnp.int32)[None, None]
        seen = [(index < limit[..., None]) & (index >= first[..., None])]
        rows = jax.vmap(lambda a, i: a[i])
        keys, values = [rows(k, jnp.clip(index, 0, size - 1))], [rows(v, jnp.clip(index, 0, size - 1))]
        for table, group in zip(tables, how.groups, strict=True):
            entry = group.read(n)
            seen.append(entry >= 0)
            keys.append(rows(table[0], jnp.maximum(entry, 0)))
            values.append(rows(table[1], jnp.maximum(entry, 0)))
        logits = jnp.einsum("btnh,btjnh->btnj", q, jnp.concatenate(keys, axis=2), preferred_element_type=jnp.float32)
        both = jnp.concatenate(seen, axis=2)[:, :, None]
        weights, _ = masked_softmax(logits * q.shape[-1] ** -0.5, jnp.broadcast_to(both, logits.shape))
        return jnp.einsum("btnj,btjnh->btnh", weights.astype(v.dtype), jnp.concatenate(values, axis=2))

    reads = how.direct + sum(group.read(jnp.zeros((), jnp.int32)).shape[-1] for group in how.groups)
    return in_query_chunks(read, (q, first, limit), LARGEST_GATHER // reads)
