"""Convolutional encoder and decoder of images: VQGAN's (arXiv:2012.09841) and MaskGIT's without attention (arXiv:2202.04200)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError, choose
from ar_jax.kernels.dense import Dense

PLACES = ("encoder", "middle", "decoder")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Style:
    """In what published networks of this shape differ, besides their sizes.

    Attributes:
      block_bias: the convolutions of residual blocks, and the first of the encoder, have biases.
      pooled: the encoder halves the resolution by averaging, not by a strided convolution.
      output_shortcut: where a block changes the channels, its shortcut reads the block's output, not its input.
      middle_blocks: residual blocks at the bottom; 0 takes num_res_blocks.
      extra_decoder_blocks: how many more residual blocks a level has in the decoder than in the encoder.
      out_kernel_size: of the encoder's last convolution.
    """

    block_bias: bool
    pooled: bool
    output_shortcut: bool
    middle_blocks: int
    extra_decoder_blocks: int
    out_kernel_size: int


STYLES = {
    "vqgan": Style(
        block_bias=True, pooled=False, output_shortcut=False, middle_blocks=2, extra_decoder_blocks=1, out_kernel_size=3
    ),
    "maskgit": Style(
        block_bias=False, pooled=True, output_shortcut=True, middle_blocks=0, extra_decoder_blocks=0, out_kernel_size=1
    ),
}


@dataclasses.dataclass(frozen=True)
class ConvOptions:
    """What encoder and decoder have in common.

    Attributes:
      hidden_channels: width at full resolution.
      channel_multipliers: width of each level as a multiple of it; each level but the last halves the resolution.
      num_res_blocks: residual blocks of a level of the encoder.
      attention: where the lowest resolution has attention: after each block of the "encoder", of the "decoder", and in the
        "middle" of both.
      style: a key of STYLES.
      num_groups: of the group norms.
      dtype: of the computation, "float32" or "bfloat16".

    Raises:
      UsageError: a value that no part takes.
    """

    hidden_channels: int = 128
    channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    attention: Sequence[str] = PLACES
    style: str = "vqgan"
    num_groups: int = 32
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Checks the values before anything is traced."""
        for key, table in (("style", STYLES), ("dtype", DTYPES)):
            choose(table, getattr(self, key), f"tokenizer.{key}")
        for place in self.attention:
            choose(dict.fromkeys(PLACES), place, "tokenizer.attention")
        if (
            not self.channel_multipliers
            or min(*self.channel_multipliers, self.hidden_channels, self.num_res_blocks) < 1
        ):
            raise UsageError(
                "config.tokenizer.hidden_channels, num_res_blocks and every one of channel_multipliers must be at least 1."
            )
        if self.num_groups < 1 or any(width % self.num_groups for width in (self.hidden_channels, *self.widths)):
            raise UsageError(
                f"config.tokenizer.num_groups={self.num_groups} must divide the widths {self.hidden_channels}, "
                f"{', '.join(map(str, self.widths))} of the levels; set num_groups or hidden_channels."
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, from full resolution down."""
        return tuple(self.hidden_channels * multiplier for multiplier in self.channel_multipliers)

    @property
    def downsampling(self) -> int:
        """How many pixels of a line make one latent."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def conventions(self) -> Style:
        """Those of the style."""
        return STYLES[self.style]

    def norm(self, name: str | None = None) -> nn.GroupNorm:
        """A group norm; its statistics are in float32."""
        dtype = DTYPES[self.dtype]
        return nn.GroupNorm(num_groups=self.num_groups, epsilon=1e-6, use_fast_variance=False, dtype=dtype, name=name)

    def conv(self, channels: int, kernel_size: int = 3, **options: Any) -> nn.Conv:
        """A convolution that keeps the resolution, unless told otherwise."""
        return nn.Conv(channels, (kernel_size, kernel_size), dtype=DTYPES[self.dtype], **options)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 shortcut where the channels change."""

    channels: int
    options: ConvOptions

    def setup(self) -> None:
        """Norms and convolutions."""
        conv = functools.partial(self.options.conv, self.channels, use_bias=self.options.conventions.block_bias)
        self.norm_1, self.conv_1 = self.options.norm(), conv()
        self.norm_2, self.conv_2 = self.options.norm(), conv()
        self.shortcut = conv(kernel_size=1)

    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] to [B, H, W, channels]."""
        out = self.conv_1(nn.silu(self.norm_1(x)))
        out = self.conv_2(nn.silu(self.norm_2(out)))
        if x.shape[-1] != self.channels:
            x = self.shortcut(out if self.options.conventions.output_shortcut else x)
        return x + out


class Attention(nn.Module):
    """x + attention over all places of an image, of one head."""

    options: ConvOptions

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] to the same."""
        dense = functools.partial(Dense, x.shape[-1], dtype=DTYPES[self.options.dtype])
        normed = self.options.norm(name="norm")(x)
        q, k, v = (
            dense(name=name)(normed).reshape(len(x), -1, 1, x.shape[-1])  # [B, T, 1, C]
            for name in ("query", "key", "value")
        )
        return x + dense(name="out")(jax.nn.dot_product_attention(q, k, v).reshape(x.shape))


class Level(nn.Module):
    """Residual blocks of one resolution, the first of them followed by attention, then a change of resolution.

    Attributes:
      channels: of the blocks.
      num_blocks: residual blocks.
      num_attentions: so many blocks are followed by attention.
      resample: "down" halves the resolution, "up" doubles it, "" keeps it.
    """

    channels: int
    num_blocks: int
    num_attentions: int
    resample: str
    options: ConvOptions

    def setup(self) -> None:
        """Blocks, attentions and the convolution that belongs to a change of resolution."""
        self.block = [ResBlock(self.channels, self.options) for _ in range(self.num_blocks)]
        self.attention = [Attention(self.options) for _ in range(self.num_attentions)]
        if self.resample == "down" and not self.options.conventions.pooled:
            self.down = self.options.conv(self.channels, strides=2, padding=((0, 1), (0, 1)))
        if self.resample == "up":
            self.up = self.options.conv(self.channels)

    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] to [B, H', W', channels]."""
        for i, block in enumerate(self.block):
            x = block(x)
            if i < self.num_attentions:
                x = self.attention[i](x)
        if self.resample == "down":
            return nn.avg_pool(x, (2, 2), (2, 2)) if self.options.conventions.pooled else self.down(x)
        return self.up(doubled(x)) if self.resample == "up" else x


