"""Categorical head: one softmax over the vocabulary per token."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError, choose
from ar_jax.heads.filters import draw
from ar_jax.heads.noise import Noise
from ar_jax.heads.protocol import Sampling

CONFIDENCES = ("logit", "log_probability", "policy")


class Categorical(nn.Module):
    """p(token | h) = softmax(h W + b), or without b. Logits and losses are float32.

    Attributes:
      tied: W is the table that embeds the tokens, transposed (arXiv:1608.05859).
      embed_dim: of h.
      num_outputs: answers are given in turn by so many outputs of a token, and each output has a W of its own: answer i the
        one of number i mod so many (DnD-Transformer, arXiv:2410.01912). 1 has one W for all.
      confidence: by which an adaptive order chooses what it keeps: the "logit" of the token drawn (TiTok's code), or its
        "log_probability" (MaskGIT, arXiv:2202.04200); or a "policy", a learned logit of each token, whatever is drawn for it
        (LO-ARM, arXiv:2503.05979): with noise of temperature 1, steps of one token then draw the next one from its softmax.
    """

    vocab_size: int
    embed_dim: int = 0
    use_bias: bool = True
    tied: bool = False
    num_outputs: int = 1
    confidence: str = "logit"
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    has_likelihood: ClassVar[bool] = True

    def setup(self) -> None:
        """The projection; zeros make the first prediction uniform. Or the table, which embeds tokens, too."""
        choose(dict.fromkeys(CONFIDENCES), self.confidence, "head.confidence")
        if self.num_outputs < 1 or (self.tied and self.num_outputs > 1):
            raise UsageError(
                f"config.head.num_outputs={self.num_outputs} must be at least 1, and 1 where tied=True: one table is one W."
            )
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if self.confidence == "policy":
            self.order = nn.Dense(2, kernel_init=nn.initializers.zeros, **types)
        if self.tied:
            small = nn.initializers.normal(0.02)
            self.table = nn.Embed(self.vocab_size, self.embed_dim, embedding_init=small, **types)
            if self.use_bias:
                self.bias = self.param("bias", nn.initializers.zeros, (self.vocab_size,), self.param_dtype)
            return
        if self.num_outputs > 1:
            self.logits: nn.Module = OutputLogits(self.vocab_size, self.num_outputs, self.use_bias, **types)
            return
        self.logits = nn.Dense(
            self.vocab_size,
            use_bias=self.use_bias,
            kernel_init=nn.initializers.zeros,
            **types,
        )

    def __call__(self, hidden: Array, output: int | None = None) -> Array:
        """[B, T, D] to logits [B, T, V], float32; where outputs have logits of their own, in turn, or all of one output."""
        if self.num_outputs > 1:
            return self.logits(hidden, output).astype(jnp.float32)
        if not self.tied:
            return self.logits(hidden).astype(jnp.float32)
        logits = self.table.attend(hidden).astype(jnp.float32)
        return logits + self.bias.astype(jnp.float32)[None, None] if self.use_bias else logits

    def order_logits(self, hidden: Array) -> Array:
        """[B, T, 2] float32: of the order policy, and of the posterior that it is trained with; see `LearnedOrder`."""
        return self.order(hidden).astype(jnp.float32)

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
        if self.is_initializing() and self.confidence == "policy":
            self.order_logits(hidden)
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
        output: int | None = None,
    ) -> Array:
        """See Head; int32 [B, T]. Guided logits are u + scale (c - u). All may be answers of one output."""
        return draw(noise, self._guided(hidden, unguided, guidance_scale, output), settings)

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
        if self.confidence == "policy":
            return drawn, self.order_logits(hidden)[..., 0]
        if self.confidence == "log_probability":
            logits = jax.nn.log_softmax(logits)
        return drawn, jnp.take_along_axis(logits, drawn[..., None], axis=-1)[..., 0]

    def _guided(
        self, hidden: Array, unguided: Array | None, guidance_scale: Array | float, output: int | None = None
    ) -> Array:
        logits = self(hidden, output)
        if unguided is None:
            return logits
        without = self(unguided, output)
        return without + guidance_scale * (logits - without)


class OutputLogits(nn.Module):
    """h W_r + b_r with the W of each of R outputs; zeros make the first prediction uniform."""

    vocab_size: int
    num_outputs: int
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, hidden: Array, output: int | None = None) -> Array:
        """[B, T, D] to [B, T, V]: token i by W_(i mod R), or all by that of one output."""
        batch, length, width = hidden.shape
        zeros, count = nn.initializers.zeros, self.num_outputs
        kernel = self.param("kernel", zeros, (count, width, self.vocab_size), self.param_dtype).astype(self.dtype)
        bias = self.param("bias", zeros, (count, 1, self.vocab_size), self.param_dtype) if self.use_bias else None
        turns = hidden.astype(self.dtype).reshape(batch, -1, count if output is None else 1, width)
        mine = slice(None) if output is None else slice(output, output + 1)
        logits = jnp.einsum("btrd,rdv->btrv", turns, kernel[mine])
        if bias is not None:
            logits = logits + bias[mine, 0][None, None].astype(self.dtype)
        return logits.reshape(batch, length, self.vocab_size)
