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

from ar_jax.config import UsageError, choose
from ar_jax.feeds.protocol import BLANK, NOWHERE, Chunk
from ar_jax.mixers.protocol import NEVER, State, Tokens, take
from ar_jax.models.blocks import BlockOptions
from ar_jax.models.conditioning import Condition, Told
from ar_jax.models.dropout import Dropout
from ar_jax.models.lexicons import LEXICONS
from ar_jax.models.shuffle import Shuffle, Unshuffle

MERGES = ("mean", "sum", "shuffle")


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
      merge: what becomes of the embeddings of several tokens that are fed as one: their "mean", their "sum"
        (DnD-Transformer, arXiv:2410.01912), or "shuffle": they share the channels, and so do the outputs, which are taken
        apart again behind the backbone (Token-Shuffle, arXiv:2504.17789).
      shuffle_blocks: so many MLPs follow the one and precede the other.
      codebook_inputs: what is fed are the tokenizer's own vectors of the tokens, projected; they stay as they are (DAR,
        arXiv:2503.11129, sec. 3.4).
      target_axes: positions have further axes, the coordinates of the place that is asked for, so that rotations tell where
        one is and where one goes (DAR's 4D-RoPE, sec. 3.3).
      direction_modulation: the vector of adaLN has a learned embedding of the way from a token's place to the place that it
        asks for: forwards, backwards or not at all along each axis (DAR, sec. 3.3).
      lexicon: a key of LEXICONS, whose entries of the tokens fed are told to mixers beside their embeddings
        (`Tokens.features`); "" tells none.

    Raises:
      UsageError: a value that does not exist.
    """

    learned_positions: bool = True
    prefix_positions: bool = False
    target_positions: bool = True
    level_positions: bool = False
    rank_modulation: bool = False
    common: bool = False
    embed_norm: bool = False
    blank_token: bool = False
    merge: str = "mean"
    shuffle_blocks: int = 2
    codebook_inputs: bool = False
    target_axes: bool = False
    direction_modulation: bool = False
    lexicon: str = ""

    def __post_init__(self) -> None:
        """Checks the values before anything is traced."""
        choose(dict.fromkeys(MERGES), self.merge, "model.merge")
        choose(LEXICONS | {"": None}, self.lexicon, "model.lexicon")
        if self.shuffle_blocks < 0:
            raise UsageError(f"config.model.shuffle_blocks={self.shuffle_blocks} must be at least 0.")


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
      num_transition: learned tokens of the feed; see `Feed.num_transition`.
      num_merged: so many tokens are fed as one, where they share its channels; see `Embedding.merge`.
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
    num_transition: int = 0
    num_merged: int = 1

    @property
    def num_outputs(self) -> int:
        """How many outputs each fed token has, side by side."""
        return self.num_merged if self._shuffles else getattr(self.decoder, "num_outputs", 1)

    @property
    def _shuffles(self) -> bool:
        return self.embedding.merge == "shuffle"

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
        if self._shuffles:
            blocks = self.embedding.shuffle_blocks
            self.shuffle, self.unshuffle = (
                Shuffle(blocks, self.options),
                Unshuffle(self.num_merged, blocks, self.options),
            )
        if self.num_transition:
            self.transition = self.param(
                "transition", small, (self.num_transition, self.embed_dim), types["param_dtype"]
            )
        if self.embedding.learned_positions:
            self.position_embed = embed(length + prefix * self.embedding.prefix_positions)
        if self.embedding.target_positions:
            self.target_embed = embed(length)
        if self.embedding.level_positions:
            self.level_embed = embed(1 + max(cell[0] for cell in self.position))
        if self.embedding.rank_modulation:
            self.rank_embed = embed(prefix + length)
        if self.embedding.direction_modulation:
            self.direction_embed = embed(3 ** len(self.position[0]) + 1)
        if self.embedding.common:
            self.common_embed = self.param("common", small, (1, 1, self.embed_dim), types["param_dtype"])
        if self.embedding.embed_norm:
            self.norm = self.options.make_norm()()
        self.dropout = Dropout(self.options.dropout_rate)

    def __call__(
        self,
        content: Array,
        context: Context,
        chunk: Chunk,
        state: State | None = None,
        deterministic: bool = True,
        between: Array | None = None,
    ) -> tuple[Array, State | None]:
        """Hidden vectors of the fed tokens.

        Args:
          content: [B, T] int32 or [B, T, C] float, what is fed, with an axis [B, T, K] of members where the chunk has some; only
            read where the chunk names a rank as the source.
          context: order and condition of each example.
          chunk: what is fed.
          state: what was remembered before; None for a whole sequence.
          deterministic: no dropout.
          between: [B, T, R - 1] int32, the tokens that `Chunk.between` names; None where it names none.

        Returns:
          [B, T, D], and the state after the chunk (None if none was given).
        """
        told = self.condition(context.condition, context.drop)
        x, tokens = self._embed(content, context.slots, told, chunk)
        x = self.dropout(x, deterministic=deterministic)
        vector = self._vector(told, chunk, context.slots) if self.options.adaln != "none" else None
        if between is None:
            x, state = self.decoder(x, tokens, vector, state, deterministic)
            return self.unshuffle(x) if self._shuffles else x, state
        return self.decoder(x, tokens, vector, state, deterministic, self._read_between(between, chunk))

    def stage(
        self,
        number: int,
        content: Array,
        context: Context,
        chunk: Chunk,
        state: State,
        x: Array | None,
        between: Array,
    ) -> tuple[Array, Array, State]:
        """The layers that lead from one draw to the next, for a decoder of several stages; see `Decoder.stage`.

        Args:
          number: of the stage.
          content: see `__call__`; read in stage 0.
          context: order and condition of each example.
          chunk: what is fed.
          state: what was remembered before, by all stages.
          x: [B, T, D], what the stage before handed on.
          between: [B, T, R - 1] int32; of the tokens that `Chunk.between` names those before this stage are known.

        Returns:
          Hidden vectors of this stage's output and what it hands on, both [B, T, D], and the state after it.
        """
        told = self.condition(context.condition, context.drop)
        embedded, tokens = self._embed(content, context.slots, told, chunk)
        x = embedded if x is None else x + self._read_between(between, chunk)[:, :, number - 1]
        vector = self._vector(told, chunk, context.slots) if self.options.adaln != "none" else None
        hidden, x, after = self.decoder.stage(number, x, tokens, vector, state[number])
        return hidden, x, (*state[:number], after, *state[number + 1 :])

    def _read_between(self, between: Array, chunk: Chunk) -> Array:
        """[B, T, R - 1, D], what is added to the stream behind each output; zeros where that is nothing."""
        return jnp.where((jnp.asarray(chunk.between) >= 0)[None, ..., None], self.value_embed(between), 0)

    def _embed(self, content: Array, slots: Array, told: Told, chunk: Chunk) -> tuple[Array, Tokens]:
        source, place, target = (jnp.atleast_2d(jnp.asarray(a)) for a in (chunk.source, chunk.place, chunk.target))
        prefix = told.prefix.astype(self.options.types["dtype"])
        if told.codes is not None:
            perceived = self.value_embed(jnp.maximum(told.codes, 0)).astype(prefix.dtype)
            prefix = prefix + jnp.where((told.codes >= 0)[..., None], perceived, 0)
        from_prefix = self._prefix_index(source)
        spoken = prefix
        if self.num_transition:  # behind the prefix
            learned = jnp.broadcast_to(
                self.transition[None].astype(prefix.dtype), (len(prefix), *self.transition.shape)
            )
            spoken = jnp.concatenate([prefix, learned], axis=1)
        own, asked = slots_of(slots, place), slots_of(slots, target)

        def where(code: Array, a: Array, b: Array | float) -> Array:
            return jnp.where((code >= 0)[..., None], a, b)

        embedded = self.value_embed(content).astype(prefix.dtype)
        if chunk.members is not None and self._shuffles:
            embedded = self.shuffle(embedded)
        elif chunk.members is not None:
            embedded = embedded.sum(axis=2) if self.embedding.merge == "sum" else embedded.mean(axis=2)
        x = where(source, embedded, take(spoken, jnp.maximum(-2 - source, 0)))
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
        position = self._cells(place, own, chunk)
        if hasattr(self.condition, "prefix_slots"):
            slot = jnp.asarray(self.condition.prefix_slots, jnp.int32)[from_prefix]
            slot = jnp.where((source < BLANK) & (place < 0), slot, NOWHERE)
            position = jnp.where((slot >= 0)[..., None], self._cells(slot, jnp.maximum(slot, 0), chunk), position)
        if embedding.level_positions:
            x += where(place, self.level_embed(jnp.maximum(position[..., 0], 0)), 0)
        if embedding.common:
            x += self.common_embed.astype(x.dtype)
        if embedding.embed_norm:
            x = self.norm(x)
        if embedding.target_axes:
            position = jnp.concatenate([position, self._cells(target, asked, chunk)], axis=-1)
        tokens = self._tokens(source, place, own, position, told, chunk)
        if embedding.lexicon:
            tokens = dataclasses.replace(tokens, features=self._features(content, source))
        return x, tokens

    def _features(self, content: Array, source: Array) -> Array:
        """The lexicon's entries of what is fed, [B, T, F], zeros where that has no value; of several tokens their mean."""
        if not self.vocab_size:
            raise UsageError("config.model.lexicon is of tokens that are fed by their numbers; leave it out here.")
        found = jnp.asarray(LEXICONS[self.embedding.lexicon](self.vocab_size))[content]
        return jnp.where((source >= 0)[..., None], found if content.ndim == 2 else found.mean(axis=2), 0)

    def _cells(self, code: Array, slots: Array, chunk: Chunk) -> Array:
        """The coordinates of slots [B, T], [B, T, axes]; -1 where the code is no rank."""
        cells = jnp.asarray(np.asarray(self.position, np.int32) // chunk.cell_side)
        return jnp.where((code >= 0)[..., None], cells[slots], -1)

    def _tokens(self, source: Array, place: Array, own: Array, position: Array, told: Told, chunk: Chunk) -> Tokens:
        step = jnp.atleast_2d(jnp.asarray(chunk.step))
        if told.valid is not None:
            valid = take(told.valid, self._prefix_index(source)) | (source >= BLANK)
            valid |= -2 - source >= self.condition.num_tokens
            step = jnp.where(valid, step, NEVER)
        prefix, asked = self.condition.num_tokens, None
        if getattr(self.decoder, "reads_asked", False):
            asked = jnp.zeros((1, len(chunk)), bool).at[0, jnp.asarray(chunk.asked)].set(True)
        return Tokens(
            step,
            position,
            chunk.num_remembered,
            row=jnp.where(place >= 0, prefix + own, self._prefix_index(source)),
            blank=source == BLANK,
            num_known=chunk.num_known,
            num_readable=chunk.num_readable,
            padded=told.valid is not None,
            segment=None if chunk.segment is None else jnp.atleast_2d(jnp.asarray(chunk.segment)),
            near=chunk.near,
            at=None if chunk.at is None else jnp.atleast_2d(jnp.asarray(chunk.at)),
            asked=asked,
            num_asked=None if asked is None else len(chunk.asked),
        )

    def _vector(self, told: Told, chunk: Chunk, slots: Array) -> Array:
        """The vector of adaLN, [B, T or 1, D]."""
        vector = told.vector[:, None].astype(self.options.types["dtype"])
        if self.embedding.direction_modulation:
            vector = vector + self.direction_embed(self._direction(chunk, slots))
        if not self.embedding.rank_modulation:
            return vector
        source = jnp.atleast_2d(jnp.asarray(chunk.source))
        rank = jnp.where(source >= 0, self.condition.num_tokens + source, self._prefix_index(source))
        return vector + self.rank_embed(rank)

    def _direction(self, chunk: Chunk, slots: Array) -> Array:
        """[B, T] int32, the way from each token's place to the one that it asks for, one of 3^axes; or none, the last."""
        place, target = (jnp.atleast_2d(jnp.asarray(a)) for a in (chunk.place, chunk.target))
        here, there = (self._cells(code, slots_of(slots, code), chunk) for code in (place, target))
        ways = 3 ** np.arange(here.shape[-1])
        way = ((jnp.sign(there - here) + 1) * ways[None, None]).sum(axis=-1)
        return jnp.where((place >= 0) & (target >= 0), way, 3 ** here.shape[-1])

    def _prefix_index(self, source: Array) -> Array:
        """Which prefix token a source is: learned tokens behind the prefix count as its last one, others as its first."""
        return jnp.clip(-2 - source, 0, self.condition.num_tokens - 1)

    def ask(self, method: str, *args: Any, part: int | None = None, **options: Any) -> Any:
        """Calls a method of the head; see `Head`. Where the head has a distribution for each part, all answers are of this one."""
        if part is not None and getattr(self.head, "num_outputs", 1) > 1:
            options["output"] = part
        return getattr(self.head, method)(*args, **options)

    def init_all(self, content: Array, context: Context, chunk: Chunk, target: Array, key: Array) -> Array:
        """Touches every parameter, for `init`."""
        hidden, _ = self(content, context, chunk)
        return self.head.loss(chunk.pick(hidden), target, key)


def slots_of(slots: Array, rank: Array) -> Array:
    """The slots [B, T] of ranks [B or 1, T]; of slot 0 where there is no rank (< 0)."""
    return jnp.take_along_axis(slots, jnp.broadcast_to(jnp.maximum(rank, 0), (len(slots), rank.shape[1])), axis=1)
