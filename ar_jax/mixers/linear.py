"""Causal linear attention with a feature map and a decay: its state has a constant size."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError, choose
from ar_jax.kernels.dense import Dense
from ar_jax.kernels.linear_attention import linear_attention
from ar_jax.mixers.protocol import Tokens, in_time_order, merge_heads, split_heads

FEATURE_MAPS: dict[str, Callable[[Array], Array]] = {
    "elu": lambda x: nn.elu(x) + 1,  # arXiv:2006.16236
    "relu": nn.relu,
    "identity": lambda x: x,  # retention, arXiv:2307.08621
}
DECAYS = ("none", "fixed", "learned")
FORGOTTEN = -100.0  # nats: nothing is left of what decays by so much; more would cost the sums their last digits


class Linear(nn.Module):
    """Linear attention (arXiv:2006.16236): S_t = a_t S_{t-1} + phi(k_t) v_t^T, o_t = S_t^T phi(q_t), normalised or not.

    Attributes:
      feature_map: phi, one of FEATURE_MAPS.
      decay: "none" (a = 1), "fixed" (a = 1 - 2^(-5 - head), retention), or "learned" (a = sigmoid(w x_t) per head, as
        a power 1/16: arXiv:2312.06635).
      normalize: divide by phi(q_t) . sum_j phi(k_j); otherwise the heads are RMS-normalised.
    """

    embed_dim: int
    num_heads: int = 4
    head_dim: int | None = None
    feature_map: str = "elu"
    decay: str = "none"
    normalize: bool = True
    chunk_size: int | None = None
    implementation: str | None = None
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    reads_peers: ClassVar[bool] = False
    causal: ClassVar[bool] = True

    @property
    def dims(self) -> tuple[int, int]:
        """Heads and the width of a head."""
        if self.num_heads < 1 or (self.head_dim is None and self.embed_dim % self.num_heads):
            raise UsageError(
                f"num_heads={self.num_heads} does not divide embed_dim={self.embed_dim}; set head_dim or another num_heads."
            )
        return self.num_heads, self.head_dim or self.embed_dim // self.num_heads

    def setup(self) -> None:
        """Projections as matrices: [D, heads H] and back."""
        choose(FEATURE_MAPS, self.feature_map, "model.mixer.feature_map")
        if self.decay not in DECAYS:
            raise UsageError(f"config.model.mixer.decay={self.decay!r} is unknown; use one of {', '.join(DECAYS)}.")
        heads, head_dim = self.dims
        dense = functools.partial(Dense, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype)
        self.query, self.key, self.value = (dense(heads * head_dim) for _ in range(3))
        self.out = dense(self.embed_dim)
        if self.decay == "learned":
            self.gate = nn.Dense(heads, dtype=jnp.float32, param_dtype=self.param_dtype)
        if not self.normalize:
            self.norm = nn.RMSNorm(dtype=self.dtype, param_dtype=self.param_dtype)

    @nn.nowrap
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> Array:
        """[B, N, H, H] float32, one column more with normalize: the sum of the keys."""
        heads, head_dim = self.dims
        return jnp.zeros((batch_size, heads, head_dim, head_dim + self.normalize), jnp.float32)

    def __call__(self, x: Array, tokens: Tokens, state: Array | None = None) -> tuple[Array, Array | None]:
        """See Mixer. Tokens of one step read each other in the order they are fed."""
        out, after = in_time_order(self._mix, x, tokens, state)
        return out, (None if state is None else after)

    def _mix(self, x: Array, writes: Array | None, starts: Array | None, state: Array | None) -> tuple[Array, Array]:
        """See in_time_order."""
        phi = FEATURE_MAPS[self.feature_map]
        q, k, v = (split_heads(project(x), self.num_heads) for project in (self.query, self.key, self.value))
        q, k = phi(q * self.dims[1] ** -0.5), phi(k)
        log_decay = self._log_decay(x)
        if log_decay is not None and log_decay.ndim == 1 and (writes is not None or starts is not None):
            log_decay = jnp.broadcast_to(log_decay[None, None], (*x.shape[:2], self.dims[0]))
        if writes is not None:  # a query or padding writes nothing, and time stands still for it
            k = jnp.where(writes[..., None, None], k, 0)
            log_decay = None if log_decay is None else jnp.where(writes[..., None], log_decay, 0)
        if starts is not None:  # what was before fades at once
            log_decay = jnp.zeros((*x.shape[:2], self.dims[0])) if log_decay is None else log_decay
            log_decay = jnp.where(starts[..., None], FORGOTTEN, log_decay)
        out, after = linear_attention(
            q,
            k,
            v,
            log_decay=log_decay,
            initial_state=state,
            normalize=self.normalize,
            chunk_size=self.chunk_size,
            implementation=self.implementation,
        )
        return self.out(merge_heads(out if self.normalize else self.norm(out))), after

    def _log_decay(self, x: Array) -> Array | None:
        """[N] or [B, T, N] nats, or None."""
        if self.decay == "none":
            return None
        if self.decay == "learned":
            return jax.nn.log_sigmoid(self.gate(x).astype(jnp.float32)) / 16
        return jnp.asarray(np.log1p(-(2.0 ** (-5 - np.arange(self.dims[0])))), jnp.float32)
