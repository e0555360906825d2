"""What a generator is told from outside: a class, a sequence of embeddings (of a text, say), or nothing."""

from __future__ import annotations

from typing import Protocol

import jax.numpy as jnp
from flax import linen as nn
from jax import Array


class Conditioner(Protocol):
    """Turns a condition into prefix tokens; `guidance_dropout_rate` > 0 trains the unconditional model along with it."""

    guidance_dropout_rate: float

    @property
    def num_tokens(self) -> int:
        """The number of prefix tokens, P."""

    def __call__(self, condition: Array | None, drop: Array) -> Array:
        """Embeds the condition of B examples as [B, P, D]; where drop [B] is true, the unconditional one."""


class NoCondition(nn.Module):
    """A learned start token."""

    embed_dim: int
    param_dtype: jnp.dtype = jnp.float32
    guidance_dropout_rate: float = 0.0
    num_tokens: int = 1

    @nn.compact
    def __call__(self, condition: Array | None, drop: Array) -> Array:
        """See Conditioner; the condition is not read."""
        start = self.param("start", nn.initializers.normal(0.02), (1, 1, self.embed_dim), self.param_dtype)
        return jnp.broadcast_to(start, (len(drop), 1, self.embed_dim))


class ClassCondition(nn.Module):
    """An embedding per class, and one for no class (classifier-free guidance, arXiv:2207.12598)."""

    embed_dim: int
    num_classes: int
    guidance_dropout_rate: float = 0.1
    param_dtype: jnp.dtype = jnp.float32
    num_tokens: int = 1

    @nn.compact
    def __call__(self, condition: Array | None, drop: Array) -> Array:
        """See Conditioner; the condition is int32 [B]."""
        table = nn.Embed(
            self.num_classes + 1,
            self.embed_dim,
            embedding_init=nn.initializers.normal(0.02),
            param_dtype=self.param_dtype,
            name="embed",
        )
        labels = (
            jnp.full(drop.shape, self.num_classes)
            if condition is None
            else jnp.where(drop, self.num_classes, condition)
        )
        return table(labels)[:, None]


class EmbeddingCondition(nn.Module):
    """Given embeddings [B, P, C], projected; learned ones stand for no condition."""

    embed_dim: int
    num_tokens: int
    channels: int
    guidance_dropout_rate: float = 0.1
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, condition: Array | None, drop: Array) -> Array:
        """See Conditioner; the condition is float [B, P, C]."""
        null = self.param("null", nn.initializers.normal(0.02), (1, self.num_tokens, self.channels), self.param_dtype)
        given = null if condition is None else jnp.where(drop[:, None, None], null, condition)
        given = jnp.broadcast_to(given, (len(drop), self.num_tokens, self.channels))
        return nn.Dense(self.embed_dim, param_dtype=self.param_dtype, name="project")(given)


CONDITIONERS = {"none": NoCondition, "class": ClassCondition, "embedding": EmbeddingCondition}
