"""What a generator is told from outside: a class, a sequence of embeddings (of a text, say), or nothing."""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import Array

Condition = Any  # int32 [B] classes; float [B, P, C] embeddings, alone or with a mask; or None


@struct.dataclass
class Told:
    """A condition as a generator reads it.

    Attributes:
      prefix: [B, P, D] tokens in front of all others.
      vector: [B, D], the condition as one vector, for adaLN.
      valid: [B, P] bool, prefix tokens that are no padding; None where all are valid.
    """

    prefix: Array
    vector: Array
    valid: Array | None = None


class Conditioner(Protocol):
    """Turns a condition into prefix tokens; `guidance_dropout_rate` > 0 trains the unconditional model along with it."""

    guidance_dropout_rate: float

    @property
    def num_tokens(self) -> int:
        """The number of prefix tokens, P."""

    def __call__(self, condition: Condition, drop: Array) -> Told:
        """Embeds the condition of B examples; where drop [B] is true, the unconditional one."""


class NoCondition(nn.Module):
    """A learned start token."""

    embed_dim: int
    param_dtype: jnp.dtype = jnp.float32
    guidance_dropout_rate: float = 0.0
    num_tokens: int = 1

    @nn.compact
    def __call__(self, condition: Condition, drop: Array) -> Told:
        """See Conditioner; the condition is not read."""
        start = self.param("start", nn.initializers.normal(0.02), (1, 1, self.embed_dim), self.param_dtype)
        prefix = jnp.broadcast_to(start, (len(drop), 1, self.embed_dim))
        return Told(prefix, prefix[:, 0])


class ClassCondition(nn.Module):
    """An embedding per class, and one for no class (classifier-free guidance, arXiv:2207.12598).

    Attributes:
      copies: the class's embedding stands so many times in the prefix (MAR, arXiv:2406.11838, has 64).
      start_token: a learned token, the same for all classes, stands in front (RAR, arXiv:2411.00776).
    """

    embed_dim: int
    num_classes: int
    guidance_dropout_rate: float = 0.1
    copies: int = 1
    start_token: bool = False
    param_dtype: jnp.dtype = jnp.float32

    @property
    def num_tokens(self) -> int:
        """See Conditioner."""
        return self.copies + self.start_token

    @nn.compact
    def __call__(self, condition: Condition, drop: Array) -> Told:
        """See Conditioner; the condition is int32 [B]."""
        small = nn.initializers.normal(0.02)
        table = nn.Embed(
            self.num_classes + 1, self.embed_dim, embedding_init=small, param_dtype=self.param_dtype, name="embed"
        )
        labels = (
            jnp.full(drop.shape, self.num_classes)
            if condition is None
            else jnp.where(drop, self.num_classes, condition)
        )
        vector = table(labels)
        prefix = jnp.repeat(vector[:, None], self.copies, axis=1)
        if self.start_token:
            start = self.param("start", small, (1, 1, self.embed_dim), self.param_dtype)
            prefix = jnp.concatenate([jnp.broadcast_to(start, (len(drop), 1, self.embed_dim)), prefix], axis=1)
        return Told(prefix, vector)


class EmbeddingCondition(nn.Module):
    """Given embeddings [B, P, C], projected; learned ones stand for no condition.

    Attributes:
      num_tokens: P.
      channels: C.
      projection: "linear", or "mlp": two layers without biases around a GELU (LlamaGen, arXiv:2406.06525).
    """

    embed_dim: int
    num_tokens: int
    channels: int
    guidance_dropout_rate: float = 0.1
    projection: str = "linear"
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, condition: Condition, drop: Array) -> Told:
        """See Conditioner; the condition is float [B, P, C], or {"embedding": that, "mask": bool [B, P]}."""
        null = self.param("null", nn.initializers.normal(0.02), (1, self.num_tokens, self.channels), self.param_dtype)
        masked = isinstance(condition, dict)
        given, valid = (condition["embedding"], condition["mask"]) if masked else (condition, None)
        given = null if given is None else jnp.where(drop[:, None, None], null, given)
        given = jnp.broadcast_to(given, (len(drop), self.num_tokens, self.channels))
        dense = nn.Dense
        if self.projection == "mlp":
            up = dense(self.embed_dim, use_bias=False, param_dtype=self.param_dtype, name="up")
            given = jax.nn.gelu(up(given))
        bias = self.projection == "linear"
        prefix = dense(self.embed_dim, use_bias=bias, param_dtype=self.param_dtype, name="project")(given)
        return Told(prefix, prefix.mean(axis=1), valid)


CONDITIONERS = {"none": NoCondition, "class": ClassCondition, "embedding": EmbeddingCondition}
