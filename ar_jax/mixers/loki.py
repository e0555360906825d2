"""Loki (arXiv:2406.02542): keys turned into their principal components, the first of which tell what is worth reading."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError
from ar_jax.kernels.ranked_attention import ranked_attention
from ar_jax.kernels.step_attention import visibility
from ar_jax.mixers.common.statistics import Statistics
from ar_jax.mixers.protocol import Tokens, merge_heads
from ar_jax.mixers.softmax import Cache, Softmax


class Loki(nn.Module):
    """Softmax attention to the num_keys keys with the largest (P q)_{1..rank} . (P k)_{1..rank}; their logits are exact.

    P [H, H] are the principal components of a head's keys, orthonormal rows, the largest first. They are measured
    (`ar_jax.analysis.key_components`), not trained, and start as the identity. The state holds P k: of keys that are not
    read, decoding touches `rank` of H numbers. The other parameters are those of `Softmax`, so that a trained model becomes
    this one.

    Attributes:
      num_keys: keys that each query head reads.
      rank: the components that scores are made of; None takes a quarter of the head's width.
      num_heads: this and what follows: see Softmax.
    """

    embed_dim: int
    num_keys: int = 64
    rank: int | None = None
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    rope_base: float = 10000.0
    qk_norm: str = "none"
    qkv_bias: bool = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    reads_peers: ClassVar[bool] = True
    causal: ClassVar[bool] = True

    def _softmax(self, **more: Any) -> Softmax:
        names = ("embed_dim", "num_heads", "num_kv_heads", "head_dim", "rope_base", "qk_norm", "qkv_bias")
        fields = {name: getattr(self, name) for name in (*names, "dtype", "param_dtype")}
        return Softmax(**fields, **more)

    def setup(self) -> None:
        """Softmax attention's projections, and the components [K, H, H]."""
        self.softmax = self._softmax()
        _, shared, head_dim = self.softmax.dims
        if self.num_keys < 1 or not 1 <= self._rank(head_dim) <= head_dim:
            raise UsageError(
                f"config.model.mixer: num_keys={self.num_keys} must be at least 1, and rank={self.rank} in 1 ... "
                f"{head_dim}, the width of a head."
            )
        identity = lambda key, shape, dtype: jnp.broadcast_to(jnp.eye(head_dim, dtype=dtype), shape)  # noqa: E731
        self.statistics = Statistics((shared, head_dim, head_dim), identity, "components")

    def _rank(self, head_dim: int) -> int:
        return max(head_dim // 4, 1) if self.rank is None else self.rank

    @nn.nowrap
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> Cache:
        """See Softmax; keys are those turned."""
        return self._softmax(parent=None).init_state(batch_size, max_len, max_step_len)

    def __call__(self, x: Array, tokens: Tokens, state: Cache | None = None) -> tuple[Array, Cache | None]:
        """See Mixer."""
        components = self.statistics().astype(self.dtype)
        new = self.softmax.entries(x, tokens)
        new = dataclasses.replace(new, k=jnp.einsum("bksh,krh->bksr", new.k, components))
        if state is not None:
            state = state.append(new)
        readable = new if state is None else state
        if tokens.num_readable is not None:
            readable = readable.first(tokens.num_readable)
        q = self.softmax.queries(x, tokens)
        grouped = q.reshape(*q.shape[:2], components.shape[0], -1, q.shape[-1])
        q = jnp.einsum("btkgh,krh->btkgr", grouped, components).reshape(q.shape)
        remembered = None if tokens.segment is None else tokens.segment[:, : tokens.num_remembered]
        visible = visibility(tokens.step, readable.step, query_segment=tokens.segment, key_segment=remembered)
        k, v = (jnp.swapaxes(a, 1, 2) for a in (readable.k, readable.v))
        out = ranked_attention(q, k, v, visible, rank=self._rank(q.shape[-1]), num_keys=self.num_keys)
        return self.softmax.out(merge_heads(out)), state
