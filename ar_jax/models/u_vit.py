"""U-ViT (arXiv:2209.12152): the second half of the layers also reads what the first half had, the last first."""

from __future__ import annotations

import functools
from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError
from ar_jax.kernels.dense import Dense
from ar_jax.mixers.protocol import State, Tokens
from ar_jax.models.blocks import Block, BlockOptions, MakeMixer


class SkipLayer(nn.Module):
    """A block, in front of it a projection of x together with what an earlier layer gave, if there is any."""

    make_mixer: MakeMixer
    options: BlockOptions
    deterministic: bool

    @nn.compact
    def __call__(self, x: Array, skip: Array | None, tokens: Tokens) -> tuple[Array, Array]:
        """[B, T, D] and [B, T, D] or None; twice the block's output."""
        if skip is not None:
            x = Dense(x.shape[-1], name="skip", **self.options.types)(jnp.concatenate([x, skip], axis=-1))
        x, _ = Block(self.make_mixer, self.options, name="block")(x, tokens, None, None, self.deterministic)
        return x, x


class UViT(nn.Module):
    """num_layers / 2 layers, one in the middle, num_layers / 2 layers with skips; see `Backbone`, for feed "mask"."""

    embed_dim: int
    mixers: tuple[MakeMixer, ...]
    options: BlockOptions
    num_layers: int = 4

    reads_blanks: ClassVar[bool] = True

    @nn.nowrap
    def check(self) -> None:
        """Raises UsageError for a pattern of several mixers, or modulated blocks."""
        if len(self.mixers) > 1 or self.options.adaln != "none" or self.num_layers < 2:
            raise UsageError("config.model.kind='u_vit' takes a single mixer, adaln 'none' and two layers or more.")

    @nn.nowrap
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> State:
        """Nothing is remembered."""
        return ()

    @nn.compact
    def __call__(
        self,
        x: Array,
        tokens: Tokens,
        vector: Array | None = None,
        state: State | None = None,
        deterministic: bool = True,
    ) -> tuple[Array, State | None]:
        """See Backbone."""
        scan = functools.partial(
            nn.scan,
            self.options.rematerialised(SkipLayer),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=self.num_layers // 2,
        )
        fields = (self.mixers[0], self.options, deterministic)
        x, skips = scan(in_axes=(nn.broadcast, nn.broadcast))(*fields, name="down")(x, None, tokens)
        x, _ = SkipLayer(*fields, name="middle")(x, None, tokens)
        x, _ = scan(in_axes=(0, nn.broadcast))(*fields, name="up")(x, jnp.flip(skips, axis=0), tokens)
        return self.options.make_norm()(name="norm")(x), None
