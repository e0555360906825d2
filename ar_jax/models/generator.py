"""A generator: embeds what a feed gives it, lets a backbone read it, and asks a head for the tokens."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax import Array

from ar_jax.feeds.protocol import BLANK, Chunk
from ar_jax.mixers.protocol import NEVER, State, Tokens, take
from ar_jax.models.blocks import BlockOptions
from ar_jax.models.conditioning import Condition, Told
from ar_jax.models.dropout import Dropout


@struct.dataclass
class Context:
    """What the whole generation of a batch is given.

    Attributes:
      slots: [B, L] int32, the slots in the order of their generation.
      condition: see `Condition`.
      drop: [B] bool, examples whose condition is withheld.
    """

    slots: Array
    condition: Condition
    drop: Array


@dataclasses.dataclass(frozen=True)
class Embedding:
    """How fed tokens are embedded, beside their values; keys of `config.model`.

    Attributes:
      learned_positions: add a learned embedding of the token's own slot.
      prefix_positions: prefix tokens have such an embedding, too.
      target_positions: add a learned embedding of the slot that is asked for (RAR, arXiv:2411.00776, sec. 3.2).
      level_positions: add a learned embedding of the first coordinate of the token's place, which is the scale (VAR).
      rank_modulation: the vector of adaLN has a learned embedding of the token's place in the order of generation (RAR).
      common: a learned vector is added to every token (BERT's type of a sentence).
      embed_norm: a norm follows the embedding (BERT, MAR).
      blank_token: a blank is a token like others, one more than the tokenizer has: it has a logit, may be drawn, and becomes
        the last token of the tokenizer at the end (MaskGIL's code, arXiv:2507.13032).
    """

    learned_positions: bool = True
    prefix_positions: bool = False
    target_positions: bool = True
    level_positions: bool = False
    rank_modulation: bool = False
    common: bool = False
    embed_norm: bool = False
    blank_token: bool = False


class Generator(nn.Module):
    """Tokens on slots with positions, any feed, any backbone, any head.

    Attributes:
      decoder: reads the embeddings; see `ar_jax.models.protocol.Backbone`.
      head: gives the distribution of tokens; see `ar_jax.heads.protocol.Head`.
      condition: embeds the condition; see `ar_jax.models.conditioning.Conditioner`.
      position: [L] tuples of coordinates, where each slot lives.
      embedding: what is added to the values' embeddings.
      options: of the blocks: dtypes, norm and dropout are those of the embedding, too.
      vocab_size: what is fed are tokens below this; 0 where it is vectors.
      channels: the size of these vectors.
      blank: there is an embedding for tokens without a value, as feeds "query" and "mask" feed them.
    """

    decoder: nn.Module
    head: nn.Module
    condition: nn.Module
    position: tuple[tuple[int, ...], ...]
    embedding: Embedding
    options: BlockOptions
    embed_dim: int
    vocab_size: int = 0
    channels: int = 0
    blank: bool = True

    def setup(self) -> None:
        """Embeddings of values and places."""
        types, length, prefix = self.options.types, len(self.position), self.condition.num_tokens
        small = nn.initializers.normal(0.02)
        embed: Any = functools.partial(nn.Embed, features=self.embed_dim, embedding_init=small, **types)
        if getattr(self.head, "tied", False):
            self.value_embed: Any = self.head.table
        else:
            self.value_embed = embed(self.vocab_size) if self.vocab_size else nn.Dense(self.embed_dim, **types)
        if self.blank and not self.embedding.blank_token:
            self.blank_embed = self.param("blank", small, (1, 1, self.embed_dim), types["param_dtype"])
        if self.embedding.learned_positions:
            self.position_embed = embed(length + prefix * self.embedding.prefix_positions)
        if self.embedding.target_positions:
            self.target_embed = embed(length)
        if self.embedding.level_positions:
            self.level_embed = embed(1 + max(cell[0] for cell in self.position))
        if self.embedding.rank_modulation:
            self.rank_embed = embed(prefix + length)
        if self.embedding.common:
            self.common_embed = self.param("common", small, (1, 1, self.embed_dim), types["param_dtype"])
        if self.embedding.embed_norm:
            self.norm = self.options.make_norm()()
        self.dropout = Dropout(self.options.dropout_rate)

    def __call__(
        self, content: Array, context: Context, chunk: Chunk, state: State | None = None, deterministic: bool = True
    ) -> tuple[Array, State | None]:
        """Hidden vectors of the fed tokens.

        Args:
          content: [B, T] int32 or [B, T, C] float, what is fed, with an axis [B, T, K] of members where the chunk has some; only
            read where the chunk names a rank as the source.
          context: order and condition of each example.
          chunk: what is fed.
          state: what was remembered before; None for a whole sequence.
          deterministic: no dropout.

        Returns:
          [B, T, D], and the state after the chunk (None if none was given).
        """
        told = self.condition(context.condition, context.drop)
        x, tokens = self._embed(content, context.slots, told, chunk)
        x = self.dropout(x, deterministic=deterministic)
        vector = self._vector(told, chunk) if self.options.adaln != "none" else None
        return self.decoder(x, tokens, vector, state, deterministic)

    def _embed(self, content: Array, slots: Array, told: Told, chunk: Chunk) -> tuple[Array, Tokens]:
        source, place, target = (jnp.atleast_2d(jnp.asarray(a)) for a in (chunk.source, chunk.place, chunk.target))
        prefix = told.prefix.astype(self.options.types["dtype"])
        from_prefix = jnp.maximum(-2 - source, 0)
        own, asked = slots_of(slots, place), slots_of(slots, target)

        def where(code: Array, a: Array, b: Array | float) -> Array:
            return jnp.where((code >= 0)[..., None], a, b)

        embedded = self.value_embed(content).astype(prefix.dtype)
        embedded = embedded if chunk.members is None else embedded.mean(axis=2)
        x = where(source, embedded, take(prefix, from_prefix))
        if self.blank:
            last = self.embedding.blank_token
            blank = self.value_embed.embedding[-1:][None] if last else self.blank_embed
            x = jnp.where((source == BLANK)[..., None], blank.astype(x.dtype), x)
        embedding = self.embedding
        first = self.condition.num_tokens * embedding.prefix_positions
        if embedding.learned_positions:
            x += where(place, self.position_embed(first + own), 0)
        if embedding.prefix_positions:
            x += jnp.where((source < BLANK)[..., None], self.position_embed(from_prefix), 0)
        if embedding.target_positions:
            x += where(target, self.target_embed(asked), 0)
        position = where(place, jnp.asarray(np.asarray(self.position, np.int32) // chunk.cell_side)[own], -1)
        if embedding.level_positions:
            x += where(place, self.level_embed(jnp.maximum(position[..., 0], 0)), 0)
        if embedding.common:
            x += self.common_embed.astype(x.dtype)
        if embedding.embed_norm:
            x = self.norm(x)
        return x, self._tokens(source, place, own, position, told, chunk)

    def _tokens(self, source: Array, place: Array, own: Array, position: Array, told: Told, chunk: Chunk) -> Tokens:
        step = jnp.atleast_2d(jnp.asarray(chunk.step))
        if told.valid is not None:
            valid = take(told.valid, jnp.maximum(-2 - source, 0)) | (source >= BLANK)
            step = jnp.where(valid, step, NEVER)
        prefix, asked = self.condition.num_tokens, None
        if getattr(self.decoder, "reads_asked", False):
            asked = jnp.zeros((1, len(chunk)), bool).at[0, jnp.asarray(chunk.asked)].set(True)
        return Tokens(
            step,
            position,
            chunk.num_remembered,
            row=jnp.where(place >= 0, prefix + own, jnp.maximum(-2 - source, 0)),
            blank=source == BLANK,
            num_known=chunk.num_known,
            num_readable=chunk.num_readable,
            padded=told.valid is not None,
            asked=asked,
            num_asked=None if asked is None else len(chunk.asked),
        )

    def _vector(self, told: Told, chunk: Chunk) -> Array:
        """The vector of adaLN, [B, T or 1, D]."""
        vector = told.vector[:, None].astype(self.options.types["dtype"])
        if not self.embedding.rank_modulation:
            return vector
        source = jnp.atleast_2d(jnp.asarray(chunk.source))
        rank = jnp.where(source >= 0, self.condition.num_tokens + source, jnp.maximum(-2 - source, 0))
        return vector + self.rank_embed(rank)

    def ask(self, method: str, *args: Any, **options: Any) -> Any:
        """Calls a method of the head; see `Head`."""
        return getattr(self.head, method)(*args, **options)

    def init_all(self, content: Array, context: Context, chunk: Chunk, target: Array, key: Array) -> Array:
        """Touches every parameter, for `init`."""
        hidden, _ = self(content, context, chunk)
        return self.head.loss(chunk.pick(hidden), target, key)


def slots_of(slots: Array, rank: Array) -> Array:
    """The slots [B, T] of ranks [B or 1, T]; of slot 0 where there is no rank (< 0)."""
    return jnp.take_along_axis(slots, jnp.broadcast_to(jnp.maximum(rank, 0), (len(slots), rank.shape[1])), axis=1)
