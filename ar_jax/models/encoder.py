"""A classifier of tokens: patches of an image, or the characters of a text, read by any mixers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError, choose
from ar_jax.data.protocol import Facts
from ar_jax.kernels.dense import Dense
from ar_jax.mixers.protocol import NEVER, Tokens
from ar_jax.models.blocks import BlockOptions
from ar_jax.models.decoder import Stack, make_stack
from ar_jax.models.dropout import Dropout
from ar_jax.tokenizers.patches import patches

POOLS = ("mean", "last")
PADDING = 0  # the character that fills up a text


class Encoder(nn.Module):
    """Embedded tokens, blocks, a norm, a pool, a linear layer (ViT, arXiv:2010.11929, without its class token).

    Attributes:
      num_classes: of the answers.
      stack: the blocks.
      grid: (height, width) in patches, or (length,) of a text.
      patch: side of a patch, in pixels; 1 for a text.
      vocab_size: of a text's characters; 0 for images.
      pool: what the answer is read from: the "mean" of all tokens, or the "last", which has read them all.
      learned_positions: every token has a learned embedding of its place.
      both_ways: all tokens read each other; otherwise each reads those before it in raster order.
    """

    num_classes: int
    stack: Stack
    embed_dim: int
    grid: tuple[int, ...]
    patch: int = 1
    vocab_size: int = 0
    pool: str = "mean"
    learned_positions: bool = True
    both_ways: bool = True

    @nn.compact
    def __call__(self, data: Array, train: bool = False, known: Array | None = None) -> Array:
        """Logits [B, classes].

        Args:
          data: images [B, H, W, C], or texts [B, length] int, of which PADDING at the end is not read.
          train: with dropout.
          known: [B, H, W] bool, what is known of each pixel, such as that it belongs to an object; a patch is told whether
            any of its pixels does (`Tokens.features`).
        """
        options, length = self.stack.options, math.prod(self.grid)
        if self.vocab_size:
            x = nn.Embed(self.vocab_size, self.embed_dim, name="embed", **options.types)(data.astype(jnp.int32))
            present = data != PADDING
        else:
            x = Dense(self.embed_dim, name="embed", **options.types)(patches(data, self.patch))
            present = jnp.ones((1, length), bool)
        if self.learned_positions:
            table = self.param("position", nn.initializers.normal(0.02), (length, self.embed_dim))
            x = x + table.astype(x.dtype)[None]
        x = Dropout(options.dropout_rate)(x, deterministic=not train)
        features = None if known is None else patches(known[..., None], self.patch).any(axis=-1, keepdims=True)
        x, _ = self.stack(x, self._tokens(present, features), deterministic=not train)
        x = options.make_norm(options.last_norm)(name="norm")(x)
        if self.pool == "mean":
            x = jnp.where(present[..., None], x, 0).sum(axis=1) / present.sum(axis=1, keepdims=True)
        else:
            x = jnp.take_along_axis(x, present.sum(axis=1)[:, None, None] - 1, axis=1)[:, 0]
        return nn.Dense(self.num_classes, name="head")(x.astype(jnp.float32))

    def _tokens(self, present: Array, features: Array | None) -> Tokens:
        """When and where they are."""
        place = np.stack(np.unravel_index(np.arange(math.prod(self.grid)), self.grid), axis=-1).astype(np.int32)
        order = jnp.arange(len(place), dtype=jnp.int32)[None]
        step = jnp.where(present, 0 if self.both_ways else order, NEVER)
        return Tokens(
            step,
            jnp.asarray(place)[None],
            len(place),
            row=order,
            padded=bool(self.vocab_size),
            features=None if features is None else features.astype(jnp.float32),
        )


def encoder(
    facts: Facts,
    options: BlockOptions,
    embed_dim: int = 128,
    num_layers: int = 4,
    patch: int = 1,
    pool: str = "mean",
    learned_positions: bool = True,
    mixer: Mapping[str, Any] | None = None,
) -> Encoder:
    """The encoder for a data set. Tokens read each other both ways where all mixers can.

    Args:
      facts: what the data is.
      options: of the blocks; without adaLN.
      embed_dim: see Encoder.
      num_layers: blocks.
      patch: see Encoder; of a text 1.
      pool: see Encoder.
      learned_positions: see Encoder.
      mixer: see `mixer_pattern`.

    Raises:
      UsageError: an option that does not fit the data.
    """
    choose(dict.fromkeys(POOLS), pool, "model.pool")
    if facts.modality == "video":
        raise UsageError("config.model.kind='encoder' reads images and texts, but the data is video.")
    if options.adaln != "none":
        raise UsageError(
            f"config.model.adaln={options.adaln!r} needs a condition, which an encoder has not; leave it out."
        )
    text = facts.modality == "text"
    sides = facts.shape if text else facts.shape[:-1]
    if patch < 1 or any(side % patch for side in sides) or (text and patch > 1):
        raise UsageError(
            f"config.model.patch={patch} does not divide the {facts.modality}'s {sides}; use a common divisor, of a text 1."
        )
    grid = tuple(side // patch for side in sides)
    stack = make_stack(mixer, embed_dim, num_layers, options, grid)
    vocab_size, both_ways = facts.levels if text else 0, all(make().reads_peers for make in stack.mixers)
    return Encoder(facts.num_classes, stack, embed_dim, grid, patch, vocab_size, pool, learned_positions, both_ways)
