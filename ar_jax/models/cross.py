"""Cross-attention: a block whose tokens read what others left, and layers that read themselves and a memory in turn."""

from __future__ import annotations

from typing import Any

from flax import linen as nn
from jax import Array

from ar_jax.mixers.protocol import State, Tokens
from ar_jax.mixers.softmax import Cache
from ar_jax.models.blocks import MLP, BlockOptions, MakeMixer
from ar_jax.models.dropout import Dropout


class CrossBlock(nn.Module):
    """x += attention(norm(x), norm(memory)); x += mlp(norm(x)), by a softmax mixer (Perceiver, arXiv:2103.03206).

    Attributes:
      make_mixer: makes the attention; x has its width, the memory may have another.
      options: of the blocks; norms come first.
      residual: whether x is added to what it has read; otherwise that takes its place.
    """

    make_mixer: MakeMixer
    options: BlockOptions
    residual: bool = True

    def setup(self) -> None:
        """Attention, MLP, norms."""
        norm = self.options.make_norm()
        self.attention: Any = self.make_mixer()
        self.mlp = MLP(self.options)
        self.memory_norm, self.query_norm, self.mlp_norm = norm(), norm(), norm()
        self.dropout = Dropout(self.options.dropout_rate)

    def entries(self, memory: Array, tokens: Tokens, own: bool = False) -> Cache:
        """What the remembered tokens of a memory [B, S, M] leave to be read; `own` ones are among those that read."""
        normed = self.query_norm(memory) if own else self.memory_norm(memory)
        return self.attention.entries(normed, tokens)

    def __call__(self, x: Array, tokens: Tokens, readable: Cache, deterministic: bool) -> Array:
        """Tokens x [B, T, D] and what they may read to x [B, T, D]."""
        read = self.attention.attend(self.query_norm(x), tokens, readable)
        read = self.dropout(read, deterministic=deterministic)
        x = x + read if self.residual else read
        return x + self.dropout(self.mlp(self.mlp_norm(x)), deterministic=deterministic)


class CrossDecoder(nn.Module):
    """Layers x += mixer(norm(x)); x += attention(norm(x), norm(memory)); x += mlp(norm(x)), and a norm (arXiv:1706.03762).

    Attributes:
      make_mixer: makes the softmax mixer of each half.
      num_layers: how many.
    """

    make_mixer: MakeMixer
    num_layers: int
    options: BlockOptions

    def setup(self) -> None:
        """The layers."""
        norm, layers = self.options.make_norm(), range(self.num_layers)
        self.mixers: Any = [self.make_mixer() for _ in layers]
        self.mixer_norms = [norm() for _ in layers]
        self.readers = [CrossBlock(self.make_mixer, self.options) for _ in layers]
        self.dropout = Dropout(self.options.dropout_rate)
        self.norm = norm()

    def entries(self, memory: Array, tokens: Tokens) -> tuple[Cache, ...]:
        """What a memory [B, S, M] leaves to be read in each layer."""
        return tuple(reader.entries(memory, tokens) for reader in self.readers)

    def __call__(
        self, x: Array, tokens: Tokens, readable: tuple[Cache, ...], state: State | None, deterministic: bool
    ) -> tuple[Array, State | None]:
        """Tokens x [B, T, D], and what was remembered of those before them, to x [B, T, D] and the state after."""
        after = []
        for i, reader in enumerate(self.readers):
            own = None if state is None else state[i]
            mixed, new = self.mixers[i](self.mixer_norms[i](x), tokens, own)
            x = x + self.dropout(mixed, deterministic=deterministic)
            x = reader(x, tokens, readable[i], deterministic)
            after.append(new)
        return self.norm(x), None if state is None else tuple(after)
