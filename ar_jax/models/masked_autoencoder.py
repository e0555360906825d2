"""Masked autoencoder (MAR, S066, arXiv:2406.11838): an encoder reads what is known, a decoder fills in the rest."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError
from ar_jax.kernels.dense import Dense
from ar_jax.mixers.protocol import NEVER, State, Tokens
from ar_jax.models.blocks import BlockOptions, MakeMixer
from ar_jax.models.decoder import Stack


class MaskedAutoencoder(nn.Module):
    """The encoder never sees a blank: blanks are cut off where all of them stand at the end, and elsewhere never read.

    See `Backbone`; for feed "mask".

    Attributes:
      num_rows: places that the decoder has an embedding for: prefix tokens and slots.
      num_prefix: prefix tokens.
      num_layers: of the encoder.
      decoder_mixers: makes each mixer of one repeat of the decoder's layers.
      decoder_dim: the decoder's width; 0 takes the encoder's.
      decoder_layers: of the decoder; 0 takes as many as the encoder has.
      decoder_mlp_dim: hidden width of the decoder's MLPs; None takes what `options` says.
    """

    embed_dim: int
    mixers: tuple[MakeMixer, ...]
    options: BlockOptions
    num_rows: int
    num_prefix: int
    decoder_mixers: tuple[MakeMixer, ...]
    num_layers: int = 4
    decoder_dim: int = 0
    decoder_layers: int = 0
    decoder_mlp_dim: int | None = None

    reads_blanks: ClassVar[bool] = False

    @nn.nowrap
    def _stacks(self, names: tuple[str | None, str | None] = ("encoder", "decoder")) -> tuple[Stack, Stack]:
        wide = dataclasses.replace(self.options, mlp_dim=self.decoder_mlp_dim or self.options.mlp_dim)
        return (
            Stack(self.mixers, self.num_layers, self.options, name=names[0]),
            Stack(self.decoder_mixers, self.decoder_layers or self.num_layers, wide, name=names[1]),
        )

    @nn.nowrap
    def check(self) -> None:
        """Raises UsageError where layers do not fit the pattern, or blocks are modulated."""
        for stack in self._stacks((None, None)):
            stack.num_repeats  # noqa: B018  (the property checks)
        if self.options.adaln != "none":
            raise UsageError("config.model.adaln must be 'none' for kind 'masked_autoencoder'.")

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
        batch, length, _ = x.shape
        width, n = self.decoder_dim or self.embed_dim, length if tokens.num_known is None else tokens.num_known
        types, norm, small = self.options.types, self.options.make_norm(), nn.initializers.normal(0.02)
        encoder, decoder = self._stacks()
        row = jnp.asarray(tokens.row)
        blank = jnp.zeros((1, length), bool) if tokens.blank is None else tokens.blank
        readable = dataclasses.replace(
            tokens.part(slice(0, n)), step=jnp.where(blank[:, :n], NEVER, tokens.step[:, :n])
        )
        told, _ = encoder(x[:, :n], readable, None, None, deterministic)
        told = Dense(width, name="bridge", **types)(norm(name="encoder_norm")(told))
        mask = self.param("mask", small, (1, 1, width), types["param_dtype"]).astype(told.dtype)
        told = jnp.where(blank[:, :n, None], mask, told)
        filled = jnp.concatenate([told, jnp.broadcast_to(mask, (batch, length - n, width))], axis=1)
        positions = self.param("positions", small, (1, self.num_rows, width), types["param_dtype"])
        filled = filled + positions[0][row].astype(filled.dtype)
        out, _ = decoder(filled, tokens, None, None, deterministic)
        answers = self.param(
            "answer_positions", small, (1, self.num_rows - self.num_prefix, width), types["param_dtype"]
        )
        slot = row - self.num_prefix
        asked = jnp.where((slot >= 0)[..., None], answers[0][jnp.maximum(slot, 0)], 0)
        return norm(name="decoder_norm")(out) + asked.astype(out.dtype), None
