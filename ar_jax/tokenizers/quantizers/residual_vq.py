"""Residual quantization at one resolution: several codes for each latent, each for what those before leave (RQ-VAE)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError
from ar_jax.orders.protocol import Grid, Layout
from ar_jax.tokenizers.quantizers.codebook import Codebook
from ar_jax.tokenizers.quantizers.protocol import Quantized


class ResidualQuantizer(nn.Module):
    """z is approached code by code (arXiv:2203.01941, eq. 2 and 3), all of them from one Codebook.

    code_d = nearest(z - z_hat);   z_hat += codebook[code_d],   d = 1 .. depth

    Attributes:
      vocab_size: vectors.
      channels: numbers in each.
      depth: codes of a latent; they are the last axis of the grid, from coarse to fine.
      codebook_weight: of |sg(z) - z_hat|^2, averaged over the depths; with ema_decay it does not exist.
      commitment_weight: of |z - sg(z_hat)|^2, averaged over the depths.
      ema_decay: see Codebook.
      revive_below: see Codebook.
    """

    vocab_size: int = 16384
    channels: int = 256
    depth: int = 4
    codebook_weight: float = 1.0
    commitment_weight: float = 0.25
    ema_decay: float = 0.0
    revive_below: float = 0.0

    resample_channels = 0

    @property
    def in_channels(self) -> int:
        """Channels of z."""
        return self.channels

    def setup(self) -> None:
        """The table."""
        self.codebook = Codebook(
            self.vocab_size, self.channels, ema_decay=self.ema_decay, revive_below=self.revive_below
        )

    @nn.nowrap
    def layout(self, grid: Grid) -> Layout:
        """The grid of latents, and an axis of codes."""
        if self.depth < 1:
            raise UsageError(f"config.tokenizer.quantizer.depth={self.depth} must be at least 1.")
        return ((*grid, self.depth),)

    def __call__(self, z: Array, key: Array | None = None) -> Quantized:
        """See Quantizer."""
        flat = z.reshape(len(z), -1, self.channels)
        target, total = jax.lax.stop_gradient(flat), jnp.zeros_like(flat)
        commitment = codebook = jnp.zeros(())
        codes, inputs = [], []
        for _ in range(self.depth):
            inputs.append(target - jax.lax.stop_gradient(total))
            codes.append(jnp.argmin(self.codebook.distances(inputs[-1]), axis=-1).astype(jnp.int32))
            total = total + self.codebook(codes[-1])
            commitment += jnp.mean(jnp.square(jax.lax.stop_gradient(total) - flat)) / self.depth
            codebook += jnp.mean(jnp.square(total - target)) / self.depth
        losses = {"commitment": self.commitment_weight * commitment}
        if not self.ema_decay:
            losses["codebook"] = self.codebook_weight * codebook
        values = z + jax.lax.stop_gradient(total.reshape(z.shape) - z)
        by_place = jnp.stack(inputs, axis=2).reshape(len(z), -1, self.channels)
        return Quantized(values, jnp.stack(codes, axis=2).reshape(len(z), -1), losses, by_place)

    def lookup(self, codes: Array, known: Array | None = None) -> Array:
        """Codes [B, L] to values [B, L / depth, channels]; unknown codes add nothing."""
        vectors = self.codebook(codes)
        vectors = vectors if known is None else jnp.where(known[..., None], vectors, 0.0)
        return vectors.reshape(len(codes), -1, self.depth, self.channels).sum(axis=2)
