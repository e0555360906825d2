"""Categorical head: one softmax over the vocabulary per token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.heads.filters import draw
from ar_jax.heads.protocol import Sampling


class Categorical(nn.Module):
    """p(token | h) = softmax(h W + b). Logits and losses are float32."""

    vocab_size: int
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """The projection; zeros make the first prediction uniform."""
        self.logits = nn.Dense(
            self.vocab_size, kernel_init=nn.initializers.zeros, dtype=self.dtype, param_dtype=self.param_dtype
        )

    def __call__(self, hidden: Array) -> Array:
        """[B, T, D] to logits [B, T, V], float32."""
        return self.logits(hidden).astype(jnp.float32)

    def loss(
        self, hidden: Array, target: Array, key: Array, *, label_smoothing: float = 0.0, z_loss: float = 0.0
    ) -> Array:
        """Cross-entropy in nats.

        Args:
          hidden: [B, T, D].
          target: [B, T] int32.
          key: not used.
          label_smoothing: this much of the target is spread evenly over the vocabulary.
          z_loss: weight of log(Z)^2, which keeps the logits near zero (arXiv:2204.02311, sec. 5).

        Returns:
          [B, T] float32.
        """
        logits = self(hidden)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        even = logits.mean(axis=-1)
        return log_z - (1 - label_smoothing) * chosen - label_smoothing * even + z_loss * jnp.square(log_z)

    def log_prob(self, hidden: Array, target: Array) -> Array:
        """See Head; nats."""
        return jnp.take_along_axis(jax.nn.log_softmax(self(hidden)), target[..., None], axis=-1)[..., 0]

    def sample(
        self,
        hidden: Array,
        key: Array,
        settings: Sampling,
        unguided: Array | None = None,
        guidance_scale: Array | float = 1.0,
    ) -> Array:
        """See Head; int32 [B, T]. Guided logits are u + scale (c - u)."""
        logits = self(hidden)
        if unguided is not None:
            without = self(unguided)
            logits = without + guidance_scale * (logits - without)
        return draw(key, logits, settings)
