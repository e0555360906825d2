"""Convolutional autoencoders: LlamaGen's VQ, VAR's multi-scale VQ, MAR's KL, MaskGIT's VQGAN, and FSQ and LFQ on the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ar_jax.config import UsageError, build
from ar_jax.tokenizers.conv import PLACES, ConvOptions, Decoder, Encoder
from ar_jax.tokenizers.learned import LearnedTokenizer, Network
from ar_jax.tokenizers.quantizers import QUANTIZERS


def autoencoder(
    shape: tuple[int, ...],
    quantizer: Mapping[str, Any] | None = None,
    hidden_channels: int = 128,
    channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
    num_res_blocks: int = 2,
    attention: Sequence[str] = PLACES,
    style: str = "vqgan",
    num_groups: int = 32,
    z_channels: int | None = None,
    quant_kernel_size: int = 1,
    image_range: Sequence[float] = (-1.0, 1.0),
    patch_size: int = 1,
    latent_scale: float = 1.0,
    dtype: str = "float32",
) -> LearnedTokenizer:
    """One latent for each square of 2^(levels - 1) pixels.

    Args:
      shape: (H, W, C) of the images.
      quantizer: `kind`, a key of QUANTIZERS, and its fields; None takes kind "vq".
      hidden_channels: see ConvOptions, as for the next five.
      channel_multipliers: the levels.
      num_res_blocks: of a level.
      attention: where.
      style: "vqgan" or "maskgit".
      num_groups: of the norms.
      z_channels: of the latents inside the network; None takes the quantizer's.
      quant_kernel_size: of the convolutions between them and the quantizer; 0 has none.
      image_range: the numbers that stand for black and white in the network.
      patch_size: latents along each axis that make one continuous token (MAR).
      latent_scale: factor of continuous tokens (MAR: 0.2325).
      dtype: of the computation, "float32" or "bfloat16".

    Raises:
      UsageError: sizes that do not fit one another.
    """
    options = ConvOptions(
        hidden_channels, tuple(channel_multipliers), num_res_blocks, tuple(attention), style, num_groups, dtype
    )
    factor = options.downsampling
    if len(shape) != 3 or shape[0] % factor or shape[1] % factor:
        raise UsageError(
            f"tokenizer 'autoencoder' halves images {len(options.widths) - 1} times, but the data has shape {shape}; its sides "
            f"must be multiples of {factor}, or config.tokenizer.channel_multipliers shorter."
        )
    inner = build(QUANTIZERS, {"kind": "vq"} if quantizer is None else quantizer, "tokenizer.quantizer")
    z_channels = z_channels or inner.channels
    if not quant_kernel_size and z_channels != inner.channels:
        raise UsageError(
            f"config.tokenizer.z_channels={z_channels} must be the quantizer's {inner.channels} channels where "
            "quant_kernel_size=0; leave it out."
        )
    outs = z_channels * inner.in_channels // inner.channels  # mean and variance where the quantizer takes both
    network = Network(
        encoder=Encoder(options, outs, inner.in_channels, quant_kernel_size),
        quantizer=inner,
        decoder=Decoder(options, z_channels, shape[2], quant_kernel_size),
    )
    grid = (shape[0] // factor, shape[1] // factor)
    low, high = image_range
    return LearnedTokenizer(shape, network, grid, "decoder/conv_out/kernel", (low, high), patch_size, latent_scale)
