"""A generator: embeds what a feed gives it, lets a decoder read it, and asks a head for the tokens."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax import Array

from ar_jax.feeds.protocol import BLANK, Chunk
from ar_jax.mixers.protocol import State, Tokens, take
from ar_jax.models.dropout import Dropout


@struct.dataclass
class Context:
    """What the whole generation of a batch is given.

    Attributes:
      slots: [B, L] int32, the slots in the order of their generation.
      condition: int32 [B] classes, float [B, P, C] embeddings, or None for no condition.
      drop: [B] bool, examples whose condition is withheld.
    """

    slots: Array
    condition: Array | None
    drop: Array


class Generator(nn.Module):
    """Tokens on slots with positions, any feed, any decoder, any head.

    Attributes:
      decoder: reads the embeddings; see `ar_jax.models.decoder.Decoder`.
      head: gives the distribution of tokens; see `ar_jax.heads.protocol.Head`.
      condition: embeds the condition; see `ar_jax.models.conditioning.Conditioner`.
      position: [L] tuples of coordinates, where each slot lives.
      vocab_size: tokens are int32 below this; 0 for tokens that are vectors.
      channels: the size of continuous tokens; 0 for discrete ones.
      learned_positions: add a learned embedding of the token's own slot.
      target_positions: add a learned embedding of the slot that is asked for (RAR, arXiv:2411.00776, sec. 3.2).
    """

    decoder: nn.Module
    head: nn.Module
    condition: nn.Module
    position: tuple[tuple[int, ...], ...]
    embed_dim: int
    vocab_size: int = 0
    channels: int = 0
    learned_positions: bool = True
    target_positions: bool = True
    dropout_rate: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """Embeddings of values and places."""
        small = nn.initializers.normal(0.02)
        embed = functools.partial(
            nn.Embed, features=self.embed_dim, embedding_init=small, dtype=self.dtype, param_dtype=self.param_dtype
        )
        if self.vocab_size:
            self.value_embed: Any = embed(self.vocab_size)
        else:
            self.value_embed = nn.Dense(self.embed_dim, dtype=self.dtype, param_dtype=self.param_dtype)
        self.blank = self.param("blank", small, (1, 1, self.embed_dim), self.param_dtype)
        if self.learned_positions:
            self.position_embed = embed(len(self.position))
        if self.target_positions:
            self.target_embed = embed(len(self.position))
        self.dropout = Dropout(self.dropout_rate)

    def __call__(
        self, values: Array, context: Context, chunk: Chunk, state: State | None = None, deterministic: bool = True
    ) -> tuple[Array, State | None]:
        """Hidden vectors of the fed tokens.

        Args:
          values: [B, L] int32 or [B, L, C] float, what stands on the slots; only what the chunk names as a source is read.
          context: order and condition of each example.
          chunk: what is fed.
          state: what was remembered before; None for a whole sequence.
          deterministic: no dropout.

        Returns:
          [B, T, D], and the state after the chunk (None if none was given).
        """
        prefix = self.condition(context.condition, context.drop).astype(self.dtype)
        x, tokens = self._embed(values, context.slots, prefix, chunk)
        x = self.dropout(x, deterministic=deterministic)
        vector = prefix.mean(axis=1) if self.decoder.adaln else None
        return self.decoder(x, tokens, vector, state, deterministic)

    def _embed(self, values: Array, slots: Array, prefix: Array, chunk: Chunk) -> tuple[Array, Tokens]:
        source, place, target = (jnp.atleast_2d(jnp.asarray(a)) for a in (chunk.source, chunk.place, chunk.target))

        def slot_of(rank: Array) -> Array:
            return jnp.take_along_axis(
                slots, jnp.broadcast_to(jnp.maximum(rank, 0), (len(slots), rank.shape[1])), axis=1
            )

        def where(code: Array, a: Array, b: Array | float) -> Array:
            return jnp.where((code >= 0)[..., None], a, b)

        value = self.value_embed(take(values, slot_of(source)))
        without = jnp.where(
            (source == BLANK)[..., None], self.blank.astype(self.dtype), take(prefix, jnp.maximum(-2 - source, 0))
        )
        x = where(source, value, without)
        if self.learned_positions:
            x += where(place, self.position_embed(slot_of(place)), 0)
        if self.target_positions:
            x += where(target, self.target_embed(slot_of(target)), 0)
        position = where(place, jnp.asarray(np.asarray(self.position, np.int32))[slot_of(place)], -1)
        return x, Tokens(jnp.atleast_2d(jnp.asarray(chunk.step)), position, chunk.num_remembered)

    def loss(
        self, hidden: Array, target: Array, key: Array, label_smoothing: float = 0.0, z_loss: float = 0.0
    ) -> Array:
        """The head's loss, [B, T]."""
        return self.head.loss(hidden, target, key, label_smoothing=label_smoothing, z_loss=z_loss)

    def logits(self, hidden: Array) -> Any:
        """The parameters of the head's distribution."""
        return self.head(hidden)

    def log_prob(self, hidden: Array, target: Array) -> Array:
        """The head's log-likelihood in nats, [B, T]."""
        return self.head.log_prob(hidden, target)

    def sample(self, hidden: Array, key: Array, *args: Any) -> Array:
        """The head's draw, [B, T]; see `Head.sample`."""
        return self.head.sample(hidden, key, *args)

    def init_all(self, values: Array, context: Context, chunk: Chunk, target: Array, key: Array) -> Array:
        """Touches every parameter, for `init`."""
        hidden, _ = self(values, context, chunk)
        return self.head.loss(hidden[:, : target.shape[1]], target, key)
