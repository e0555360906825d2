"""How far a gate of blocks is from what attention reads (SeerAttention, arXiv:2410.13276)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from ar_jax.kernels.selected_attention.xla import in_query_chunks, masked_softmax
from ar_jax.mixers.common.key_line import Reach

LARGEST_TABLE = 1 << 20  # weights of queries at a time, for each example and head


@dataclasses.dataclass(frozen=True)
class Gates:
    """What a gate gives.

    Attributes:
      asked: [B, T, K, gate_dim], the gate's queries.
      share: (asked, first, limit) of some queries to [B, K, T, M], and which blocks these see, [B, T, M] bool.
    """

    asked: Array
    share: Callable[[Array, Array, Array], tuple[Array, Array]]

    def __call__(self, asked: Array, first: Array, limit: Array) -> tuple[Array, Array]:
        """See `share`."""
        return self.share(asked, first, limit)


def gate_divergence(q: Array, k: Array, gates: Gates, begin: Array, reach: Reach, size: int) -> Array:
    """The mean over queries and key heads of KL(target | gate), [] float32; only the gate has a gradient.

    The target of a block is the largest weight that any of its keys has for any query head of the group, of the whole of
    these.
    """
    q, k = jax.lax.stop_gradient((q, k))
    count, length, shared = begin.shape[1], k.shape[1], k.shape[2]
    place = jnp.arange(length, dtype=jnp.int32)[None, None]

    def part(q: Array, asked: Array, first: Array, limit: Array) -> Array:
        grouped = q.reshape(*q.shape[:2], shared, -1, q.shape[-1])
        logits = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        seen = (place >= first[..., None]) & (place < limit[..., None])
        weights, _ = masked_softmax(logits, jnp.broadcast_to(seen[:, None, None], logits.shape))
        weights = jnp.pad(weights, ((0, 0),) * 4 + ((0, count * size - length),))
        target = weights.reshape(*weights.shape[:4], count, size).max(axis=(2, 5))  # [B, K, T, M]
        target = target / jnp.maximum(target.sum(axis=-1, keepdims=True), 1e-9)
        share, _ = gates(asked, first, limit)
        surprise = jnp.log(jnp.maximum(target, 1e-9)) - jnp.log(jnp.maximum(share, 1e-9))
        return (target * surprise).sum(axis=-1).mean(axis=1)  # [B, T]

    arrays = q, gates.asked, reach.first, reach.limit
    return in_query_chunks(part, arrays, LARGEST_TABLE // length).mean()
