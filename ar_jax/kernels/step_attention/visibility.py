"""Who reads whom, as data: a key is visible where each of its coordinates lies within the query's bounds."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from flax import struct
from jax import Array

UNSEEN = -1e30  # the logit of a key that is not visible, and the log-sum-exp of a query that reads nothing: finite
UNBOUNDED = jnp.iinfo(jnp.int32)
EMPTY, MIXED, FULL = 0, 1, 2


@struct.dataclass
class Visibility:
    """Key j is visible to query i iff lower[f, i] <= key[f, j] <= upper[f, i] for each coordinate f.

    Steps, windows, segments and neighbourhoods are all of this kind, so no form of the operation knows any of them.

    Attributes:
      lower: [B or 1, F, T] int32.
      upper: [B or 1, F, T] int32.
      key: [B or 1, F, S] int32.
      has_lower: for each coordinate, whether any query has a lower bound.
    """

    lower: Array
    upper: Array
    key: Array
    has_lower: tuple[bool, ...] = struct.field(pytree_node=False)

    def dense(self) -> Array:
        """The mask, [B or 1, T, S] bool."""
        seen = jnp.ones((), bool)[None, None, None]
        for f, has_lower in enumerate(self.has_lower):
            key = self.key[:, f, None, :]
            seen &= key <= self.upper[:, f, :, None]
            if has_lower:
                seen &= key >= self.lower[:, f, :, None]
        return seen

    def padded(self, num_queries: int, num_keys: int) -> Visibility:
        """With so many queries and keys; those that are added see nothing and are not seen."""
        (more_queries, more_keys) = (num_queries - self.upper.shape[2], num_keys - self.key.shape[2])
        if not more_queries and not more_keys:
            return self

        def pad(a: Array, count: int, value: int) -> Array:
            # Not by the padding's own value: where the array is cut over devices, XLA's partitioner (jaxlib 0.10.2) takes
            # two paddings of one array, which the bounds of a query often are, for the same.
            full = jnp.pad(a, ((0, 0), (0, 0), (0, count)))
            return jnp.where((jnp.arange(full.shape[2]) < a.shape[2])[None, None], full, value)

        lower, upper = pad(self.lower, more_queries, UNBOUNDED.max), pad(self.upper, more_queries, UNBOUNDED.min)
        return Visibility(lower, upper, pad(self.key, more_keys, UNBOUNDED.max), self.has_lower)

    def blocks(self, query_block: int, key_block: int) -> Array:
        """What is seen of each block of keys by each block of queries: EMPTY, MIXED or FULL, [B or 1, T / bq, S / bk] int32.

        From the extremes of each block only: with one coordinate without lower bounds, as steps are, EMPTY and FULL are
        exact; else a block may be called MIXED without need, never the other way round.
        """

        def split(a: Array, size: int) -> Array:
            return a.reshape(*a.shape[:2], -1, size)

        upper, lower, key = split(self.upper, query_block), split(self.lower, query_block), split(self.key, key_block)
        first, last = key.min(axis=-1)[:, :, None, :], key.max(axis=-1)[:, :, None, :]
        some = first <= upper.max(axis=-1)[..., None]
        every = last <= upper.min(axis=-1)[..., None]
        bounded = jnp.asarray(self.has_lower)[None, :, None, None]
        some &= ~bounded | (last >= lower.min(axis=-1)[..., None])
        every &= ~bounded | (first >= lower.max(axis=-1)[..., None])
        return jnp.where(every.all(axis=1), FULL, jnp.where(some.all(axis=1), MIXED, EMPTY)).astype(jnp.int32)


def visibility(
    query_step: Array,
    key_step: Array,
    *,
    strict: bool = False,
    window: int | None = None,
    query_segment: Array | None = None,
    key_segment: Array | None = None,
    query_position: Array | None = None,
    key_position: Array | None = None,
    reach: Sequence[tuple[int, int]] | None = None,
) -> Visibility:
    """The bounds that `step_attention`'s arguments mean; shapes as there, with a leading axis of B or 1."""
    latest = _plus(query_step, -1) if strict else query_step
    lower, upper, key, has_lower = (
        [latest if window is None else _plus(query_step, 1 - window)],
        [latest],
        [key_step],
        [window is not None],
    )
    if query_segment is not None and key_segment is not None:
        lower, upper, key, has_lower = (
            lower + [query_segment],
            upper + [query_segment],
            key + [key_segment],
            has_lower + [True],
        )
    if query_position is not None and key_position is not None and reach is not None:
        for axis, (before, after) in enumerate(reach):
            lower.append(_plus(query_position[..., axis], -before))
            upper.append(_plus(query_position[..., axis], after))
            key.append(key_position[..., axis])
            has_lower.append(True)
    return Visibility(_stack(lower), _stack(upper), _stack(key), tuple(has_lower))


def _plus(a: Array, amount: int) -> Array:
    """a + amount, at most and at least what an int32 can be."""
    if amount < 0:
        return jnp.maximum(a, UNBOUNDED.min - amount) + amount
    return jnp.minimum(a, UNBOUNDED.max - amount) + amount


def _stack(rows: list[Array]) -> Array:
    """[B or 1, F, T], the batch being 1 where all have 1."""
    batch = max(len(row) for row in rows)
    return jnp.stack([jnp.broadcast_to(row, (batch, row.shape[1])) for row in rows], axis=1).astype(jnp.int32)
