"""Discriminators of images, and what they and the images' maker are trained on."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError

NORMS = ("group", "none")


class PatchDiscriminator(nn.Module):
    """Real or made? One answer for each patch (PatchGAN, arXiv:1611.07004).

    The published networks normalise by batch statistics. Those make an image's answer depend on its neighbours in the
    batch, differ for real and made batches, and are state of their own: here each image is normalised by itself.

    Attributes:
      hidden_channels: of the first convolution; each further one has twice as many, up to 8 times.
      num_layers: convolutions that halve the resolution.
      norm: "group" (arXiv:1803.08494) or "none".

    Raises:
      UsageError: an unknown norm, or images too small for so many layers.
    """

    hidden_channels: int = 64
    num_layers: int = 3
    norm: str = "group"

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """[B, H, W, C] to logits [B, h, w], above 0 for real."""
        if self.norm not in NORMS:
            raise UsageError(
                f"config.objective.discriminator.norm={self.norm!r} is unknown. Known: {', '.join(NORMS)}."
            )
        if min(images.shape[1:3]) // 2**self.num_layers < 3:  # two convolutions take one cell each
            raise UsageError(
                f"config.objective.discriminator.num_layers={self.num_layers} leaves nothing of images "
                f"{images.shape[1:3]}; lower it."
            )
        conv = functools.partial(
            nn.Conv, kernel_size=(4, 4), padding=((1, 1), (1, 1)), kernel_init=nn.initializers.normal(0.02)
        )
        x = nn.leaky_relu(conv(self.hidden_channels, strides=2, name="conv_0")(images), 0.2)
        for layer in range(1, self.num_layers + 1):
            channels = self.hidden_channels * min(2**layer, 8)
            strides = 2 if layer < self.num_layers else 1
            x = conv(channels, strides=strides, use_bias=self.norm == "none", name=f"conv_{layer}")(x)
            if self.norm == "group":
                x = nn.GroupNorm(math.gcd(32, channels), use_fast_variance=False, name=f"norm_{layer}")(x)
            x = nn.leaky_relu(x, 0.2)
        return conv(1, name="out")(x)[..., 0]


DISCRIMINATORS = {"patch": PatchDiscriminator}


def hinge(real: Array, made: Array) -> Array:
    """(E max(0, 1 - D(real)) + E max(0, 1 + D(made))) / 2, of logits of any shape."""
    return (nn.relu(1 - real).mean() + nn.relu(1 + made).mean()) / 2


def vanilla(real: Array, made: Array) -> Array:
    """Binary cross-entropy in nats (arXiv:1406.2661), the mean of real and made."""
    return (jax.nn.softplus(-real).mean() + jax.nn.softplus(made).mean()) / 2


def linear(made: Array) -> Array:
    """-E D(made): what goes with the hinge."""
    return -jnp.mean(made)


def non_saturating(made: Array) -> Array:
    """-E log p(real | made), in nats (arXiv:1406.2661)."""
    return jax.nn.softplus(-made).mean()


DISCRIMINATOR_LOSSES = {"hinge": hinge, "vanilla": vanilla}
GENERATOR_LOSSES = {"linear": linear, "non_saturating": non_saturating}