def doubled(x: Array) -> Array:
    """Every pixel of [B, H, W, C] twice along both axes, [B, 2 H, 2 W, C]."""
    batch, height, width, channels = x.shape
    wide = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
    return wide.reshape(batch, 2 * height, 2 * width, channels)


def _middle(options: ConvOptions) -> Level:
    """The bottom of encoder and decoder."""
    num_blocks = options.conventions.middle_blocks or options.num_res_blocks
    return Level(options.widths[-1], num_blocks, int("middle" in options.attention), "", options)


class Encoder(nn.Module):
    """Images to latents.

    Attributes:
      z_channels: of the network's own output.
      out_channels: of z, behind one more convolution.
      quant_kernel_size: of that convolution; 0 leaves it out, and z_channels are out_channels.
    """

    options: ConvOptions
    z_channels: int
    out_channels: int
    quant_kernel_size: int = 1

    def setup(self) -> None:
        """Levels from full resolution down."""
        options, last = self.options, len(self.options.widths) - 1
        self.conv_in = options.conv(options.hidden_channels, use_bias=options.conventions.block_bias)
        attentions = options.num_res_blocks if "encoder" in options.attention else 0
        self.level = [
            Level(w, options.num_res_blocks, attentions if i == last else 0, "down" if i < last else "", options)
            for i, w in enumerate(options.widths)
        ]
        self.middle = _middle(options)
        self.norm_out = options.norm()
        self.conv_out = options.conv(self.z_channels, options.conventions.out_kernel_size)
        if self.quant_kernel_size:
            self.quant_conv = options.conv(self.out_channels, self.quant_kernel_size)

    def __call__(self, images: Array) -> Array:
        """[B, H, W, C] to z [B, H / f, W / f, out_channels] in float32, f = 2^(levels - 1)."""
        x = self.conv_in(images)
        for level in self.level:
            x = level(x)
        x = self.conv_out(nn.silu(self.norm_out(self.middle(x))))
        return (self.quant_conv(x) if self.quant_kernel_size else x).astype(jnp.float32)


class Decoder(nn.Module):
    """Latents to images; the last convolution stands apart, since adversarial training weighs gradients by its own.

    Attributes:
      z_channels: of the network's own input.
      image_channels: colours.
      quant_kernel_size: of a convolution before it, from the quantizer's channels to z_channels; 0 leaves it out.
    """

    options: ConvOptions
    z_channels: int
    image_channels: int
    quant_kernel_size: int = 1

    def setup(self) -> None:
        """Levels, numbered from full resolution down as in the encoder; they run from the last to the first."""
        options, last = self.options, len(self.options.widths) - 1
        if self.quant_kernel_size:
            self.post_quant_conv = options.conv(self.z_channels, self.quant_kernel_size)
        self.conv_in = options.conv(options.widths[-1])
        self.middle = _middle(options)
        num_blocks = options.num_res_blocks + options.conventions.extra_decoder_blocks
        attentions = num_blocks if "decoder" in options.attention else 0
        self.level = [
            Level(w, num_blocks, attentions if i == last else 0, "up" if i else "", options)
            for i, w in enumerate(options.widths)
        ]
        self.norm_out = options.norm()
        self.conv_out = options.conv(self.image_channels)

    def features(self, values: Array) -> Array:
        """Quantized latents [B, h, w, D] to what the last convolution reads, [B, h f, w f, hidden width]."""
        x = self.conv_in(self.post_quant_conv(values) if self.quant_kernel_size else values)
        x = self.middle(x)
        for level in reversed(self.level):
            x = level(x)
        return nn.silu(self.norm_out(x))

    def last(self, features: Array) -> Array:
        """Features to images [B, h f, w f, image_channels] in float32."""
        return self.conv_out(features).astype(jnp.float32)
