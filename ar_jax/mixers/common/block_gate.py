"""The gates of SeerAttention (arXiv:2410.13276, 2506.08889): which blocks of keys a query will read, from pooled keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError, choose

POOLS: dict[
    str, Callable[[Array, Array], Array]
] = {  # [B, M, size, heads, H] and which of them there are, to [B, M, heads, H]
    "max": lambda a, there: jnp.where(there, a, -jnp.inf).max(axis=2),
    "min": lambda a, there: jnp.where(there, a, jnp.inf).min(axis=2),
    "avg": lambda a, there: jnp.where(there, a, 0).sum(axis=2) / jnp.maximum(there.sum(axis=2), 1),
}
GROUPS = ("project", "average_project", "average", "each")  # what becomes of the queries that share a key head


class BlockGate(nn.Module):
    """g_tb = softmax_b(W_q q_t . W_k pool(k of block b) / sqrt(hidden)), each turned by its place; blocks are read by g.

    Attributes:
      num_heads: query heads.
      num_kv_heads: key heads.
      head_dim: the width of queries and keys.
      hidden: the width of what is compared.
      key_pools: keys of POOLS, side by side.
      query_pools: blocks of queries are pooled as well, and each query head has its gate (SeerAttention); () for gates of
        single queries, one for all that share a key head (SeerAttention-R).
      groups: one of GROUPS, without query_pools: how the queries that share a key head become one.
      project_queries: with query_pools: queries are projected; otherwise keys are, by each query head's own matrix.
      qk_norm: what is compared is RMS-normalised.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden: int
    key_pools: tuple[str, ...] = ("max", "min", "avg")
    query_pools: tuple[str, ...] = ()
    groups: str = "project"
    project_queries: bool = True
    qk_norm: bool = False
    param_dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """A matrix for each head."""
        for pool in (*self.key_pools, *self.query_pools):
            choose(POOLS, pool, "model.mixer.key_pools")
        choose(dict.fromkeys(GROUPS), self.groups, "model.mixer.groups")
        shape = self._query_shape()
        if shape is None and self.hidden != self.head_dim:
            raise UsageError(
                f"config.model.mixer.gate_dim={self.hidden} must be head_dim={self.head_dim} without a projection."
            )
        start = nn.initializers.xavier_uniform(batch_axis=(0,))
        key_heads = self.num_heads if self.query_pools and not self.project_queries else self.num_kv_heads
        width = len(self.key_pools) * self.head_dim
        self.key_weight = self.param("key_weight", start, (key_heads, width, self.hidden), self.param_dtype)
        self.query_weight: Any = None if shape is None else self.param("query_weight", start, shape, self.param_dtype)
        if self.qk_norm:
            self.query_norm, self.key_norm = (nn.RMSNorm(epsilon=1e-6, param_dtype=self.param_dtype) for _ in range(2))

    def _query_shape(self) -> tuple[int, ...] | None:
        heads, shared = self.num_heads, self.num_kv_heads
        if self.query_pools:
            return (heads, len(self.query_pools) * self.head_dim, self.hidden) if self.project_queries else None
        shapes = {
            "project": (shared, heads // shared, self.head_dim, self.hidden),
            "average_project": (shared, self.head_dim, self.hidden),
        }
        return shapes.get(self.groups)

    def keys(self, k: Array, there: Array) -> Array:
        """Blocks of keys [B, M, size, K, H], those that are there [B or 1, M, size], to [B, M, heads, hidden]."""
        return self.pooled_keys(pooled(k, there, self.key_pools))

    def pooled_keys(self, k: Array) -> Array:
        """Keys [B, M, K, pools H], pooled, to [B, M, heads, hidden]."""
        k = jnp.repeat(k, self.key_weight.shape[0] // k.shape[2], axis=2)
        k = jnp.einsum("bmki,kio->bmko", k, self.key_weight.astype(k.dtype))
        return self.key_norm(k) if self.qk_norm else k

    def queries(self, q: Array) -> Array:
        """Queries [B, T, N, H] to [B, T, K, hidden], or, where each counts, [B, T, N, hidden]."""
        grouped = q.reshape(*q.shape[:2], self.num_kv_heads, -1, q.shape[-1])
        if self.groups == "project":
            q = jnp.einsum("btkgi,kgio->btko", grouped, self.query_weight.astype(q.dtype))
        elif self.groups != "each":
            q = grouped.mean(axis=3)
        if self.groups == "average_project":
            q = jnp.einsum("btki,kio->btko", q, self.query_weight.astype(q.dtype))
        return self.query_norm(q) if self.qk_norm else q

    def block_queries(self, q: Array, there: Array) -> Array:
        """Blocks of queries [B, M, size, N, H] to [B, M, N, hidden]."""
        q = pooled(q, there, self.query_pools)
        return q if self.query_weight is None else jnp.einsum("bmni,nio->bmno", q, self.query_weight.astype(q.dtype))

    def logits(self, q: Array, k: Array) -> Array:
        """Of queries [B, T, heads, hidden] and blocks [B, M, K, hidden]: [B, heads of one of them, T, M] float32."""
        scale = self.hidden**-0.5
        if self.groups == "each" and not self.query_pools:  # the mean of what all queries of a group would say
            q = q.reshape(*q.shape[:2], self.num_kv_heads, -1, q.shape[-1]).mean(axis=3)
        k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
        return jnp.einsum("btko,bmko->bktm", q, k, preferred_element_type=jnp.float32) * scale


def pooled(a: Array, there: Array, pools: tuple[str, ...]) -> Array:
    """Blocks [B, M, size, heads, H] pooled, the pools side by side: [B, M, heads, pools H]."""
    return jnp.concatenate([POOLS[pool](a, there[..., None, None]) for pool in pools], axis=-1)


def in_blocks(a: Array, size: int) -> tuple[Array, Array]:
    """[B, T, ...] as blocks [B, M, size, ...], the last one filled up, and which of them there are [1, M, size]."""
    length, pad = a.shape[1], -a.shape[1] % size
    blocks = jnp.pad(a, ((0, 0), (0, pad)) + ((0, 0),) * (a.ndim - 2)).reshape(len(a), -1, size, *a.shape[2:])
    return blocks, (jnp.arange(length + pad) < length).reshape(1, -1, size)


def turned_halves(x: Array, cos: Array, sin: Array) -> Array:
    """Rotary embedding of x [B, T, heads, H] whose pairs are channels i and H / 2 + i; cos and sin [B or 1, T, H]."""
    left, right = jnp.split(x, 2, axis=-1)
    return x * cos[:, :, None] + jnp.concatenate([-right, left], axis=-1) * sin[:, :, None]


def angles(position: Array, width: int, base: float) -> tuple[Array, Array]:
    """Cosines and sines for `turned_halves` at positions [B or 1, T], [B or 1, T, width] float32."""
    speed = base ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angle = position[..., None].astype(jnp.float32) * jnp.tile(speed, 2)[None, None]
    return jnp.cos(angle), jnp.sin(angle)
