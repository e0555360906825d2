"""Routing attention (arXiv:2003.05997): tokens read those that are near the same mean, besides their neighbours."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError
from ar_jax.kernels.cluster_rings import Rings, empty_rings, read_many, read_one
from ar_jax.kernels.dense import Dense
from ar_jax.kernels.routed_attention import balanced_clusters, cluster_sums, unit
from ar_jax.mixers.common.key_line import in_time
from ar_jax.mixers.common.statistics import Statistics
from ar_jax.mixers.positions import rotate
from ar_jax.mixers.protocol import NEVER, Tokens, merge_heads, split_heads
from ar_jax.mixers.softmax import Softmax


class Routing(nn.Module):
    """Queries and keys belong to the nearest of C means of unit length; means follow them, m <- decay m + (1 - decay) mean.

    Causal: a token reads the latest `window` keys of its query's cluster, so that nothing depends on what is to come, and
    the state has C window keys for each head. Both ways: as published, each cluster holds the `window` nearest queries
    and keys of the whole sequence.

    Attributes:
      num_heads: of which `local_heads` read a window of the latest tokens instead (both ways: all tokens).
      local_heads: see `num_heads`.
      num_clusters: C; with C = window = sqrt(T) the cost is T^1.5.
      window: keys that a token reads, or tokens of a cluster.
      local_window: tokens that a local head reads.
      decay: of the means, per step of training.
      shared: keys are the queries at unit length.
      num_memory: learned keys and values that a cluster's queries read, too; both ways only.
      causal: see above.
      rope_base: see Softmax; routes do not depend on places.
    """

    embed_dim: int
    num_heads: int = 4
    local_heads: int = 2
    num_clusters: int = 16
    window: int = 16
    local_window: int = 16
    decay: float = 0.999
    shared: bool = False
    num_memory: int = 0
    causal: bool = True
    rope_base: float = 10000.0
    position_axes: int = 0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @property
    def reads_peers(self) -> bool:
        """The form for both ways reads everything."""
        return not self.causal

    @property
    def dims(self) -> tuple[int, int]:
        """Routed heads and the width of a head."""
        where = "config.model.mixer"
        if not 0 <= self.local_heads < self.num_heads or self.embed_dim % self.num_heads:
            raise UsageError(
                f"{where}: local_heads={self.local_heads} must be fewer than num_heads={self.num_heads}, a divisor of "
                f"embed_dim={self.embed_dim}."
            )
        if min(self.num_clusters, self.window, self.local_window) < 1 or not 0 <= self.decay < 1:
            raise UsageError(
                f"{where}: num_clusters, window and local_window must be at least 1, and decay={self.decay} in [0, 1)."
            )
        if self.causal and self.num_memory:
            raise UsageError(
                f"{where}.num_memory={self.num_memory} belongs to the form for both ways; set causal=False."
            )
        return self.num_heads - self.local_heads, self.embed_dim // self.num_heads

    def setup(self) -> None:
        """Projections, the means [heads, C, H], and attention in windows."""
        heads, head_dim = self.dims
        dense = functools.partial(Dense, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype)
        self.query, self.value = dense(heads * head_dim), dense(heads * head_dim)
        if not self.shared:
            self.key = dense(heads * head_dim)
        self.out = dense(self.embed_dim)
        start = lambda key, shape, dtype: unit(jax.random.normal(key, shape, dtype))  # noqa: E731
        self.statistics = Statistics((heads, self.num_clusters, head_dim), start, "means")
        if self.num_memory:
            shape = (2, heads, self.num_clusters, self.num_memory, head_dim)
            self.memory = self.param("memory", nn.initializers.normal(0.02), shape, self.param_dtype)
        if self.local_heads:
            self.local = self._local()

    def _local(self, **more: Any) -> Softmax:
        names = ("embed_dim", "rope_base", "position_axes", "dtype", "param_dtype")
        fields = {name: getattr(self, name) for name in names} | {"head_dim": self.dims[1]}
        return Softmax(num_heads=self.local_heads, window=self.local_window if self.causal else 0, **fields, **more)

    @nn.nowrap
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> Any:
        """A ring for each cluster, and the local heads' state."""
        if not self.causal:
            return ()
        heads, head_dim = self.dims
        rings = empty_rings(batch_size, heads, self.num_clusters, self.window, head_dim, self.dtype)
        local = self._local(parent=None).init_state(batch_size, max_len, max_step_len) if self.local_heads else ()
        return rings, local

    def __call__(self, x: Array, tokens: Tokens, state: Any = None) -> tuple[Array, Any]:
        """See Mixer. Routed heads read tokens of one step in the order they are fed."""
        q, v = (split_heads(project(x), self.dims[0]) for project in (self.query, self.value))
        k = unit(q).astype(q.dtype) if self.shared else split_heads(self.key(x), self.dims[0])
        means, remembered = self.statistics(), tokens.step < NEVER
        remembered &= jnp.arange(x.shape[1])[None] < tokens.num_remembered
        routes = [unit(jax.lax.stop_gradient(a)) for a in ((q,) if self.shared else (q, k))]
        if self.rope_base:
            q, k = (rotate(a, tokens.position, self.rope_base) for a in (q, k))
        rings, local = state if state and self.causal else (None, None)
        if self.causal:
            out, rings = self._latest(q, k, v, routes, means, tokens, rings)
        else:
            out = self._balanced(q, k, v, tokens, means)
        mixed = self.out(merge_heads(out))
        if self.local_heads:
            near, local = self.local(x, tokens, local)
            mixed = mixed + near
        mixed = self.statistics.moves(self._change(routes, means, remembered), mixed)
        return mixed, (rings, local) if state and self.causal else state

    def _change(self, routes: list[Array], means: Array, remembered: Array) -> Array:
        """By how much the means move: towards the mean of their tokens, on the sphere; those without any stay."""
        present = jnp.broadcast_to(remembered, routes[0].shape[:2])
        sums = [cluster_sums(x, means, present) for x in routes]
        total, count = (sum(a[1:], a[0]) for a in zip(*sums, strict=True))
        moved = unit(self.decay * means + (1 - self.decay) * unit(total))
        return jnp.where((count > 0)[..., None], moved - means, 0)

    def _latest(
        self, q: Array, k: Array, v: Array, routes: list[Array], means: Array, tokens: Tokens, rings: Rings | None
    ) -> tuple[Array, Rings | None]:
        asking, cluster = (jnp.argmax(jnp.einsum("btnh,nch->btnc", a, means), axis=-1) for a in (routes[0], routes[-1]))
        (q, k, v, asking, cluster), writes, starts, back = in_time((q, k, v, asking, cluster), tokens)
        if writes is not None:
            cluster = jnp.where(writes[..., None], cluster, -1)
        if rings is not None and q.shape[1] == 1:
            out, rings = read_one(rings, *(a[:, 0] for a in (q, k, v, asking, cluster)))
            return back(out[:, None]), rings
        sizes = {"clusters": self.num_clusters, "window": self.window}
        out, rings = read_many(rings, q, k, v, asking, cluster, starts, **sizes)
        return back(out), rings

    def _balanced(self, q: Array, k: Array, v: Array, tokens: Tokens, means: Array) -> Array:
        return balanced_clusters(
            q,
            k,
            v,
            means,
            tokens.step < NEVER if tokens.padded else None,
            tokens.segment,
            window=self.window,
            shared=self.shared,
            memory=(self.memory[0], self.memory[1]) if self.num_memory else None,
        )
