"""Continuous latents with a Gaussian posterior, held close to a normal distribution (arXiv:1312.6114)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.orders.protocol import Grid, Layout
from ar_jax.tokenizers.quantizers.protocol import Quantized


class GaussianPosterior(nn.Module):
    """z is the mean and the log-variance of the latents; latent diffusion's autoencoder (arXiv:2112.10752), MAR's tokens.

    Attributes:
      channels: numbers in a latent.
      kl_weight: of the divergence from a standard normal, in nats per example.
    """

    channels: int = 16
    kl_weight: float = 1e-6

    vocab_size = 0
    resample_channels = 0

    @property
    def in_channels(self) -> int:
        """Mean and log-variance."""
        return 2 * self.channels

    @nn.nowrap
    def layout(self, grid: Grid) -> Layout:
        """See Quantizer."""
        return (grid,)

    def __call__(self, z: Array, key: Array | None = None) -> Quantized:
        """The mean or, with a key, a sample of the posterior; see Quantizer."""
        mean, log_variance = jnp.split(z, 2, axis=-1)
        log_variance = jnp.clip(log_variance, -30.0, 20.0)
        divergence = 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance)
        losses = {"kl": self.kl_weight * divergence.sum() / len(z)}
        values = mean
        if key is not None:
            values = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
        return Quantized(values, None, losses, mean.reshape(len(z), -1, self.channels))
