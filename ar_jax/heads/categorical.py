"""Categorical head: one softmax over the vocabulary per token."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.config import choose
from ar_jax.heads.filters import draw
from ar_jax.heads.noise import Noise
from ar_jax.heads.protocol import Sampling

CONFIDENCES = ("logit", "log_probability")


class Categorical(nn.Module):
    """p(token | h) = softmax(h W + b), or without b. Logits and losses are float32.

    Attributes:
      tied: W is the table that embeds the tokens, transposed (arXiv:1608.05859).
      embed_dim: of h.
      confidence: by which an adaptive order chooses what it keeps: the "logit" of the token drawn (TiTok's code), or its
        "log_probability" (MaskGIT, arXiv:2202.04200).
    """

    vocab_size: int
    embed_dim: int = 0
    use_bias: bool = True
    tied: bool = False
    confidence: str = "logit"
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    has_likelihood: ClassVar[bool] = True

    def setup(self) -> None:
        """The projection; zeros make the first prediction uniform. Or the table, which embeds tokens, too."""
        choose(dict.fromkeys(CONFIDENCES), self.confidence, "head.confidence")
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if self.tied:
            small = nn.initializers.normal(0.02)
            self.table = nn.Embed(self.vocab_size, self.embed_dim, embedding_init=small, **types)
            if self.use_bias:
                self.bias = self.param("bias", nn.initializers.zeros, (self.vocab_size,), self.param_dtype)
            return
        self.logits = nn.Dense(
            self.vocab_size,
            use_bias=self.use_bias,
            kernel_init=nn.initializers.zeros,
            **types,
        )

    def __call__(self, hidden: Array) -> Array:
        """[B, T, D] to logits [B, T, V], float32."""
        if not self.tied:
            return self.logits(hidden).astype(jnp.float32)
        logits = self.table.attend(hidden).astype(jnp.float32)
        return logits + self.bias.astype(jnp.float32)[None, None] if self.use_bias else logits

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
        noise: Noise,
        settings: Sampling,
        unguided: Array | None = None,
        guidance_scale: Array | float = 1.0,
    ) -> Array:
        """See Head; int32 [B, T]. Guided logits are u + scale (c - u)."""
        return draw(noise, self._guided(hidden, unguided, guidance_scale), settings)

    def sample_with_confidence(
        self,
        hidden: Array,
        noise: Noise,
        settings: Sampling,
        unguided: Array | None = None,
        guidance_scale: Array | float = 1.0,
    ) -> tuple[Array, Array]:
        """As `sample`, and how sure the guided model is of each token drawn, [B, T] float32; see `confidence`."""
        logits = self._guided(hidden, unguided, guidance_scale)
        drawn = draw(noise, logits, settings)
        if self.confidence == "log_probability":
            logits = jax.nn.log_softmax(logits)
        return drawn, jnp.take_along_axis(logits, drawn[..., None], axis=-1)[..., 0]

    def _guided(self, hidden: Array, unguided: Array | None, guidance_scale: Array | float) -> Array:
        logits = self(hidden)
        if unguided is None:
            return logits
        without = self(unguided)
        return without + guidance_scale * (logits - without)
