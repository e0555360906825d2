"""What a generator is told from outside: a class, a sequence of embeddings (of a text, say), or nothing."""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import Array

# int32 [B] classes, alone or with a prompt of tokens; float [B, P, C] embeddings, alone or with a mask; or None
Condition = Any


@struct.dataclass
class Told:
    """A condition as a generator reads it.

    Attributes:
      prefix: [B, P, D] tokens in front of all others.
      vector: [B, D], the condition as one vector, for adaLN.
      valid: [B, P] bool, prefix tokens that are no padding; None where all are valid.
      codes: [B, P] int32, tokens of the vocabulary whose embeddings are added to the prefix, -1 for none; None where there
        are none at all.
    """

    prefix: Array
    vector: Array
    valid: Array | None = None
    codes: Array | None = None


class Conditioner(Protocol):
    """Turns a condition into prefix tokens; `guidance_dropout_rate` > 0 trains the unconditional model along with it."""

    guidance_dropout_rate: float

    @property
    def num_tokens(self) -> int:
        """The number of prefix tokens, P."""

    def __call__(self, condition: Condition, drop: Array) -> Told:
        """Embeds the condition of B examples; where drop [B] is true, the unconditional one.

        One that draws a part of the condition itself has a method `complete(condition, key, batch_size)`, whose result is
        what this is given. One whose prefix tokens stand at places of the image has `prefix_slots`, [P] the slots, or -1.
        """


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


class PromptCondition(nn.Module):
    """A class, and behind it the tokens of a whole image, which is read before the first token (VF prompt, arXiv:2502.16965).

    p(x | class) becomes p(x | prompt, class). The prompt's tokens are embedded as those of the image are, at the same places,
    and read in raster order. They are another image of the class (their "class prompt"), or tokens that are drawn evenly
    from the vocabulary where none are given (their "universal prompt"). A likelihood is that behind the one prompt: its mean
    over prompts is a lower bound of the likelihood without them.

    Attributes:
      num_slots: tokens of an image, all of which a prompt has.
      vocab_size: of the tokens.
    """

    embed_dim: int
    num_classes: int
    num_slots: int
    vocab_size: int
    guidance_dropout_rate: float = 0.1
    param_dtype: jnp.dtype = jnp.float32

    @property
    def num_tokens(self) -> int:
        """The class, and the prompt."""
        return 1 + self.num_slots

    @property
    def prefix_slots(self) -> tuple[int, ...]:
        """See Conditioner."""
        return (-1, *range(self.num_slots))

    @nn.nowrap
    def complete(self, condition: Condition, key: Array, batch_size: int) -> Condition:
        """{"label": int32 [B], or None for no class, "prompt": int32 [B, L]}; a prompt that is not given is drawn."""
        given = condition if isinstance(condition, dict) else {"label": condition}
        drawn = jax.random.randint(key, (batch_size, self.num_slots), 0, self.vocab_size, jnp.int32)
        return {"label": given["label"], "prompt": given.get("prompt", drawn)}

    @nn.compact
    def __call__(self, condition: Condition, drop: Array) -> Told:
        """See Conditioner; the prompt stays where the class is withheld."""
        labels = None if condition is None else condition["label"]
        told = ClassCondition(
            self.embed_dim, self.num_classes, self.guidance_dropout_rate, param_dtype=self.param_dtype, name="label"
        )(labels, drop)
        kind = self.param("prompt", nn.initializers.zeros, (1, 1, self.embed_dim), self.param_dtype)
        shape = (len(drop), self.num_slots)
        prompt = jnp.zeros(shape, jnp.int32) if condition is None else condition["prompt"]
        codes = jnp.concatenate([jnp.full((len(drop), 1), -1, jnp.int32), prompt], axis=1)
        prefix = jnp.concatenate([told.prefix, jnp.broadcast_to(kind, (*shape, self.embed_dim))], axis=1)
        return Told(prefix, told.vector, codes=codes)


CONDITIONERS = {
    "none": NoCondition,
    "class": ClassCondition,
    "embedding": EmbeddingCondition,
    "prompt": PromptCondition,
}
